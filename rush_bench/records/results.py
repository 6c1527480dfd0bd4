"""Cells as found on disk: their arrays, and what was made of them before where nothing has changed."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rush_bench.errors import BadInput
from rush_bench.files import digest
from rush_bench.records.cells import Cell, read_description
from rush_bench.records.chunks import ABOUT, SCALARS, Arrays, chunk_path, done_chunks, read_chunk, rows_digest
from rush_bench.records.index import Index
from rush_bench.records.same import Seen


@dataclass(frozen=True)
class CellResult:
    """A cell as found on disk, under one set of labels."""

    identity: dict[str, Any]
    labels: dict[str, Any]
    folder: Path
    chunks: int
    chunks_done: int
    # images, by digest and number, of the results read together: index and label of each row, -1 where that is not known yet
    rows: dict[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)
    # the same of whole cells, as a digest: those that were read, or that an index remembers
    digests: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)
    labelled: str = field(default="", repr=False, compare=False)  # a digest of the labels
    index: Index | None = field(default=None, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there; a table uses no other cell."""
        return self.chunks_done == self.chunks

    @property
    def arrays(self) -> Arrays:
        """The arrays (n,) of the chunks done, and `counts` (n, classes); NaN where a chunk does not have what others do.

        BadInput on a chunk that is damaged or another cell's, or that is of other images than the cells read with it.
        """
        return self._read[0]

    @property
    def made_on(self) -> list[str]:
        """What its chunks were made on (device, torch, precision), each once; chunks that do not say are left out."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[Arrays, list[str]]:
        cell = Cell(self.identity, self.labels)
        parts = []
        for c in done_chunks(cell, self.folder):
            parts.append(read_chunk(cell, chunk_path(self.folder, c), c))
            self._agree(cell, c, parts[-1])
        if not parts:
            return {name: np.zeros(0) for name in SCALARS} | {"counts": np.zeros((0, 0), np.int64)}, []
        if len({part["counts"].shape[1] for part in parts}) > 1:
            raise BadInput(f"{self.folder} has chunks of other classes than the rest; delete it and run the same command again")
        names = dict.fromkeys(name for part in parts for name in part if name not in ABOUT)
        found = {
            name: np.concatenate([part[name] if name in part else np.full(len(part["index"]), np.nan) for part in parts])
            for name in names
        }
        if len(np.unique(found["index"])) < len(found["index"]):
            raise BadInput(f"{self.folder} holds an image twice; delete the folder and run the same command again")
        return found, sorted({str(part["made_on"]) for part in parts if "made_on" in part})

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row per image of the chunks done: the arrays, counts as `count_<class>`; errors as of `arrays`."""
        columns = {name: array for name, array in self.arrays.items() if name != "counts"}
        return pd.DataFrame(columns | {f"count_{k}": column for k, column in enumerate(self.arrays["counts"].T)})

    def remembered(self, make: Callable[["CellResult"], Any]) -> Any:
        """`make(self)`, JSON-able; or what it gave before, where an index knows that nothing has changed."""
        name = f"{make.__module__}.{make.__qualname__} {self.labelled}"
        made = self.index.now.get(self.folder.name, {}).get("made", {}) if self.index else {}
        if name not in made:
            found = json.loads(json.dumps(make(self)))
            made[name] = [found, self._rows_digest if self.complete else None]
            if self.index:
                self.index.changed = True
        found, rows = made[name]
        if rows and self.digests.setdefault((self.identity["images"], self.labels["n"]), rows) != rows:
            raise self._of_others(self.folder)
        return found

    @cached_property
    def _rows_digest(self) -> str:
        return rows_digest(self.arrays)

    def _agree(self, cell: Cell, chunk: int, arrays: Arrays) -> None:
        """Cells of the same images have the same image, of the same label, in a row."""
        n, rows = cell.labels["n"], np.array(cell.rows(chunk))
        if (key := (self.identity["images"], n)) not in self.rows:
            self.rows[key] = np.full((n, 2), -1)
        known = self.rows[key]
        mine = np.stack([arrays["index"], arrays["label"]], axis=1)
        if not np.all((known[rows] == mine) | (known[rows] < 0)):
            raise self._of_others(chunk_path(self.folder, chunk))
        known[rows] = mine

    def _of_others(self, path: Path) -> BadInput:
        return BadInput(
            f"{path} is of other images or labels than cells of the same data set beside it: it was copied or changed; "
            "delete it and run the same command again"
        )


def load_results(*results: Path, warn: Callable[[str], None] | None = None) -> list[CellResult]:
    """Every cell under `<results>/runs` of each folder, sorted, one entry per set of labels; chunks are read at `.frame`.

    A folder that holds no cell of ours (half-written, foreign, another format) is left out; `warn` gets a line that
    says so (default: to stderr). A cell that is in several folders is taken once, where it has the most chunks, of equals in
    the first; BadInput where they hold what cannot be one measurement (see `rush_bench.records.same`), and a line where they
    differ by what rounding does.
    """
    warn = warn or (lambda text: print(text, file=sys.stderr))
    found: dict[tuple[str, str], CellResult] = {}
    shared: dict[str, Any] = {"rows": {}, "digests": {}}
    seen = Seen()
    for runs in [Path(each) / "runs" for each in results]:
        index = Index(runs)
        for name in sorted(each.name for each in os.scandir(runs) if each.is_dir()) if runs.is_dir() else ():
            folder = runs / name
            try:
                entry = index.entry(folder, _look)
                cells = [Cell(entry["identity"], each) for each in entry["labels"]]
            except (BadInput, ValueError, TypeError, KeyError, OSError) as error:
                warn(f"left out {folder}: {error}")
                continue
            if len(results) > 1:
                seen.meet(name, cells[0], folder, runs.parent)
            for cell, labelled in zip(cells, entry["labelled"], strict=True):
                more = {**shared, "labelled": labelled, "index": index}
                mine = CellResult(cell.identity, cell.labels, folder, cell.chunks, entry["done"], **more)
                if mine.chunks_done > found.setdefault((name, labelled), mine).chunks_done:
                    found[name, labelled] = mine
    for line in seen.lines("each is taken from where it has more chunks, or else from the first"):
        warn(line)
    return list(found.values())


def save_indexes(results: Iterable[CellResult]) -> None:
    """Keep what was made of these results where a later table finds it (see `rush_bench.records.index`)."""
    for index in {result.index for result in results}:
        if index is not None:
            index.save()


def _look(folder: Path) -> dict[str, Any]:
    """What a cell's folder holds; BadInput, ValueError, ... where it is none of ours."""
    identity, labels = read_description(folder / "cell.json")
    cell = next(Cell(identity, each) for each in labels)
    if cell.key[:16] != folder.name:
        raise BadInput("its name does not match its identity: renamed or changed")
    done = len(done_chunks(cell, folder))
    return {"identity": identity, "labels": labels, "labelled": [digest(each) for each in labels], "done": done}
