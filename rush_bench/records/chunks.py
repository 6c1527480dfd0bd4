"""A chunk's files: per-image arrays in an npz, x' in an npy beside it; what is read is checked against its cell."""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rush_bench.errors import BadInput
from rush_bench.records.cells import Cell

SCALARS = ("index", "label", "correct", "repeats", "margin", "distance", "forwards", "backwards", "seconds")
BANK = ("bank_correct", "bank_repeats")
# of a chunk's file, not per image; chunks before 2026-11-25 have no `cell`, and none says what it was `made_on`
ABOUT = ("cell", "adversarial_crc", "made_on")
UNATTACKED = ("clean", "corruption", "certify")  # kinds of cells without x'
TOLERANCE = 1e-6  # what the scorer grants an x' beyond eps
Arrays = dict[str, NDArray[Any]]


def place(cell: Cell, chunk: int) -> str:
    """Whose chunk it is: the cell's key and the chunk's number."""
    return f"{cell.key}/{chunk}"


def chunk_path(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:04d}.npz"


def adversarial_path(folder: Path, chunk: int) -> Path:
    return folder / f"adversarial-{chunk:04d}.npy"


def done_chunks(cell: Cell, folder: Path) -> list[int]:
    """The chunks that are done, in order."""
    with os.scandir(folder) if folder.is_dir() else contextlib.nullcontext(()) as files:
        numbers = [file.name[6:-4] for file in files if file.name.startswith("chunk-") and file.name.endswith(".npz")]
    there = sorted(int(number) for number in numbers if number.isdecimal() and number == f"{int(number):04d}")
    return [c for c in there if c < cell.chunks and is_done(folder, c)]


def is_done(folder: Path, chunk: int) -> bool:
    path, beside = chunk_path(folder, chunk), adversarial_path(folder, chunk)
    try:
        stamp = _stamp(path)
        crc = _crc_within(path, stamp) if beside.exists() else None
        return crc is None or crc == _crc_of(beside, _stamp(beside))
    except FileNotFoundError:
        return False


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when a file does."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@cache
def _crc_within(path: Path, stamp: tuple[int, int, int]) -> int | None:
    """The checksum of its x' that a chunk holds; None where it holds none, or is damaged (its reader reports that)."""
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return int(_array(file.read("adversarial_crc.npy")))
    except Exception:
        return None


@cache
def _crc_of(path: Path, stamp: tuple[int, int, int]) -> int:
    return zlib.crc32(path.read_bytes())


def read_chunk(cell: Cell, path: Path, chunk: int) -> Arrays:
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:  # reading a member to its end checks its CRC
            arrays = {name.removesuffix(".npy"): _array(file.read(name)) for name in file.namelist()}
        check_chunk(cell, chunk, arrays)
        _check_whose(cell, chunk, arrays)
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise whatever they like
        raise BadInput(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return arrays


def rows_digest(arrays: Arrays) -> str:
    """Of the images and labels, row by row."""
    return hashlib.sha256(np.stack([arrays["index"], arrays["label"]]).astype("<i8").tobytes()).hexdigest()


def _array(content: bytes) -> NDArray[Any]:
    """A member of an npz, as np.load reads it, which takes most of its time to parse the same headers again and again."""
    if content[6:8] != b"\x01\x00":
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, fortran, dtype = _header(content[:start])
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C").copy()


@cache
def _header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def check_chunk(cell: Cell, chunk: int, arrays: Arrays) -> None:
    """ValueError unless the arrays are a chunk's: names, lengths, counts within range and in agreement."""
    n = len(cell.rows(chunk))
    if n == 0:
        raise ValueError(f"chunk {chunk} of a cell of {cell.chunks}")
    if missing := {*SCALARS, "counts"} - arrays.keys():
        raise ValueError(f"chunk {chunk} has no {', '.join(sorted(missing))}")
    for name, array in arrays.items():
        if name not in ABOUT and (len(array) != n or array.ndim != (2 if name == "counts" else 1)):
            raise ValueError(f"chunk {chunk}: {name} has shape {array.shape}, the chunk {n} images")
    for name in {"label", "correct", "repeats", "counts", *BANK} & arrays.keys():
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"chunk {chunk}: {name} is {arrays[name].dtype}, not whole numbers")
    for right, of in (("correct", "repeats"), BANK):
        if right in arrays and not np.all((arrays[right] >= 0) & (arrays[right] <= arrays[of]) & (arrays[of] > 0)):
            raise ValueError(f"chunk {chunk}: {right} is not between 0 and {of}")
    label, counts = arrays["label"], arrays["counts"]
    if not np.array_equal(counts.sum(axis=1), arrays["repeats"]):
        raise ValueError(f"chunk {chunk}: counts do not add up to repeats")
    if not np.all((label >= 0) & (label < counts.shape[1])):
        raise ValueError(f"chunk {chunk}: a label is none of {counts.shape[1]} classes")
    if not np.array_equal(counts[np.arange(n), label], arrays["correct"]):
        raise ValueError(f"chunk {chunk}: correct is not the count of the label")
    if not all(np.isfinite(arrays[name]).all() for name in ("margin", "distance", "seconds")):
        raise ValueError(f"chunk {chunk}: a margin, distance or time is not finite")


def _check_whose(cell: Cell, chunk: int, arrays: Arrays) -> None:
    """ValueError where a chunk is another cell's, or another place's in its own.

    One that does not say whose it is (ABOUT) is held against what its cell says: K, eps, and whether it has x' at all.
    """
    copied = f"it is not chunk {chunk} of this cell: it was copied from elsewhere"
    if "cell" in arrays:
        if str(arrays["cell"]) != place(cell, chunk):
            raise ValueError(copied)
        return
    attack, threat, repeats = cell.identity["attack"]["name"], cell.identity["threat"], cell.identity["repeats"]
    kind = attack not in UNATTACKED
    most = threat["eps"] + TOLERANCE if kind else 0.0
    same = np.all(arrays["repeats"] <= repeats if attack == "certify" else arrays["repeats"] == repeats)
    if kind != ("adversarial_crc" in arrays) or not same or not np.all(arrays["distance"] <= most):
        raise ValueError(copied)
