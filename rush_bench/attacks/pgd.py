"""Projected gradient descent (Madry et al. 2017) through eq. 7 of the RUSH paper, with fresh draws at every step (EOT)."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack, Threat
from rush_bench.attacks.cost import gradient_rows, judging_rows
from rush_bench.defenses import Defense
from rush_bench.defenses.aggregate import objective_named
from rush_bench.noise import Stream
from rush_bench.settings import Count, Range, Whole

NAMES = {
    "pgd": "PGD-20, step eps/4 (2/255 at 8/255), random start; the defence's own m draws per gradient",
    "eot": "PGD-100, step 2.5 eps/100, random start; 64 fresh draws per gradient (EOT)",
}

Step = Annotated[float, Range(0, 10, above=True)]  # in units of eps; 2 cross the ball

# Settings that came later, and what was done before: left out of a record's key there, so that older records still count.
LATER: dict[str, Any] = {"redraw": 1, "clamp": "project", "keep": "best"}


@dataclass(frozen=True)
class PGD(Attack):
    """`step` is in units of eps; `draws` per gradient, 0 for the defence's own m.

    On a randomised defence the iterate to keep is chosen every `select_every` steps by its mean loss over `select_draws`
    draws held apart from those of the gradients (A4); on a deterministic one every iterate counts, at no extra cost.
    `keep="last"` returns the last iterate of the last restart instead, as published code does (A9).

    `redraw` is how many steps draws are used before fresh ones come: 1 for EOT; 0 never, the fixed noise of T2.
    `clamp` is how the box is kept (T9): `project` moves x' itself into it after each step; `graph` lets the perturbation
    leave it and takes the gradient through clamp(x + delta, 0, 1), so that pixels strictly outside freeze; under
    `straight-through` the clamp counts as the identity in the gradient (BPDA, Athalye et al. 2018).
    """

    steps: Count = 20
    step: Step = 0.25
    restarts: Count = 1
    random_start: bool = True
    draws: Whole = 0
    loss: str = "ce"
    select_draws: Count = 32
    select_every: Count = 5
    redraw: Whole = 1
    clamp: Literal["project", "graph", "straight-through"] = "project"
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_named(self.loss, targets=False)

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
            delta = attacked - images
            noise = stream.named(f"gradient{restart}")
            for step in range(self.steps):
                fresh = step // self.redraw if self.redraw else 0
                at = defense.gradient(attacked, labels, self.loss, draws, noise.skip(fresh * draws))
                if self.keep == "last":
                    pass
                elif defense.deterministic:
                    keep(attacked, at.loss)
                elif step and step % self.select_every == 0:
                    keep(attacked, self._held_apart(defense, attacked, labels, stream))
                if self.clamp == "project":
                    # x' itself is projected, so no pixel can freeze outside the box (R5 row 10)
                    attacked = threat.project(attacked + self.step * threat.eps * threat.ascend(at.gradient), images)
                else:
                    delta = self._move(delta, images, at.gradient, threat)
                    attacked = (images + delta).clamp(0, 1)
            if self.keep == "best":
                keep(attacked, self._held_apart(defense, attacked, labels, stream))
        found = attacked if self.keep == "last" else best
        # without projection in the loop, images + delta may be a rounding outside of the ball
        return found if self.clamp == "project" else threat.project(found, images)

    def passes(self, defense: Defense) -> tuple[float, float]:
        forward, backward = gradient_rows(defense, self.draws or defense.draws or 1, self.loss)
        looks = 0
        if self.keep == "best":
            looks = 1 if defense.deterministic else 1 + (self.steps - 1) // self.select_every
        return (
            self.restarts * (self.steps * forward + looks * judging_rows(defense, self.select_draws)),
            self.restarts * self.steps * backward,
        )

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in super().settings().items() if key not in LATER or value != LATER[key]}

    def _move(self, delta: Tensor, images: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
        """One step of a perturbation that the ball holds and the box does not."""
        if self.clamp == "graph":
            inside = (images + delta >= 0) & (images + delta <= 1)
            gradient = gradient * inside
        return threat.limit(delta + self.step * threat.eps * threat.ascend(gradient))

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

    steps: Count = 100
    step: Step = 0.025
    draws: Whole = 64
    select_draws: Count = 64
    select_every: Count = 10


def make(name: str) -> Any:
    return {"pgd": PGD, "eot": EOT}[name]
