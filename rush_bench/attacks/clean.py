"""No attack: the clean images."""

from typing import Any, ClassVar

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.threats import Threat

NAMES = {"clean": "no attack: accuracy on clean images"}


class Clean(Attack):
    """Returns the images."""

    climbs: ClassVar[bool] = False

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        return images

    def passes(self, defense: Defense) -> tuple[float, float]:
        return 0, 0


def make(name: str) -> Any:
    return Clean
