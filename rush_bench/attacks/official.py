"""Attacks whose package keeps a count of its own: the count goes into the record beside the x' that we score ourselves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.defenses import Defense
from rush_bench.noise import Stream


@dataclass(frozen=True)
class Official(Attack):
    """`extra` says which images the package's bookkeeping counts as robust: `official_correct` of `official_repeats` (1).

    That count belongs to the run, not to x' (it depends on single noisy passes), so the run notes it for `extra`.
    """

    def extra(self, defense: Defense, attacked: Tensor, labels: Tensor, stream: Stream) -> dict[str, Any]:
        noted, standing = self.__dict__.get("_noted", (None, None))
        if noted is None or noted.shape != attacked.shape or not torch.equal(noted, attacked):
            raise ValueError("the official count is that of the last run: call extra with the x' that it returned")
        return {
            "official_correct": standing.long().cpu().numpy(),
            "official_repeats": torch.ones_like(labels).cpu().numpy(),
        }

    def _note(self, attacked: Tensor, standing: Tensor) -> None:
        """`standing` (B,) bool: never wrong in a pass that decided."""
        self.__dict__["_noted"] = attacked, standing  # no field: it is no setting and enters no key
