"""Where a data set comes from: the small interface that every built-in and every plug-in provides."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


def _no_positions() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Part:
    """One official part of a data set, as it lies on disk.

    pixels: uint8 (N, C, H, W), (N, H, W, C) or (N, H, W); a numpy memmap is read only where it is asked for.
    labels: integers (N,), or None for a part without labels. stand_ins: positions whose pixels are not the official
    ones. origin: file or folder, for messages.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    origin: str
    stand_ins: np.ndarray = field(default_factory=_no_positions)


@dataclass(frozen=True)
class Source:
    """A data set by name.

    read(part, folder) returns the `Part` "train", "test" or "unlabelled"; None says that there are no unlabelled
    images. `folder` is the user's data folder, which need not exist. `size` is the side to which images are resized
    unless the user asks for another; None leaves them unchanged.
    """

    name: str
    read: Callable[[str, Path], Part | None]
    size: int | None = None
