"""A data set in one `.npz` file: the user's own, and what `cifar10` and `cifar100` look for first.

Keys: train_images, train_labels, test_images, test_labels (uint8 images, NHWC, NCHW or NHW; integer labels) and
classes (names). Optional: stand_in_train, stand_in_test (positions whose pixels are not the official ones) and
unlabeled_images. A split needs only its own keys.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from rush_bench.datasets.source import Part, Source
from rush_bench.errors import BadInput


def npz_source(path: Path, name: str | None = None) -> Source:
    """The data set in an `.npz` file; its name is the file's stem unless another is given."""
    return Source(name or path.stem, lambda part, folder: read_npz(path, part))


def read_npz(path: Path, part: str) -> Part | None:
    """One part ("train", "test", "unlabelled") of the file; None where it holds no unlabelled images.

    Raises BadInput that names the file when it is missing, cut, of another kind, or lacks a key.
    """
    if not path.is_file():
        raise BadInput(f"no file {path}; give the path of an .npz file with the keys train_images, train_labels, ...")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            keys = ["unlabeled_images"] if part == "unlabelled" else [f"{part}_images", f"{part}_labels"]
            if part == "unlabelled" and keys[0] not in file:
                return None
            missing = [key for key in [*keys, "classes"] if key not in file]
            if missing:
                raise BadInput(f"{path} has no {' and no '.join(missing)} (it has {', '.join(file)}); save it with these keys")
            _check_sizes(handle, [*keys, "classes"])
            stand_ins = file[f"stand_in_{part}"] if f"stand_in_{part}" in file else np.empty(0, np.int64)
            images, *labels = (file[key] for key in keys)
            classes = tuple(str(name) for name in file["classes"].ravel())
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
    ) as error:
        raise BadInput(
            f"{path} cannot be read as .npz ({error}): it was cut, damaged or is another kind of file; "
            "write it again with numpy.savez"
        ) from error
    if stand_ins.dtype.kind not in "iu":
        if stand_ins.size:
            raise BadInput(f"{path}: stand_in_{part} holds {stand_ins.dtype}, not positions; save it as integers")
        stand_ins = stand_ins.astype(np.int64)
    return Part(images, labels[0] if labels else None, classes, str(path), stand_ins.ravel())


def _check_sizes(handle: IO[bytes], keys: list[str]) -> None:
    """ValueError for an array that declares another size than it has: reading it would ask for that much memory first."""
    with zipfile.ZipFile(handle) as file:
        for key in keys:
            info = file.getinfo(f"{key}.npy")
            with file.open(info) as array:
                version = np.lib.format.read_magic(array)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(array)
                declared, held = math.prod(shape) * dtype.itemsize, info.file_size - array.tell()
            if declared != held:
                raise ValueError(f"{key} declares the shape {shape}, {declared} bytes, and holds {held}")
