"""The attacks of the RUSH paper as its public code makes them: they explain a published number, they never measure robustness
(protocol 4 and 5, T15; sources S6.2). Their settings undo one fault at a time.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rush_bench.attacks.ablation import Switched
from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import judging_rows
from rush_bench.attacks.package_count import CountedByPackage
from rush_bench.attacks.parts import Name, parts_for
from rush_bench.attacks.pyautoattack_parts import Effort, PackageParts, part_passes
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.settings import Count, Whole
from rush_bench.threats import Threat

NAMES = {
    "pgd-published": "RUSH's PGD as published (fixed noise, last iterate): explains its number, measures no robustness",
    "aa-published": "RUSH's AutoAttack as published (clean images back): explains its number, measures no robustness",
}


@dataclass(frozen=True)
class PublishedPGD(Switched):
    """The author's code (sources S2.1): m draws as the defence, the same at all 40 steps of eps/4 (2/255 at 8/255), from zero;
    the gradient goes through clamp(x + delta, 0, 1); the last iterate is returned.

    The waterfall of T15 sets `keep=best`, `redraw=1`, `draws`, `steps` with `step`, `loss` and `clamp=project` in turn.
    """

    steps: Count = 40
    random_start: bool = False
    steeper: bool = False
    redraw: Whole = 0
    clamp: Literal["project", "graph", "straight-through"] = "graph"
    keep: Literal["best", "last"] = "last"


@dataclass(frozen=True)
class PublishedAutoAttack(CountedByPackage):
    """torchattacks' AutoAttack in the version of the paper's date (3.2), on a defence that draws anew at every forward pass.

    APGD-CE, APGD-T, untargeted FAB and Square run in sequence; after each, one noisy pass decides: an image leaves at its
    first wrong one, with the component's x'. An image that never was wrong is handed back clean (`hand_back="clean"`), and
    a score on fresh noise is then clean accuracy. Under `best` its best point, over `select_draws` held-apart draws,
    stands wherever the clean image would: the first correction. Up to there both make the same passes.

    `steps` (APGD and FAB), `queries` (Square) and `targets` (0 is every other class) make it affordable. torchattacks 3.5.1
    has 10 steps and `fab="targeted"`. `parts`: these instead, if any. Where the record says `official_correct`, the image stood
    every pass.
    """

    drawn: ClassVar[tuple[str, ...]] = ("select_draws",)
    later: ClassVar[dict[str, Any]] = {"parts": ()}  # for fewer than four classes

    steps: Count = 100
    queries: Count = 5000
    targets: Whole = 0
    fab: Literal["untargeted", "targeted"] = "untargeted"
    hand_back: Literal["clean", "best"] = "clean"
    select_draws: Count = 64
    parts: tuple[Name, ...] = ()

    def attempt(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, Tensor]:
        best = BestSoFar(defense, images, labels, stream, self.select_draws) if self.hand_back == "best" else None
        attacked = images.clone()
        standing = torch.arange(len(images), device=images.device)
        with torch.random.fork_rng():
            package = PackageParts(defense, threat, stream, self._effort())
            for part in self._parts(defense):
                if not len(standing):
                    break
                x, y = images[standing], labels[standing]

                def offer(points: Tensor, where: Tensor, positions: Tensor = standing) -> None:
                    if best is not None:
                        best.offer(points, positions[where])

                claimed = package.run(part, x, y, offer)
                with torch.no_grad():
                    right = package.right(claimed, y)
                attacked[standing[~right]] = claimed[~right]
                standing = standing[right]
            stood = torch.zeros_like(labels, dtype=torch.bool)
            stood[standing] = True
            if best is not None:
                # a lucky wrong pass can also end an image with the clean one; a deterministic defence has no luck
                clean = stood if defense.deterministic else (attacked == images).flatten(1).all(1)
                unseen = (clean & ~best.value.isfinite()).nonzero()[:, 0]
                if len(unseen):  # clean passes that were wrong by chance kept every component from them
                    package.run("apgd-ce", images[unseen], labels[unseen], lambda p, r: best.offer(p, unseen[r]), everyone=True)
                attacked = torch.where(clean[:, None, None, None], best.points, attacked)
        return threat.project(attacked, images), stood

    def passes(self, defense: Defense) -> tuple[float, float]:
        parts = [part_passes(part, defense, self._effort()) for part in self._parts(defense)]
        targets = min(self.targets or defense.classes - 1, defense.classes - 1)
        judged = (2 + targets) * judging_rows(defense, self.select_draws) if self.hand_back == "best" else 0
        return sum(f for f, _ in parts) + judged, sum(b for _, b in parts)

    def on(self, defense: Defense) -> Attack:
        parts = self._parts(defense)
        return self if parts == self._parts() else dataclasses.replace(self, parts=parts)

    def _parts(self, defense: Defense | None = None) -> tuple[Name, ...]:
        """What runs; of a defence of fewer than four classes, what exists."""
        every: tuple[Name, ...] = ("apgd-ce", "apgd-t", "fab" if self.fab == "untargeted" else "fab-t", "square")
        return self.parts or (every if defense is None else parts_for(defense.classes, every))

    def _effort(self) -> Effort:
        return Effort(steps=self.steps, queries=self.queries, targets=self.targets, rescale=True)


def make(name: str) -> type[Attack]:
    return {"pgd-published": PublishedPGD, "aa-published": PublishedAutoAttack}[name]
