"""What an attack is: a frozen dataclass of settings with `run`, and the geometry of a threat."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.settings import Positive, Settings

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Threat(Settings):
    """The ball that x' stays in: norm and radius eps, in pixel units."""

    norm: Norm
    eps: Positive

    def size(self, delta: Tensor) -> Tensor:
        """Norm of each perturbation: (B, ...) to (B,)."""
        flat = delta.flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)

    def project(self, attacked: Tensor, images: Tensor) -> Tensor:
        """Into the ball around `images`, then into the [0,1] box (which moves towards the images, so stays in the ball)."""
        if self.norm == "linf":
            attacked = attacked.clamp(images - self.eps, images + self.eps)
        else:
            attacked = images + self.limit(attacked - images)
        return attacked.clamp(0, 1)

    def limit(self, delta: Tensor) -> Tensor:
        """A perturbation (B, C, H, W) into the ball, whatever the box."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1)[:, None, None, None]

    def ascend(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent: sign for l-inf, the normalised gradient for l2."""
        if self.norm == "linf":
            return gradient.sign()
        most = gradient.flatten(1).abs().amax(1)[:, None, None, None]
        unit = gradient / torch.where(most > 0, most, 1)  # the squares of small numbers would vanish
        return unit / self.size(unit).clamp_min(1)[:, None, None, None]

    def start(self, images: Tensor, stream: Stream) -> Tensor:
        """A random point of the ball around each image: uniform in the l-inf ball; uniform direction and radius in l2."""
        uniform = stream.uniform(len(images), 1, tuple(images.shape[1:]), images.device)[:, 0]
        if self.norm == "linf":
            return self.project(images + (2 * uniform - 1) * self.eps, images)
        direction = self.ascend(torch.erfinv(2 * uniform - 1))
        radius = stream.named("radius").uniform(len(images), 1, (1, 1, 1), images.device)[:, 0]
        return self.project(images + direction * radius * self.eps, images)


@dataclass(frozen=True)
class Attack(Settings):
    """Base of all attacks; the fields of a subclass are its settings.

    `run` returns x' (B, C, H, W) float32 in the ball and the box; the scorer checks that. It returns its best x' for every
    image, never the clean one because a noisy pass happened to be right (protocol 4), and draws only from `stream`.
    """

    climbs: ClassVar[bool] = True  # the defence's own gradients, which are looked at beside it (see `health`)

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

    def extra(self, defense: Defense, attacked: Tensor, labels: Tensor, stream: Stream) -> dict[str, Any]:
        """Further per-image arrays for the record, such as the score on the attack's own bank."""
        return {}

    def passes(self, defense: Defense) -> tuple[float, float]:
        """Rows that will go forward and backward for one image, `extra` included: an estimate from above, before the run.

        What it reckons with is that nothing ends early. NaN where an attack does not say.
        """
        return math.nan, math.nan

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for the record's key."""
        return dataclasses.asdict(self)
