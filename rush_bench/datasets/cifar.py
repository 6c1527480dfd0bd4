"""CIFAR-10 and CIFAR-100: `<data folder>/<name>.npz`, else torchvision's files, else its download."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets.fetch import fetch
from rush_bench.datasets.npz import read_npz
from rush_bench.datasets.source import Part, Source
from rush_bench.errors import BadInput

NAMES = {
    "cifar10": "CIFAR-10, 3 x 32 x 32, 50000 train and 10000 test, 10 classes; from cifar10.npz or torchvision",
    "cifar100": "CIFAR-100, 3 x 32 x 32, 50000 train and 10000 test, 100 classes; from cifar100.npz or torchvision",
}


def make(name: str) -> Source:
    """CIFAR as a `Source`: `<name>.npz` in the data folder, else torchvision's folder, else torchvision's download."""
    return Source(name, partial(_read, name))


def _read(name: str, part: str, folder: Path) -> Part | None:
    if part == "unlabelled":
        return None
    file = folder / f"{name}.npz"
    if file.is_file():
        return read_npz(file, part)

    from torchvision import datasets

    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    files = folder / kind.base_folder
    if not files.is_dir():
        by_hand = f"{file.name} (keys: see rush_bench.datasets.npz) or torchvision's folder {files.name}"
        fetch(name, folder, files.name, lambda root: kind(root, download=True), by_hand)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the official pickles hold numpy 1 dtypes, of which numpy 2.4 warns
            data = kind(folder, train=part == "train", download=False)
    except RuntimeError as error:
        raise BadInput(f"{files} is incomplete or damaged; delete it to have {name} downloaded again") from error
    return Part(data.data, np.asarray(data.targets, np.int64), tuple(data.classes), str(files))
