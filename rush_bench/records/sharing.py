"""Cells that any number of processes work on at once: who takes which chunk, and how it is written."""

import contextlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rush_bench.errors import BadInput
from rush_bench.files import flock, release, write_atomic, write_json
from rush_bench.records.cells import Cell, description, read_description
from rush_bench.records.chunks import (
    ABOUT,
    Arrays,
    adversarial_path,
    check_chunk,
    chunk_path,
    done_chunks,
    is_done,
    place,
    read_chunk,
)
from rush_bench.records.results import CellResult

STATED = ("recipe", "protocol", "extra_data", "architecture", "pretrain_dataset")  # of a model, in words, by who measures it


class CellStore:
    """Cells under a results folder. Any number of processes may work on it at once."""

    def __init__(self, results: Path) -> None:
        self.runs = Path(results) / "runs"

    def folder(self, cell: Cell) -> Path:
        """The cell's folder."""
        return self.runs / cell.key[:16]

    def open(self, cell: Cell) -> None:
        """Write cell.json where it is missing; a cell met again under other labels (suite, name) gains them.

        Of labels that differ in what is stated of the model alone the last ones count.
        """
        path = self.folder(cell) / "cell.json"
        for left in path.parent.glob("*.lock"):
            release(left)
        if self.labelled(cell):
            return
        with flock(path.with_suffix(".lock"), wait=True):
            labels = read_description(path)[1] if path.exists() else []
            if (mine := _as_read_back(cell.labels)) not in labels:
                kept = [other for other in labels if _measured(other) != _measured(mine)]
                write_json(path, description(cell, [*kept, mine]))

    def labelled(self, cell: Cell) -> bool:
        """Whether the cell is there under these labels, be it finished or not."""
        path = self.folder(cell) / "cell.json"
        return path.exists() and _as_read_back(cell.labels) in read_description(path)[1]

    def has(self, cell: Cell, chunk: int) -> bool:
        """Whether a chunk is done: it is there, and the x' beside it is its own."""
        return is_done(self.folder(cell), chunk)

    def write(self, cell: Cell, chunk: int, arrays: Arrays, adversarial: NDArray[np.float32] | None = None) -> None:
        """Write a chunk: SCALARS (n,), counts (n, classes), BANK and others (n,) if any; x' (n, C, H, W) float32."""
        check_chunk(cell, chunk, arrays)
        stored: dict[str, Any] = {**arrays, "cell": np.asarray(place(cell, chunk))}
        if adversarial is not None:
            if adversarial.dtype != np.float32 or adversarial.ndim != 4 or len(adversarial) != len(cell.rows(chunk)):
                raise ValueError(f"x' must be float32 (n, C, H, W), not {adversarial.dtype} {adversarial.shape}")
            file = io.BytesIO()
            np.save(file, np.ascontiguousarray(adversarial))
            content = file.getvalue()
            stored["adversarial_crc"] = np.asarray(zlib.crc32(content), np.int64)  # npz has its own, npy none
            write_atomic(adversarial_path(self.folder(cell), chunk), lambda path: path.write_bytes(content))
        write_atomic(chunk_path(self.folder(cell), chunk), lambda path: np.savez_compressed(path, **stored))

    def read(self, cell: Cell, chunk: int) -> Arrays:
        """The arrays of a chunk; damaged ones are a BadInput that names the file."""
        arrays = read_chunk(cell, chunk_path(self.folder(cell), chunk), chunk)
        return {name: array for name, array in arrays.items() if name not in ABOUT}

    def read_adversarial(self, cell: Cell, chunk: int) -> NDArray[np.float32]:
        """The stored x' of a chunk (n, C, H, W), checked against the checksum in the chunk's file."""
        counted, path = (make(self.folder(cell), chunk) for make in (chunk_path, adversarial_path))
        crc = read_chunk(cell, counted, chunk).get("adversarial_crc")
        try:
            content = path.read_bytes()
        except OSError as error:
            fix = f"delete {counted.name} beside it, then run the same command again"
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
        return CellResult(cell.identity, cell.labels, folder, cell.chunks, len(done_chunks(cell, folder)))


def _as_read_back(labels: dict[str, Any]) -> dict[str, Any]:
    """Labels as JSON has them: tuples are lists."""
    return dict(json.loads(json.dumps(labels)))


def _measured(labels: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in labels.items() if key not in STATED}
