"""Whether a data set lies on this machine already: asking for it otherwise starts a download."""

import os
from pathlib import Path

# Any one of these in the data folder will do.
PLACES = {
    "cifar10": ("cifar10.npz", "cifar-10-batches-py"),
    "cifar100": ("cifar100.npz", "cifar-100-python"),
    "stl10": ("stl10_binary",),
}


def data_folder(data_dir: str | Path | None = None) -> Path:
    """The folder that is meant: this one, else the environment's RUSH_BENCH_DATA, else `data`."""
    return Path(data_dir or os.environ.get("RUSH_BENCH_DATA") or "data").expanduser()


def found(name: str, folder: Path) -> Path | None:
    """The file or folder of a data set that is downloaded when absent; None where it is absent."""
    return next((folder / file for file in PLACES[name] if (folder / file).exists()), None)


def on_disk(name: str, folder: Path) -> bool:
    """Whether images of this data set can be read without a network; plug-ins and files of the user's own count as there."""
    return name not in PLACES or found(name, folder) is not None
