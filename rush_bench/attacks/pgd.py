"""Projected gradient descent (Madry et al. 2017) through eq. 7 of the RUSH paper, with fresh draws at every step (EOT)."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import gradient_rows, judging_rows
from rush_bench.defenses import Defense
from rush_bench.defenses.aggregate import objective_named, steepened
from rush_bench.noise import Stream
from rush_bench.settings import Count, Range, Whole
from rush_bench.threats import Threat

NAMES = {
    "pgd": "PGD-20, step eps/4 (2/255 at 8/255), random start; the defence's own m draws per gradient",
    "eot": "PGD-100, step 2.5 eps/100, random start; 64 fresh draws per gradient (EOT)",
}

Step = Annotated[float, Range(0, 10, above=True)]  # in units of eps; 2 cross the ball

# Settings that came later, and what was done before: left out of a record's key there, so that older records still count.
LATER: dict[str, Any] = {"redraw": 1, "clamp": "project", "keep": "best", "stop": False}
WITHOUT_LOOKS: dict[str, Any] = {"select_draws": 32, "select_every": 5, "stop": False}  # where nothing is held apart: no effect


@dataclass(frozen=True)
class PGD(Attack):
    """`step` is in units of eps; `draws` per gradient, 0 for the defence's own m.

    On a randomised defence iterates are judged every `select_every` steps and at the end, on `select_draws` draws held apart
    from those of the gradients (A4; see `BestSoFar`), and with `stop` an image that is broken there leaves: its x' and the
    margin in its record are those of that look, not the furthest that the steps would go. On a deterministic defence every
    iterate counts, at no extra cost, and none leaves. `keep="last"` returns the last iterate of the last restart instead, as
    published code does (A9).

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
    select_draws: Count = 24
    select_every: Count = 10
    redraw: Whole = 1
    clamp: Literal["project", "graph", "straight-through"] = "project"
    keep: Literal["best", "last"] = "best"
    stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_named(self.loss, targets=False)

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if (settled := self.on(defense)) != self:
            return settled.run(defense, images, labels, threat, stream)
        draws, objective = self.draws or defense.draws or 1, self._objective(defense)
        best = BestSoFar(defense, images, labels, stream, self.select_draws)
        looks = self.keep == "best" and not defense.deterministic
        for restart in range(self.restarts):
            alive = best.standing() if self.stop and restart else best.everyone
            own, clean, truth = stream.at(best.places(alive)), images[alive], labels[alive]
            attacked = threat.start(clean, own.named(f"start{restart}")) if self.random_start else clean
            delta = attacked - clean
            for step in range(self.steps):
                if looks and step and step % self.select_every == 0:
                    best.offer(attacked, alive)
                    positions = (~best.broken[alive]).nonzero()[:, 0]
                    if self.stop and len(positions) < len(alive):
                        alive, clean, truth, attacked, delta = (x[positions] for x in (alive, clean, truth, attacked, delta))
                        own = stream.at(best.places(alive))
                if not len(alive):
                    break
                fresh = step // self.redraw if self.redraw else 0
                noise = own.named(f"gradient{restart}").skip(fresh * draws)
                at = defense.gradient(attacked, truth, objective, draws, noise)
                if self.keep == "best" and not looks:
                    best.take(attacked, alive, at.loss)
                if self.clamp == "project":
                    # x' itself is projected, so no pixel can freeze outside the box (sources S5.10)
                    attacked = threat.project(attacked + self.step * threat.eps * threat.ascend(at.gradient), clean)
                else:
                    delta = self._move(delta, clean, at.gradient, threat)
                    attacked = (clean + delta).clamp(0, 1)
            if self.keep == "last":
                best.points[alive] = attacked
            elif looks and len(alive):
                best.offer(attacked, alive)
            elif not looks:
                function, averaging = objective_named(objective)
                logs = defense.predict(attacked, own).logs  # of one draw: what `Defense.gradient` calls the loss
                best.take(attacked, alive, function(averaging.each(logs[:, None])[:, 0].log_softmax(1), truth))
        # without projection in the loop, images + delta may be a rounding outside of the ball
        return best.points if self.clamp == "project" else threat.project(best.points, images)

    def passes(self, defense: Defense) -> tuple[float, float]:
        forward, backward = gradient_rows(defense, self.draws or defense.draws or 1, self.loss)
        looks = 0
        if self.keep == "best":
            looks = 1 if defense.deterministic else 1 + (self.steps - 1) // self.select_every
        return (
            self.restarts * (self.steps * forward + looks * judging_rows(defense, self.select_draws)),
            self.restarts * self.steps * backward,
        )

    def on(self, defense: Defense) -> Attack:
        looks = self.keep == "best" and not defense.deterministic
        return self if looks else dataclasses.replace(self, **WITHOUT_LOOKS)

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in super().settings().items() if key not in LATER or value != LATER[key]}

    def _objective(self, defense: Defense) -> str:
        return steepened(self.loss, defense.steepness)

    def _move(self, delta: Tensor, images: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
        """One step of a perturbation that the ball holds and the box does not."""
        if self.clamp == "graph":
            inside = (images + delta >= 0) & (images + delta <= 1)
            gradient = gradient * inside
        return threat.limit(delta + self.step * threat.eps * threat.ascend(gradient))


@dataclass(frozen=True)
class EOT(PGD):
    """PGD with many steps and many fresh draws, whatever m the defence votes with."""

    steps: Count = 100
    step: Step = 0.025
    draws: Whole = 64
    select_draws: Count = 64


def make(name: str) -> Any:
    return {"pgd": PGD, "eot": EOT}[name]
