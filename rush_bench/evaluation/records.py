"""Records: what an evaluation leaves on disk, and all that a table is made from (protocol 8). No torch is imported.

A cell is one (defence, attack, threat, images, seed). It is worked off in fixed chunks of images, one file a chunk:

    <results>/runs/<first 16 digits of the key>/
        cell.json               the identity, hashed to the key, and labels for people
        chunk-0003.npz          per-image arrays of the chunk's images; whose chunk it is, and the checksum of its x'
        adversarial-0003.npy    the stored x', float32 (n, C, H, W)

A chunk is done when its npz is there (written last, by rename) and the x' beside it, if any, is the one it was counted on:
two processes whose x' differ in a bit leave a chunk that the next run makes again. A kill at any moment loses at most the
chunk at work. Records that were published without their x' are whole: the counts stand on their own.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rush_bench.errors import BadInput
from rush_bench.evaluation.index import Index
from rush_bench.files import digest, flock, read_json, release, write_atomic, write_json

FORMAT = 1
IDENTITY = ("format", "weights", "defense", "attack", "threat", "images", "seed", "repeats", "chunk")
SCALARS = ("index", "label", "correct", "repeats", "margin", "distance", "forwards", "backwards", "seconds")
BANK = ("bank_correct", "bank_repeats")
# of a chunk's file, not per image; chunks before 2026-11-25 have no `cell`, and none says what it was `made_on`
ABOUT = ("cell", "adversarial_crc", "made_on")
UNATTACKED = ("clean", "corruption", "certify")  # kinds of cells without x'
MOST = 10**9  # images, draws: more is no record
TOLERANCE = 1e-6  # what the scorer grants an x' beyond eps
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
        who = self.identity
        for name, value in (("n", self.labels["n"]), ("chunk", who["chunk"]), ("repeats", who["repeats"])):
            if type(value) is not int or not 1 <= value <= MOST:
                raise ValueError(f"a cell with {name} = {value!r}")
        if type(who["seed"]) is not int or not 0 <= who["seed"] < 2**63:
            raise ValueError(f"a cell with seed = {who['seed']!r}")
        if not isinstance(who["attack"], dict) or not isinstance(who["defense"], dict):
            raise ValueError("a cell whose attack or defense is no table of settings")
        if who["threat"] is not None and not (isinstance(who["threat"], dict) and {"norm", "eps"} <= who["threat"].keys()):
            raise ValueError(f"a cell with threat = {who['threat']!r}")

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
    # images, by digest and number, of the results read together: index and label of each row, -1 where no cell has told yet
    rows: dict[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)
    # the same of whole cells, as a digest: those that were read, or that an index remembers
    told: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)
    index: Index | None = field(default=None, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there; a table uses no other cell."""
        return self.chunks_done == self.chunks

    @cached_property
    def arrays(self) -> Arrays:
        """The arrays (n,) of the chunks done, and `counts` (n, classes); NaN where a chunk does not have what others do.

        BadInput on a chunk that is damaged or another cell's, or that is of other images than the cells read with it.
        """
        cell = Cell(self.identity, self.labels)
        parts = []
        for c in _done(cell, self.folder):
            parts.append(_read_chunk(cell, _chunk_path(self.folder, c), c))
            self._agree(cell, c, parts[-1])
        if not parts:
            return {name: np.zeros(0) for name in SCALARS} | {"counts": np.zeros((0, 0), np.int64)}
        if len({part["counts"].shape[1] for part in parts}) > 1:
            raise BadInput(f"{self.folder} has chunks of other classes than the rest; delete it and run the same command again")
        names = dict.fromkeys(name for part in parts for name in part if name not in ABOUT)
        found = {
            name: np.concatenate([part.get(name, np.full(len(part["index"]), np.nan)) for part in parts]) for name in names
        }
        if len(np.unique(found["index"])) < len(found["index"]):
            raise BadInput(f"{self.folder} holds an image twice; delete the folder and run the same command again")
        return found

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row per image of the chunks done: the arrays, counts as `count_<class>`; errors as of `arrays`."""
        columns = {name: array for name, array in self.arrays.items() if name != "counts"}
        return pd.DataFrame(columns | {f"count_{k}": column for k, column in enumerate(self.arrays["counts"].T)})

    def remembered(self, make: Callable[["CellResult"], Any]) -> Any:
        """`make(self)`, JSON-able; or what it gave before, where an index knows that nothing has changed."""
        name = f"{make.__module__}.{make.__qualname__} {self._labelled}"
        made = self.index.now.get(self.folder.name, {}).get("made", {}) if self.index else {}
        if name not in made:
            found = json.loads(json.dumps(make(self)))
            made[name] = [found, _rows_digest(self.arrays) if self.complete else None]
            if self.index:
                self.index.changed = True
        found, rows = made[name]
        if rows and self.told.setdefault((self.identity["images"], self.labels["n"]), rows) != rows:
            raise self._of_others(self.folder)
        return found

    @cached_property
    def _labelled(self) -> str:
        return digest(self.labels)

    def _agree(self, cell: Cell, chunk: int, arrays: Arrays) -> None:
        """Cells of the same images have the same image, of the same label, in a row."""
        n, rows = cell.labels["n"], np.array(cell.rows(chunk))
        known = self.rows.setdefault((self.identity["images"], n), np.full((n, 2), -1))
        mine = np.stack([arrays["index"], arrays["label"]], axis=1)
        if not np.all((known[rows] == mine) | (known[rows] < 0)):
            raise self._of_others(_chunk_path(self.folder, chunk))
        known[rows] = mine

    def _of_others(self, path: Path) -> BadInput:
        return BadInput(
            f"{path} is of other images or labels than cells of the same data set beside it: it was copied or changed; "
            "delete it and run the same command again"
        )


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
        for left in path.parent.glob("*.lock"):
            release(left)
        mine = json.loads(json.dumps(cell.labels))  # as it reads back: tuples are lists
        if path.exists() and mine in _read_cell(path)[1]:
            return
        with flock(path.with_suffix(".lock"), wait=True):
            labels = _read_cell(path)[1] if path.exists() else []
            if mine not in labels:
                write_json(path, _description(cell, [*labels, mine]))

    def has(self, cell: Cell, chunk: int) -> bool:
        """Whether a chunk is done: it is there, and the x' beside it is its own."""
        return _is_done(self.folder(cell), chunk)

    def write(self, cell: Cell, chunk: int, arrays: Arrays, adversarial: NDArray[np.float32] | None = None) -> None:
        """Write a chunk: SCALARS (n,), counts (n, classes), BANK and others (n,) if any; x' (n, C, H, W) float32."""
        _check(cell, chunk, arrays)
        stored: dict[str, Any] = {**arrays, "cell": np.asarray(_place(cell, chunk))}
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
        return {name: array for name, array in arrays.items() if name not in ABOUT}

    def read_adversarial(self, cell: Cell, chunk: int) -> NDArray[np.float32]:
        """The stored x' of a chunk (n, C, H, W), checked against the checksum in the chunk's file."""
        chunk_path, path = (make(self.folder(cell), chunk) for make in (_chunk_path, _adversarial_path))
        crc = _read_chunk(cell, chunk_path, chunk).get("adversarial_crc")
        try:
            content = path.read_bytes()
        except OSError as error:
            fix = f"delete {chunk_path.name} beside it, then run the same command again"
            raise BadInput(f"{path} cannot be read ({error}); {fix}") from error
        if crc is None or zlib.crc32(content) != int(crc):
            raise BadInput(f"{path} does not match its checksum: it was cut or changed; run the same command again")
        return np.load(io.BytesIO(content), allow_pickle=False)

    @contextlib.contextmanager
    def lock(self, cell: Cell, chunk: int) -> Iterator[bool]:
        """Try to take a chunk: yields whether it is ours. Released on exit and when the process dies.

        Where locks are not supported it yields True: two processes may then do the same work, which harms nothing.
        """
        with flock(self.folder(cell) / f"chunk-{chunk:04d}.lock", wait=False) as held:
            yield held is not False

    def result(self, cell: Cell) -> CellResult:
        """The cell's state on disk, under the labels of `cell`."""
        folder = self.folder(cell)
        return CellResult(cell.identity, cell.labels, folder, cell.chunks, len(_done(cell, folder)))


def load_results(*results: Path, warn: Callable[[str], None] | None = None) -> list[CellResult]:
    """Every cell under `<results>/runs` of each folder, sorted, one entry a set of labels; chunks are read at `.frame`.

    A folder that holds no cell of ours (half-written, foreign, another format) is left out; `warn` gets a line that
    says so (default: to stderr). A cell that is in several folders is taken once, where it has the most chunks.
    """
    warn = warn or (lambda text: print(text, file=sys.stderr))
    found: dict[tuple[str, str], CellResult] = {}
    shared: dict[str, Any] = {"rows": {}, "told": {}}
    for runs in [Path(each) / "runs" for each in results]:
        index = Index(runs)
        for folder in sorted(runs.glob("*/")):
            try:
                entry = index.entry(folder, _look)
                cells = [Cell(entry["identity"], each) for each in entry["labels"]]
            except (BadInput, ValueError, TypeError, KeyError, OSError) as error:
                warn(f"left out {folder}: {error}")
                continue
            for cell in cells:
                mine = CellResult(cell.identity, cell.labels, folder, cell.chunks, entry["done"], **shared, index=index)
                name = folder.name, mine._labelled
                if mine.chunks_done > found.setdefault(name, mine).chunks_done:
                    found[name] = mine
    return list(found.values())


def _look(folder: Path) -> dict[str, Any]:
    """What a cell's folder holds; BadInput, ValueError, ... where it is none of ours."""
    identity, labels = _read_cell(folder / "cell.json")
    cell = next(Cell(identity, each) for each in labels)
    if cell.key[:16] != folder.name:
        raise BadInput("its name does not match its identity: renamed or changed")
    return {"identity": identity, "labels": labels, "done": len(_done(cell, folder))}


def _description(cell: Cell, labels: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"format": FORMAT, "key": cell.key, "identity": cell.identity, "labels": labels}
    return said | {"labels_digest": digest(labels)}  # the key covers the identity alone


def _read_cell(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise BadInput("it has no cell.json, so it is no record, or only half of one; delete it if it is in the way")
    found = read_json(path)
    identity, labels = (found.get(part) if isinstance(found, dict) else None for part in ("identity", "labels"))
    plain = isinstance(labels, list) and all(isinstance(about, dict) for about in labels)
    if not labels or not plain or not isinstance(identity, dict):
        raise BadInput(f"{path} is not a description of a cell; delete its folder and run the same command again")
    if found.get("format") != FORMAT:
        raise BadInput(f"{path} has format {found.get('format')}, this version reads {FORMAT}; run the same command again")
    if found.get("labels_digest", digest(labels)) != digest(labels):
        raise BadInput(f"{path} has labels that were changed; delete it and run the same command again")
    for about in labels:
        _check_labels(about)
    return identity, labels


def _check_labels(labels: dict[str, Any]) -> None:
    """ValueError unless what tables read is of the type that they take it for."""
    wanted: dict[str, tuple[type, ...]] = dict.fromkeys(("defense", "dataset", "attack", "suite", "norm", "split"), (str,))
    wanted |= {"n": (int,), "deterministic": (bool,), "eps": (int, float), "votes": (int, type(None)), "classes": (int,)}
    for key, kinds in wanted.items():
        if key in labels and (type(labels[key]) not in kinds or (key == "eps" and not math.isfinite(labels[key]))):
            raise ValueError(f"a cell whose label {key} is {labels[key]!r}")


def _place(cell: Cell, chunk: int) -> str:
    """Whose chunk it is: the cell's key and the chunk's number."""
    return f"{cell.key}/{chunk}"


def _chunk_path(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:04d}.npz"


def _adversarial_path(folder: Path, chunk: int) -> Path:
    return folder / f"adversarial-{chunk:04d}.npy"


def _done(cell: Cell, folder: Path) -> list[int]:
    """The chunks that are done, in order."""
    with os.scandir(folder) if folder.is_dir() else contextlib.nullcontext(()) as files:
        numbers = [file.name[6:-4] for file in files if file.name.startswith("chunk-") and file.name.endswith(".npz")]
    there = sorted(int(number) for number in numbers if number.isdecimal() and number == f"{int(number):04d}")
    return [c for c in there if c < cell.chunks and _is_done(folder, c)]


def _is_done(folder: Path, chunk: int) -> bool:
    path, beside = _chunk_path(folder, chunk), _adversarial_path(folder, chunk)
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
    """The checksum of its x' that a chunk holds; None where it holds none, or is damaged, as who reads it will be told."""
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return int(_array(file.read("adversarial_crc.npy")))
    except Exception:
        return None


@cache
def _crc_of(path: Path, stamp: tuple[int, int, int]) -> int:
    return zlib.crc32(path.read_bytes())


def _read_chunk(cell: Cell, path: Path, chunk: int) -> Arrays:
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:  # reading a member to its end checks its CRC
            arrays = {name.removesuffix(".npy"): _array(file.read(name)) for name in file.namelist()}
        _check(cell, chunk, arrays)
        _check_whose(cell, chunk, arrays)
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise whatever they like
        raise BadInput(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return arrays


def _rows_digest(arrays: Arrays) -> str:
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


def _check(cell: Cell, chunk: int, arrays: Arrays) -> None:
    """ValueError unless the arrays are a chunk's: names, lengths, counts within range and in agreement."""
    n = len(cell.rows(chunk))
    if n == 0:
        raise ValueError(f"chunk {chunk} of a cell of {cell.chunks}")
    if missing := {*SCALARS, "counts"} - arrays.keys():
        raise ValueError(f"chunk {chunk} has no {', '.join(sorted(missing))}")
    for name, array in arrays.items():
        if name not in ABOUT and (len(array) != n or array.ndim != (2 if name == "counts" else 1)):
            raise ValueError(f"chunk {chunk}: {name} has shape {array.shape}, the chunk {n} images")
    for right, of in (("correct", "repeats"), BANK):
        if right in arrays and not np.all((arrays[right] >= 0) & (arrays[right] <= arrays[of]) & (arrays[of] > 0)):
            raise ValueError(f"chunk {chunk}: {right} is not between 0 and {of}")
    label, counts = arrays["label"], arrays["counts"]
    if not np.array_equal(counts.sum(axis=1), arrays["repeats"]):
        raise ValueError(f"chunk {chunk}: counts do not add up to repeats")
    if label.dtype.kind not in "iu" or not np.all((label >= 0) & (label < counts.shape[1])):
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
        if str(arrays["cell"]) != _place(cell, chunk):
            raise ValueError(copied)
        return
    attack, threat, repeats = cell.identity["attack"]["name"], cell.identity["threat"], cell.identity["repeats"]
    kind = attack not in UNATTACKED
    most = threat["eps"] + TOLERANCE if kind else 0.0
    same = np.all(arrays["repeats"] <= repeats if attack == "certify" else arrays["repeats"] == repeats)
    if kind != ("adversarial_crc" in arrays) or not same or not np.all(arrays["distance"] <= most):
        raise ValueError(copied)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
