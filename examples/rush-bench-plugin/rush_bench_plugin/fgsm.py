"""The fast gradient sign method (Goodfellow et al. 2015, section 4): one step to the border of the ball."""

from dataclasses import dataclass

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.threats import Threat


@dataclass(frozen=True)
class FGSM(Attack):
    """`draws` for the gradient of a randomised defence, 0 for its own number of votes."""

    draws: int = 0
    loss: str = "ce"

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        at = defense.gradient(images, labels, self.loss, self.draws or defense.draws or 1, stream.named("gradient"))
        return threat.project(images + threat.eps * threat.ascend(at.gradient), images)
