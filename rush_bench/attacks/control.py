"""The control of T0: random points of the ball, no search. An attack that does no better than this has a fault."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import judging_rows
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.settings import Count
from rush_bench.threats import Threat

NAMES = {"random-noise": "control: the worst of 100 random points of the ball, on held-apart draws"}


@dataclass(frozen=True)
class RandomNoise(Attack):
    """`points` per image, uniform in the l-inf ball, of uniform direction and radius in l2; judged on `select_draws` draws."""

    climbs: ClassVar[bool] = False
    drawn: ClassVar[tuple[str, ...]] = ("select_draws",)

    points: Count = 100
    select_draws: Count = 16

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        best = BestSoFar(defense, images, labels, stream, self.select_draws)
        for point in range(self.points):
            best.offer(threat.start(images, stream.named(f"point{point}")))
        return best.points

    def passes(self, defense: Defense) -> tuple[float, float]:
        return self.points * judging_rows(defense, self.select_draws), 0


def make(name: str) -> Any:
    return RandomNoise
