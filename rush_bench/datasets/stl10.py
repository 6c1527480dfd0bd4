"""STL-10 in its official binary format: `<data folder>/stl10_binary/*.bin`, else torchvision's download (2.6 GB).

`*_X.bin` holds 3 x 96 x 96 bytes per image, each channel column by column; `*_y.bin` one byte per image, 1 to 10.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets.fetch import fetch
from rush_bench.datasets.source import Part, Source
from rush_bench.errors import BadInput

NAMES = {
    "stl10": "STL-10, 3 x 96 x 96 resized to 32 x 32, 5000 train, 8000 test, 100000 unlabelled (used to pre-train)",
}
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
FOLDER = "stl10_binary"
SIDE = 96


def make(name: str) -> Source:
    """STL-10 as a `Source`; 32x32 by default, for RUSH's noise is 32x32 (sources S5.26); size 96 keeps them."""
    return Source(name, _read, size=32)


def _read(part: str, folder: Path) -> Part | None:
    if not (folder / FOLDER).is_dir():
        fetch("stl10", folder, FOLDER, _download, f"the folder {FOLDER} of the official archive stl10_binary.tar.gz")
    stem = "unlabeled" if part == "unlabelled" else part
    path = _file(folder, f"{stem}_X.bin")
    per_image = 3 * SIDE * SIDE
    count, rest = divmod(path.stat().st_size, per_image)
    if rest or not count:
        raise BadInput(f"{path} was cut: {path.stat().st_size} bytes are not whole images of {per_image}; unpack it again")
    # A memmap: the 100,000 unlabelled images are 2.8 GB, of which a subset reads only its own.
    pixels = np.memmap(path, np.uint8, "r", shape=(count, 3, SIDE, SIDE)).transpose(0, 1, 3, 2)
    if part == "unlabelled":
        return Part(pixels, None, CLASSES, str(path))
    label_path = _file(folder, f"{stem}_y.bin")
    labels = np.fromfile(label_path, np.uint8).astype(np.int64) - 1
    if len(labels) != count:
        raise BadInput(f"{label_path} has {len(labels)} labels for {count} images; unpack the archive again")
    return Part(pixels, labels, CLASSES, str(label_path))


def _file(folder: Path, name: str) -> Path:
    path = folder / FOLDER / name
    if not path.is_file():
        raise BadInput(f"{folder / FOLDER} has no {name}; unpack the whole archive, or delete the folder to download it")
    return path


def _download(root: Path) -> Any:
    from torchvision.datasets import STL10

    return STL10(str(root), split="test", download=True)
