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
        with path.open("rb") as handle:
            if handle.read(6) == b"\x93NUMPY":
                raise BadInput(f"{path} cannot be read as .npz: it is one array (.npy); write all the keys with numpy.savez")
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            keys = ["unlabeled_images"] if part == "unlabelled" else [f"{part}_images", f"{part}_labels"]
            if part == "unlabelled" and keys[0] not in file:
                return None
            missing = [key for key in [*keys, "classes"] if key not in file]
            if missing:
                raise BadInput(f"{path} has no {' and no '.join(missing)} (it has {', '.join(file)}); save it with these keys")
            marks = f"stand_in_{part}"
            _check_headers(handle, path, [*keys, "classes", *([marks] if marks in file else [])])
            stand_ins = file[marks] if marks in file else np.empty(0, np.int64)
            images, *labels = (file[key] for key in keys)
            names = file["classes"]
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
    if names.ndim == 0:
        raise BadInput(f"{path}: classes is the single value {names}; save the names of the classes, such as ['cat', 'dog']")
    classes = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.ravel())
    return Part(images, labels[0] if labels else None, classes, str(path), _positions(stand_ins, images.shape[:1], part, path))


def _positions(stand_ins: np.ndarray, count: tuple[int, ...], part: str, path: Path) -> np.ndarray:
    """Positions of images, int64 (M,)."""
    if not stand_ins.size:
        return np.empty(0, np.int64)
    if stand_ins.dtype.kind not in "iu":
        raise BadInput(f"{path}: stand_in_{part} holds {stand_ins.dtype}, not positions; save it as integers")
    if count and len(outside := stand_ins[(stand_ins < 0) | (stand_ins >= count[0])]):
        raise BadInput(
            f"{path}: stand_in_{part} holds the position {outside[0]}, and there are {count[0]} images (0 to {count[0] - 1}); "
            "correct it"
        )
    return stand_ins.ravel().astype(np.int64)


def _plain(key: str) -> str:
    """How to save an array that is of dtype object."""
    if key.endswith("_images"):
        return "save it as np.stack([np.asarray(image) for image in images]), all of one shape and type"
    return f"save it as {key}.astype({'str' if key == 'classes' else repr('int64')})"


def _check_headers(handle: IO[bytes], path: Path, keys: list[str]) -> None:
    """BadInput for an array of Python objects, which is never unpickled: it could run anything.

    ValueError for one that declares another size than it has: reading it would ask for that much memory first.
    """
    with zipfile.ZipFile(handle) as file:
        for key in keys:
            info = file.getinfo(f"{key}.npy")
            with file.open(info) as array:
                version = np.lib.format.read_magic(array)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(array)
                if dtype.hasobject:
                    raise BadInput(f"{path}: {key} cannot be read: it is of dtype object, as pandas gives it; {_plain(key)}")
                declared, held = math.prod(shape) * dtype.itemsize, info.file_size - array.tell()
            if declared != held:
                raise ValueError(f"{key} declares the shape {shape}, {declared} bytes, and holds {held}")
