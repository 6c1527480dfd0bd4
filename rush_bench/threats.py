"""The geometry of a threat, one for attacks and for training: sizes, projections, steps and starts in l-inf and l2."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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

    def project(self, attacked: Tensor, images: Tensor, box: bool = True) -> Tensor:
        """Into the ball around `images`, then into the [0,1] box (which moves towards the images, so stays in the ball)."""
        if self.norm == "linf":
            attacked = attacked.clamp(images - self.eps, images + self.eps)
        else:
            attacked = images + self.limit(attacked - images)
        return attacked.clamp(0, 1) if box else attacked

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
