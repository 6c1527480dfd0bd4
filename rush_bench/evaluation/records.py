"""Records: what an evaluation leaves on disk, and all that a table is made from (protocol 8). No torch is imported.

A cell is one (defence, attack, threat, images, seed). It is worked off in fixed chunks of images, one file a chunk:

    <results>/runs/<first 16 digits of the key>/
        cell.json               the identity, hashed to the key, and labels for people
        chunk-0003.npz          per-image arrays of the chunk's images
        adversarial-0003.npy    the stored x', float32 (n, C, H, W)

A chunk is done when its npz is there (written last, by rename). A kill at any moment loses at most the chunk at work.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rush_bench.errors import BadInput, RushBenchError
from rush_bench.files import digest, read_json, write_atomic, write_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
IDENTITY = ("format", "weights", "defense", "attack", "threat", "images", "seed", "repeats", "chunk")
SCALARS = ("index", "label", "correct", "repeats", "margin", "distance", "forwards", "backwards", "seconds")
BANK = ("bank_correct", "bank_repeats")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Cell:
    """One cell. `identity` is hashed to the key; `labels` is what people read and never enters the key.

    identity, at least: format (FORMAT), weights (digest), defense (its settings: noise, votes, ...), attack (name and
    settings together), threat ({"norm", "eps"}, or None for clean), images (digest), seed, repeats (K), chunk (images
    in a chunk). Cells that agree in all but attack share a row of a table.

    labels, at least: defense ("rush-cifar10@64"), dataset, attack ("clean", "pgd", "eot", "aa", "apgd", "worst"),
    suite, deterministic, n. Besides, where known: model, recipe, votes, pretrain_dataset, protocol, extra_data,
    architecture, preset, budget.
    """

    identity: dict[str, Any]
    labels: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [k for k in IDENTITY if k not in self.identity]
        missing += [k for k in ("defense", "dataset", "attack", "suite", "deterministic", "n") if k not in self.labels]
        if missing:
            raise ValueError(f"a cell lacks {', '.join(missing)}")
        if self.identity["chunk"] < 1 or self.labels["n"] < 1:
            raise ValueError(f"a cell of {self.labels['n']} images in chunks of {self.identity['chunk']}")

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the identity."""
        return digest(self.identity)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return math.ceil(self.labels["n"] / self.identity["chunk"])

    def rows(self, chunk: int) -> range:
        """Rows of the images that a chunk holds."""
        size = self.identity["chunk"]
        return range(self.labels["n"])[chunk * size : (chunk + 1) * size]


@dataclass(frozen=True)
class CellResult:
    """A cell as found on disk, under one set of labels."""

    identity: dict[str, Any]
    labels: dict[str, Any]
    folder: Path
    chunks: int
    chunks_done: int

    @property
    def complete(self) -> bool:
        """Whether every chunk is there; a table uses no other cell."""
        return self.chunks_done == self.chunks

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row per image of the chunks done: the arrays, counts as `count_<class>`. BadInput on a damaged chunk."""
        cell = Cell(self.identity, self.labels)
        parts = [_frame(_read_chunk(cell, path, c)) for c, path in _chunk_files(cell, self.folder)]
        if not parts:
            return pd.DataFrame({name: pd.Series(dtype=float) for name in SCALARS})
        frame = pd.concat(parts, ignore_index=True)
        if frame["index"].duplicated().any():
            raise BadInput(f"{self.folder} holds an image twice; delete the folder and run the same command again")
        return frame


class CellStore:
    """Cells under a results folder. Any number of processes may work on it at once."""

    def __init__(self, results: Path) -> None:
        self.runs = Path(results) / "runs"

    def folder(self, cell: Cell) -> Path:
        """The cell's folder."""
        return self.runs / cell.key[:16]

    def open(self, cell: Cell) -> None:
        """Write cell.json where it is missing; a cell met again under other labels (suite, name) gains them."""
        path = self.folder(cell) / "cell.json"
        mine = json.loads(json.dumps(cell.labels))  # as it reads back: tuples are lists
        if path.exists() and mine in _read_cell(path)[1]:
            return
        with flock(path.with_suffix(".lock"), wait=True):
            labels = _read_cell(path)[1] if path.exists() else []
            if mine not in labels:
                write_json(path, _description(cell, [*labels, mine]))

    def has(self, cell: Cell, chunk: int) -> bool:
        """Whether a chunk is done."""
        return _chunk_path(self.folder(cell), chunk).exists()

    def write(self, cell: Cell, chunk: int, arrays: Arrays, adversarial: NDArray[np.float32] | None = None) -> None:
        """Write a chunk: SCALARS (n,), counts (n, classes), BANK and others (n,) if any; x' (n, C, H, W) float32."""
        _check(cell, chunk, arrays)
        stored: dict[str, Any] = dict(arrays)
        if adversarial is not None:
            if adversarial.dtype != np.float32 or adversarial.ndim != 4 or len(adversarial) != len(cell.rows(chunk)):
                raise ValueError(f"x' must be float32 (n, C, H, W), not {adversarial.dtype} {adversarial.shape}")
            file = io.BytesIO()
            np.save(file, np.ascontiguousarray(adversarial))
            content = file.getvalue()
            stored["adversarial_crc"] = np.asarray(zlib.crc32(content), np.int64)  # npz has its own, npy none
            write_atomic(_adversarial_path(self.folder(cell), chunk), lambda path: _write(path, content))
        write_atomic(_chunk_path(self.folder(cell), chunk), lambda path: np.savez_compressed(path, **stored))

    def read(self, cell: Cell, chunk: int) -> Arrays:
        """The arrays of a chunk; damaged ones are a BadInput that names the file."""
        arrays = _read_chunk(cell, _chunk_path(self.folder(cell), chunk), chunk)
        return {name: array for name, array in arrays.items() if name != "adversarial_crc"}

    def read_adversarial(self, cell: Cell, chunk: int) -> NDArray[np.float32]:
        """The stored x' of a chunk (n, C, H, W), checked against the checksum in the chunk's file."""
        chunk_path, path = (make(self.folder(cell), chunk) for make in (_chunk_path, _adversarial_path))
        crc = _read_chunk(cell, chunk_path, chunk).get("adversarial_crc")
        fix = f"delete it and {chunk_path.name} beside it, then run the same command again"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error}); {fix}") from error
        if crc is None or zlib.crc32(content) != int(crc):
            raise BadInput(f"{path} does not match its checksum: it was cut or changed; {fix}")
        return np.load(io.BytesIO(content), allow_pickle=False)

    @contextlib.contextmanager
    def lock(self, cell: Cell, chunk: int) -> Iterator[bool]:
        """Try to take a chunk: yields whether it is ours. Released on exit and when the process dies.

        Where locks are not supported it yields True: two processes may then do the same work, which harms nothing.
        """
        folder = self.folder(cell)
        with flock(folder / f"chunk-{chunk:04d}.lock", wait=False) as held:
            if held is True:  # what an earlier holder of this chunk left when it was killed while writing
                for left in folder.glob(f".*-{chunk:04d}-*.np?"):
                    left.unlink(missing_ok=True)
            yield held is not False

    def result(self, cell: Cell) -> CellResult:
        """The cell's state on disk, under the labels of `cell`."""
        folder = self.folder(cell)
        return CellResult(cell.identity, cell.labels, folder, cell.chunks, len(_chunk_files(cell, folder)))


def load_results(results: Path, warn: Callable[[str], None] | None = None) -> list[CellResult]:
    """Every cell under `<results>/runs`, sorted by folder, one entry a set of labels; chunks are read at `.frame`.

    A folder that holds no cell of ours (half-written, foreign, another format) is left out; `warn` gets a line that
    says so (default: to stderr).
    """
    warn = warn or (lambda text: print(text, file=sys.stderr))
    runs, found = Path(results) / "runs", []
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []:
        try:
            identity, labels = _read_cell(folder / "cell.json")
            cells = [Cell(identity, each) for each in labels]
            if cells[0].key[:16] != folder.name:
                raise BadInput("its name does not match its identity: renamed or changed")
        except (BadInput, ValueError, TypeError) as error:
            warn(f"left out {folder}: {error}")
            continue
        done = len(_chunk_files(cells[0], folder))
        found += [CellResult(c.identity, c.labels, folder, c.chunks, done) for c in cells]
    return found


def _description(cell: Cell, labels: list[dict[str, Any]]) -> dict[str, Any]:
    return {"format": FORMAT, "key": cell.key, "identity": cell.identity, "labels": labels}


def _read_cell(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise BadInput("it has no cell.json, so it is no record, or only half of one; delete it if it is in the way")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict) or not found.get("labels"):
        raise BadInput(f"{path} is not a description of a cell; delete its folder and run the same command again")
    if found.get("format") != FORMAT:
        raise BadInput(f"{path} has format {found.get('format')}, this version reads {FORMAT}; run the same command again")
    return found["identity"], found["labels"]


def _chunk_path(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:04d}.npz"


def _adversarial_path(folder: Path, chunk: int) -> Path:
    return folder / f"adversarial-{chunk:04d}.npy"


def _chunk_files(cell: Cell, folder: Path) -> list[tuple[int, Path]]:
    return [(c, _chunk_path(folder, c)) for c in range(cell.chunks) if _chunk_path(folder, c).exists()]


def _read_chunk(cell: Cell, path: Path, chunk: int) -> Arrays:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # reading a member to its end checks its CRC
        _check(cell, chunk, arrays)
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise whatever they like
        raise BadInput(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return arrays


def _check(cell: Cell, chunk: int, arrays: Arrays) -> None:
    """ValueError unless the arrays are a chunk's: names, lengths, counts within range."""
    n = len(cell.rows(chunk))
    if n == 0:
        raise ValueError(f"chunk {chunk} of a cell of {cell.chunks}")
    if missing := {*SCALARS, "counts"} - arrays.keys():
        raise ValueError(f"chunk {chunk} has no {', '.join(sorted(missing))}")
    for name, array in arrays.items():
        if name != "adversarial_crc" and (len(array) != n or array.ndim != (2 if name == "counts" else 1)):
            raise ValueError(f"chunk {chunk}: {name} has shape {array.shape}, the chunk {n} images")
    for right, of in (("correct", "repeats"), BANK):
        if right in arrays and not np.all((arrays[right] >= 0) & (arrays[right] <= arrays[of]) & (arrays[of] > 0)):
            raise ValueError(f"chunk {chunk}: {right} is not between 0 and {of}")
    if not np.array_equal(arrays["counts"].sum(axis=1), arrays["repeats"]):
        raise ValueError(f"chunk {chunk}: counts do not add up to repeats")
    if not all(np.isfinite(arrays[name]).all() for name in ("margin", "distance", "seconds")):
        raise ValueError(f"chunk {chunk}: a margin, distance or time is not finite")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _frame(arrays: Arrays) -> pd.DataFrame:
    columns = {name: array for name, array in arrays.items() if name not in ("counts", "adversarial_crc")}
    return pd.DataFrame(columns | {f"count_{k}": column for k, column in enumerate(arrays["counts"].T)})


@contextlib.contextmanager
def flock(path: Path, wait: bool) -> Iterator[bool | None]:
    """An advisory lock on a file that exists while it is held: True held, False another's, None not supported here."""
    if fcntl is None:
        yield None
        return
    held: bool | None = None
    while held is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise RushBenchError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError as error:
            held = False if error.errno in (errno.EAGAIN, errno.EACCES) else None
            if held is None:
                break
        if held and not _is_open_file(path, file):  # its holder let go and removed it while we opened it: again
            file.close()
            held = None
    with file:
        try:
            yield held
        finally:
            if held:
                path.unlink(missing_ok=True)


def _is_open_file(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
