"""`load_dataset`: from a name to the images of one split, checked, resized and cut to a fixed subset."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rush_bench import registry
from rush_bench.datasets.folder import folder_source
from rush_bench.datasets.images import Images, channels_first, check_labels, check_levels
from rush_bench.datasets.npz import npz_source
from rush_bench.datasets.source import Part, Source
from rush_bench.datasets.splits import hold_out, ranked
from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import fits

SPLITS = ("pretrain", "transfer", "train", "val", "test")
UNSUPERVISED = ("pretrain", "transfer")  # unlabelled images, where there are any
CHUNK = 1000  # images converted at a time: 110 MB of float32 at 96x96


def load_dataset(
    name: str,
    split: str = "test",
    n: int | None = None,
    *,
    seed: int = 0,
    data_dir: str | Path | None = None,
    size: int | Sequence[int] | None = None,
    stand_ins: bool = False,
) -> Images:
    """Images of one split of a registered data set, or of the user's own: an `.npz` file, a folder with one folder per class.

    split: `test`; `val`, a fixed stratified tenth of the official training set; `train`, the rest of it; `pretrain`,
    what self-supervised stages see: the unlabelled images where the data set has them, otherwise `train`; `transfer`, the
    same for a classifier of another data set, by which nothing is held out here: otherwise the whole training set.
    n: that many images, a stratified subset fixed by `seed`, in an order such that smaller n are its beginnings.
    None is all of them in the official order. (`seed` moves this subset only, never the validation split.)
    data_dir: folder with the files; default the environment's RUSH_BENCH_DATA, else `data`.
    size: side in pixels, or (height, width), bilinear with antialiasing; default the data set's own (digits 16, STL-10 32).
    stand_ins: keep images whose pixels are not the official ones in `test` (`val` never has them, `train` always).

    Raises BadInput for an unknown name or split, a missing or damaged file, wrong labels, a single class, or n beyond
    what there is.

    Examples:
        >>> import rush_bench as rb
        >>> rb.load_dataset("digits", "test", n=20)
        Images(digits, test, 20 of 1x16x16, 10 classes)
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    side = _side(size)
    if n is not None and not fits(int, n):
        raise BadInput(f"n {n!r} must be a whole number of images, such as 100, or None for all")
    if not fits(int, seed):
        raise BadInput(f"seed {seed!r} must be a whole number, such as 0")
    source = find_source(name)
    folder = Path(data_dir or os.environ.get("RUSH_BENCH_DATA") or "data").expanduser()
    part = source.read("unlabelled", folder) if split in UNSUPERVISED else None
    if part is None:
        part = source.read("test" if split == "test" else "train", folder)
        assert part is not None
    if part.labels is None and split not in UNSUPERVISED:
        raise BadInput(f"{part.origin}: no labels; the data set's source must give them for train and test")
    pixels = channels_first(part.pixels, part.origin)
    check_levels(pixels, part.origin)
    labels = None if part.labels is None else check_labels(part.labels, len(pixels), part.classes, part.origin)
    if len(part.classes) == 1 and split not in UNSUPERVISED:
        raise BadInput(
            f"{part.origin} has the single class {part.classes[0]!r}, which any classifier gets right; give it at least 2"
        )
    positions = choose_positions(part, labels, split, None if n is None else int(n), int(seed), stand_ins)
    return Images(
        pixels=_convert(pixels, positions, side or (None if source.size is None else (source.size, source.size))),
        labels=torch.full((len(positions),), -1) if labels is None else torch.from_numpy(labels[positions]),
        index=torch.from_numpy(positions),
        classes=part.classes,
        name=source.name,
        split=split,
    )


def _side(size: Any) -> tuple[int, ...] | None:
    """Height and width of what was asked for."""
    if size is None:
        return None
    side = (size, size) if fits(int, size) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(side) != 2 or not all(fits(int, part) and part >= 1 for part in side):
        raise BadInput(f"size {size!r} must be a side, or (height, width), whole numbers of at least 1 pixel, such as 32")
    return tuple(int(part) for part in side)


def find_source(name: str) -> Source:
    """The source of a registered name, or of a path: a file that ends in `.npz`, or a folder of images."""
    if name.endswith(".npz"):
        return npz_source(Path(name).expanduser())
    if name not in registry.datasets.entries and Path(name).expanduser().is_dir():
        return folder_source(Path(name).expanduser())
    source = registry.datasets.load(name)
    if not isinstance(source, Source):
        raise BadInput(f"data set {name!r} is a {type(source).__name__}; its entry point must be a rush_bench.datasets.Source")
    return source


def choose_positions(
    part: Part, labels: np.ndarray | None, split: str, n: int | None, seed: int, stand_ins: bool
) -> np.ndarray:
    """Positions in the part, int64 (n,): the whole split in ascending order, or its subset of n in rank order."""
    count = len(part.pixels)
    positions = np.arange(count)
    if split == "test" and not stand_ins:
        positions = np.setdiff1d(positions, part.stand_ins)
    elif labels is not None and split not in ("test", "transfer"):
        training, validation = hold_out(labels, part.stand_ins)
        positions = validation if split == "val" else training
    if n is None:
        return positions
    if not 1 <= n <= len(positions):
        raise BadInput(
            f"{n} images asked for, but {part.origin} has {len(positions)} for {split!r}; ask for 1 to {len(positions)}"
        )
    return ranked(labels, count, seed, leave_out=np.setdiff1d(np.arange(count), positions))[:n]


def _convert(pixels: np.ndarray, positions: np.ndarray, side: tuple[int, ...] | None) -> torch.Tensor:
    """Rows of (N, C, H, W) as a contiguous uint8 tensor, resized where `side`, (H, W), is another; works in chunks."""
    channels, height, width = pixels.shape[1:]
    side = side or (height, width)
    result = torch.empty(len(positions), channels, *side, dtype=torch.uint8)
    for start in range(0, len(positions), CHUNK):
        chunk = torch.from_numpy(np.ascontiguousarray(pixels[positions[start : start + CHUNK]]))
        if side != (height, width):
            resized = torch.nn.functional.interpolate(chunk.float(), side, mode="bilinear", antialias=True)
            chunk = resized.round_().clamp_(0, 255)
        result[start : start + CHUNK] = chunk
    return result
