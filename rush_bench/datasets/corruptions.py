"""CIFAR-10-C and CIFAR-100-C from their official files (Hendrycks and Dietterich 2019): corrupted CIFAR test images.

`<data folder>/CIFAR-10-C/<corruption>.npy` holds uint8 (50000, 32, 32, 3): the 10,000 test images, in their order, at
severity 1, then at 2, up to 5. `labels.npy` beside it holds the 50,000 labels. Nothing is downloaded.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from rush_bench.datasets.images import Images, check_labels
from rush_bench.datasets.splits import ranked
from rush_bench.errors import BadInput, unknown_name

SEVERITIES = (1, 2, 3, 4, 5)
USUAL = (  # the 15 of the paper, which means and mCE are usually taken over
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # meant for validation; ACL reports all 19
ALL = USUAL + EXTRA
# data set -> (folder, number of classes, where its archive is)
SETS = {
    "cifar10": ("CIFAR-10-C", 10, "https://zenodo.org/record/2535967"),
    "cifar100": ("CIFAR-100-C", 100, "https://zenodo.org/record/3555552"),
}
PIXELS = (32, 32, 3)


@dataclass(frozen=True, eq=False)
class CorruptedImages:
    """The corruptions of one data set; every (corruption, severity) gives the same test images, in the same order.

    rows: int64 (n,), positions in the official test set. Pixels are read where they are asked for.
    """

    dataset: str
    folder: Path
    corruptions: tuple[str, ...]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,), of the whole test set."""
        return _read_labels(self.folder / "labels.npy", self.dataset)

    def images(self, corruption: str, severity: int) -> Images:
        """One corruption at one severity; `index` is the position in the test set, so images pair across cells."""
        if corruption not in self.corruptions:
            raise unknown_name("corruption", corruption, self.corruptions)
        if severity not in SEVERITIES:
            raise BadInput(f"severity {severity} must be one of {', '.join(map(str, SEVERITIES))}")
        count = len(self.labels)
        pixels = _open(self.folder / f"{corruption}.npy", self.dataset, len(SEVERITIES) * count)
        chosen = pixels[(severity - 1) * count + self.positions]
        return Images(
            pixels=torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2))),
            labels=torch.from_numpy(self.labels[self.positions]),
            index=torch.from_numpy(self.positions),
            classes=tuple(map(str, range(SETS[self.dataset][1]))),  # the files hold no names
            name=self.dataset,
            split=f"{corruption}-{severity}",
        )


def load_corrupted(
    dataset: str,
    corruptions: tuple[str, ...] = USUAL,
    n: int | None = None,
    *,
    seed: int = 0,
    data_dir: str | Path | None = None,
) -> CorruptedImages:
    """Corrupted test images of `cifar10` or `cifar100`; all files are checked here, their pixels are read later.

    n: that many images of each corruption and severity, a stratified subset fixed by `seed` (None: all, in the official
    order). It is the subset that `load_dataset(dataset, "test", n, seed=seed)` takes where no image is a stand-in.
    data_dir: folder that holds `CIFAR-10-C`; default the environment's RUSH_BENCH_DATA, else `data`.

    Raises BadInput for another data set, an unknown corruption, a missing, cut or foreign file, or n beyond what there is.
    """
    if dataset not in SETS:
        raise BadInput(f"there are no corruptions of {dataset!r}; choose {' or '.join(SETS)}")
    for corruption in corruptions:
        if corruption not in ALL:
            raise unknown_name("corruption", corruption, ALL)
    folder = Path(data_dir or os.environ.get("RUSH_BENCH_DATA") or "data").expanduser() / SETS[dataset][0]
    labels = _read_labels(folder / "labels.npy", dataset)
    for corruption in corruptions:
        _open(folder / f"{corruption}.npy", dataset, len(SEVERITIES) * len(labels))
    if n is not None and not 1 <= n <= len(labels):
        raise BadInput(f"{n} images asked for, but {folder} has {len(labels)} a severity; ask for 1 to {len(labels)}")
    positions = np.arange(len(labels)) if n is None else ranked(labels, len(labels), seed)[:n]
    return CorruptedImages(dataset, folder, tuple(corruptions), positions)


def _read_labels(path: Path, dataset: str) -> np.ndarray:
    """Labels (N,) of the test set: the file repeats them for each severity."""
    labels = _load(path, dataset)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % len(SEVERITIES):
        raise BadInput(
            f"{path} holds {labels.dtype} of shape {labels.shape}; the official file has one integer per image, five times "
            f"as many as the test set; {_fix(dataset)}"
        )
    blocks = np.asarray(labels).reshape(len(SEVERITIES), -1)
    if not (blocks == blocks[0]).all():
        raise BadInput(f"{path} has other labels at one severity than at another; {_fix(dataset)}")
    names = tuple(map(str, range(SETS[dataset][1])))
    return check_labels(blocks[0], blocks.shape[1], names, str(path))


def _open(path: Path, dataset: str, count: int) -> np.ndarray:
    """A memory map of one corruption: uint8 (count, 32, 32, 3)."""
    pixels = _load(path, dataset)
    if pixels.dtype != np.uint8 or pixels.shape != (count, *PIXELS):
        raise BadInput(
            f"{path} holds {pixels.dtype} {pixels.shape}, not uint8 {(count, *PIXELS)} as its labels.npy asks; {_fix(dataset)}"
        )
    return pixels


def _load(path: Path, dataset: str) -> np.ndarray:
    if not path.is_file():
        raise BadInput(f"no file {path}; {_fix(dataset)}, or name the folder with --data-dir or RUSH_BENCH_DATA")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):  # an .npz under another name
            raise ValueError("it is an archive, not one array")
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} cannot be read ({error}): it was cut or is another kind of file; {_fix(dataset)}") from error
    return array


def _fix(dataset: str) -> str:
    name, _, address = SETS[dataset]
    return f"unpack {name}.tar from {address} into the data folder, so that it holds {name}/labels.npy and {name}/fog.npy"
