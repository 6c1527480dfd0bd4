"""Projected gradient descent (Madry et al. 2017) through eq. 7 of the RUSH paper, with fresh draws at every step (EOT)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack, Threat
from rush_bench.defenses import Defense
from rush_bench.noise import Stream

NAMES = {
    "pgd": "PGD-20, step eps/4 (2/255 at 8/255), random start; the defence's own m draws per gradient",
    "eot": "PGD-100, step 2.5 eps/100, random start; 64 fresh draws per gradient (EOT)",
}


@dataclass(frozen=True)
class PGD(Attack):
    """`step` is in units of eps; `draws` per gradient, 0 for the defence's own m.

    On a randomised defence the iterate to keep is chosen every `select_every` steps by its mean loss over `select_draws`
    draws held apart from those of the gradients (A4); on a deterministic one every iterate counts, at no extra cost.
    """

    steps: int = 20
    step: float = 0.25
    restarts: int = 1
    random_start: bool = True
    draws: int = 0
    loss: str = "ce"
    select_draws: int = 32
    select_every: int = 5

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        draws = self.draws or defense.draws or 1
        best, best_loss = images, torch.full((len(images),), -torch.inf, device=images.device)

        def keep(attacked: Tensor, loss: Tensor) -> None:
            nonlocal best, best_loss
            better = loss > best_loss
            best = torch.where(better[:, None, None, None], attacked, best)
            best_loss = torch.where(better, loss, best_loss)

        for restart in range(self.restarts):
            attacked = threat.start(images, stream.named(f"start{restart}")) if self.random_start else images
            noise = stream.named(f"gradient{restart}")
            for step in range(self.steps):
                at = defense.gradient(attacked, labels, self.loss, draws, noise.skip(step * draws))
                if defense.deterministic:
                    keep(attacked, at.loss)
                elif step and step % self.select_every == 0:
                    keep(attacked, self._held_apart(defense, attacked, labels, stream))
                # x' itself is projected, so no pixel can freeze outside the box (R5 row 10)
                attacked = threat.project(attacked + self.step * threat.eps * threat.ascend(at.gradient), images)
            keep(attacked, self._held_apart(defense, attacked, labels, stream))
        return best

    def _held_apart(self, defense: Defense, attacked: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        """Mean of -p_y over held-apart draws, the same ones at every call, so that iterates are compared in pairs."""
        draws, held = max(defense.draws, 1), stream.named("select")
        predictions = 1 if defense.deterministic else -(-self.select_draws // draws)
        total = torch.zeros(len(attacked), device=attacked.device)
        for k in range(predictions):
            probabilities = defense.predict(attacked, held.skip(k * draws)).probabilities
            total += probabilities.gather(1, labels[:, None])[:, 0]
        return -total / predictions if not defense.deterministic else -total.clamp_min(1e-30).log()


@dataclass(frozen=True)
class EOT(PGD):
    """PGD with many steps and many fresh draws, whatever m the defence votes with."""

    steps: int = 100
    step: float = 0.025
    draws: int = 64
    select_draws: int = 64
    select_every: int = 10


def make(name: str) -> Any:
    return {"pgd": PGD, "eot": EOT}[name]
