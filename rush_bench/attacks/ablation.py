"""PGD with a choice made as published code made it, for the experiments that ask what the choice is worth (T2, T9, T15)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.pgd import PGD, WITHOUT_LOOKS, Walk
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.settings import Whole
from rush_bench.threats import Threat

NAMES = {"pgd-ablation": "PGD with draws used again, pixels that freeze or the last iterate: what T2 and T9 compare"}


@dataclass
class LooseWalk(Walk):
    """The ball holds the perturbation and the box does not: the network sees clamp(x + delta, 0, 1)."""

    frozen: ClassVar[bool] = False
    delta: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.delta = self.attacked - self.clean

    def move(self, gradient: Tensor) -> None:
        if self.frozen:
            point = self.clean + self.delta
            gradient = gradient * ((point >= 0) & (point <= 1))
        self.delta = self.threat.limit(self.delta + self.step * self.threat.eps * self.threat.ascend(gradient))
        self.attacked = (self.clean + self.delta).clamp(0, 1)

    def keep(self, positions: Tensor) -> None:
        super().keep(positions)
        self.delta = self.delta[positions]


class FrozenWalk(LooseWalk):
    """The gradient goes through that clamp, so that pixels strictly outside of the box freeze."""

    frozen = True


WALKS: dict[str, type[Walk]] = {"project": Walk, "graph": FrozenWalk, "straight-through": LooseWalk}


@dataclass(frozen=True)
class Switched(PGD):
    """PGD with three switches. `redraw` is how many steps draws are used before fresh ones come: 1 for EOT; 0 never.

    `clamp` is how the box is kept: `project` moves x' itself into it after each step; `graph` lets the perturbation leave it
    and takes the gradient through clamp(x + delta, 0, 1); under `straight-through` the clamp counts as the identity in the
    gradient (BPDA, Athalye et al. 2018). `keep="last"` returns the last iterate of the last restart, as published code does
    (A9), and judges none.
    """

    drawn: ClassVar[tuple[str, ...]] = (*PGD.drawn, "redraw")
    later: ClassVar[dict[str, Any]] = PGD.later | {"redraw": 1, "clamp": "project", "keep": "best"}

    redraw: Whole = 1
    clamp: Literal["project", "graph", "straight-through"] = "project"
    keep: Literal["best", "last"] = "best"

    def walk(self, start: Tensor, clean: Tensor, threat: Threat) -> Walk:
        return WALKS[self.clamp](start, clean, threat, self.step)

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if self.keep == "best":
            found = super().run(defense, images, labels, threat, stream)
        else:
            climbed = self.climbed(defense, images, stream)
            for restart in range(self.restarts):
                walk = self.begin(images, threat, stream, restart)
                for step in range(self.steps):
                    walk.move(self.gradient(climbed, walk, labels, stream, restart, step).gradient)
            found = walk.attacked
        # without projection in the loop, images + delta may be a rounding outside of the ball
        return found if self.clamp == "project" else threat.project(found, images)

    def renewed(self, step: int) -> int:
        return step // self.redraw if self.redraw else 0

    def looks(self, defense: Defense) -> int:
        return super().looks(defense) if self.keep == "best" else 0

    def on(self, defense: Defense) -> Attack:
        settled = super().on(defense)
        return settled if self.keep == "best" else dataclasses.replace(settled, **WITHOUT_LOOKS)


@dataclass(frozen=True)
class Ablation(Switched):
    """`pgd` or `eot`, whichever `of` says, with a switch turned; its record is one of that attack, and so is its key."""

    of: Literal["pgd", "eot"] = "pgd"

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return {"name": settings.pop("of"), **settings}


def make(name: str) -> type[Ablation]:
    return Ablation
