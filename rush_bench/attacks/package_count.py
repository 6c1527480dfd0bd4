"""Attacks whose package counts robust images itself: its count goes into the record beside the x' that we score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.defenses import Defense
from rush_bench.noise import Stream
from rush_bench.threats import Threat


@dataclass(frozen=True)
class CountedByPackage(Attack):
    """A subclass gives `attempt`. The count belongs to the run, not to x': it depends on single noisy passes."""

    def attempt(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, Tensor]:
        """x' (B, C, H, W), and which images (B,) were never wrong in a pass that decided: the package counts them as robust."""
        raise NotImplementedError

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        return self.attempt(defense, images, labels, threat, stream)[0]

    def recorded(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, dict[str, Any]]:
        attacked, standing = self.attempt(defense, images, labels, threat, stream)
        return attacked, counted(standing)


def counted(standing: Tensor) -> dict[str, Any]:
    """`official_correct` of `official_repeats` (1) of each image, from `standing` (B,) bool."""
    ones = torch.ones_like(standing, dtype=torch.int64).cpu().numpy()
    return {"official_correct": standing.long().cpu().numpy(), "official_repeats": ones}
