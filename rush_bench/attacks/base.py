"""What an attack is: a frozen dataclass of settings with `run`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.settings import Settings
from rush_bench.threats import Threat


@dataclass(frozen=True)
class Attack(Settings):
    """Base of all attacks; the fields of a subclass are its settings.

    `run` returns x' (B, C, H, W) float32 in the ball and the box; the scorer checks that. It returns its best x' for every
    image, never the clean one because a noisy pass happened to be right (protocol 4), and draws only from `stream`.
    """

    drawn: ClassVar[tuple[str, ...]] = ()  # settings of draws: without effect on a deterministic defence
    climbs: ClassVar[bool] = True  # the defence's own gradients, which are looked at beside it (see `health`)
    # settings that came later, and what was done before: left out of a record's key there, so that older records still count
    later: ClassVar[dict[str, Any]] = {}

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        raise NotImplementedError

    def go_on(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream, found: Tensor) -> Tensor:
        """As `run`, with the best x' of other attacks (B, C, H, W) as a further start; ignored by an attack that takes none."""
        return self.run(defense, images, labels, threat, stream)

    def on(self, defense: Defense) -> "Attack":
        """As it is run on this defence: defaults that depend on its kind filled in, settings without effect at a fixed value.

        What a record's key is made of.
        """
        return self

    def recorded(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, dict[str, Any]]:
        """x' of `run`, and further per-image arrays (B,) for the record, such as the score on the attack's own bank."""
        return self.run(defense, images, labels, threat, stream), {}

    def passes(self, defense: Defense) -> tuple[float, float]:
        """Rows that will go forward and backward for one image, `recorded` included: an estimate from above, before the run.

        What it reckons with is that nothing ends early. NaN where an attack does not say.
        """
        return math.nan, math.nan

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for the record's key."""
        found = dataclasses.asdict(self)
        return {key: value for key, value in found.items() if key not in self.later or value != self.later[key]}
