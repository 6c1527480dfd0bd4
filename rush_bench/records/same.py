"""Whether two folders that hold one cell hold one measurement.

A key covers weights, settings, images and seed, but neither the code around the weights nor the machine. On another kind of
processor float32 rounds otherwise: a few images at the border of two classes change, in either direction. What goes further
than that was made by other code, or is no record of this cell: nobody can know which of the two is right.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rush_bench.errors import BadInput
from rush_bench.records.cells import Cell
from rush_bench.records.chunks import Arrays, chunk_path, is_done, read_chunk

CHANCE = 1e-4  # of an honest pair of records to be refused: a table may meet hundreds
SLIGHT = 0.005  # a difference of accuracies that is let pass whatever its significance
FLIPPED = 0.05  # of images, without an attack and without draws: more than rounding does to the predictions of one network


@dataclass
class Differences:
    """Cells of two folders whose results are not the same, though they can be one measurement."""

    first: Path
    second: Path
    cells: int = 0
    most: float = 0.0

    def line(self, kept: str) -> str:
        """One line for people, of all cells."""
        cells = f"{self.cells} cell{'s' * (self.cells != 1)} of the same key"
        most = f"accuracies by at most {100 * self.most:.2g} points"
        return f"{self.first} and {self.second} differ in {cells}, as two kinds of processors do ({most}): {kept}"


def compare_cells(cell: Cell, first: Path, second: Path) -> float | None:
    """How far two folders of a cell are apart on the chunks that both have, in accuracy; None where they are the same.

    BadInput where they cannot be one measurement. A damaged chunk is not compared: whoever reads it meets the damage.
    """
    pairs, same = [], 0
    for c in range(cell.chunks):
        one, other = (chunk_path(folder, c) for folder in (first, second))
        if not (one.exists() and other.exists()):
            continue
        if one.read_bytes() == other.read_bytes():  # as of a copy
            same += len(cell.rows(c))
        elif is_done(first, c) and is_done(second, c):
            with contextlib.suppress(BadInput):
                pairs.append((read_chunk(cell, one, c), read_chunk(cell, other, c)))
    if not pairs:
        return None
    certificate = cell.identity["attack"]["name"] == "certify"  # its draws are as many as it took
    for name in ("index", "label", *(() if certificate else ("repeats",))):
        if not all(np.array_equal(a[name], b[name]) for a, b in pairs):
            raise _refusal(cell, first, second, "they are of other images, labels or repeats")
    if any(a["counts"].shape != b["counts"].shape for a, b in pairs):
        raise _refusal(cell, first, second, "they are of other classes")
    if all(np.array_equal(a["counts"], b["counts"]) for a, b in pairs):
        return None
    return _compare(cell, first, second, pairs, same)


def _compare(cell: Cell, first: Path, second: Path, pairs: list[tuple[Arrays, Arrays]], same: int) -> float:
    """See `compare_cells`; `same` are the images of chunks that are the same, which belong to the accuracies."""
    rates = [np.concatenate([pair[k]["correct"] / pair[k]["repeats"] for pair in pairs]) for k in (0, 1)]
    drop, n = rates[0] - rates[1], same + len(rates[0])
    apart = float(abs(drop.sum()) / n)
    if apart > SLIGHT and sign_test(int((drop > 0).sum()), int((drop < 0).sum())) < CHANCE:
        where = f"on {n} images accuracies are {100 * apart:.1f} points apart, beyond chance"
        raise _refusal(cell, first, second, where)
    changed = sum(int((a["counts"] != b["counts"]).any(1).sum()) for a, b in pairs)
    if _exact(cell) and changed > max(1, FLIPPED * n):
        raise _refusal(cell, first, second, f"{changed} of {n} images are predicted otherwise, without an attack")
    return apart


def _exact(cell: Cell) -> bool:
    """Whether rounding alone can change a prediction: neither a search, which goes another way after it, nor draws."""
    return bool(cell.labels["deterministic"]) and cell.identity["attack"]["name"] in ("clean", "corruption")


def sign_test(more: int, fewer: int) -> float:
    """Two-sided p of so many differences of either sign, if both were as likely."""
    from scipy.special import bdtrc  # takes long to load, and few folders differ

    at_least = bdtrc(max(more, fewer) - 1, more + fewer, 0.5) if more + fewer else 1.0
    return min(1.0, 2 * float(at_least))


def _refusal(cell: Cell, first: Path, second: Path, why: str) -> BadInput:
    what = f"{cell.labels['defense']} under {cell.labels['attack']} ({cell.labels['suite']})"
    return BadInput(
        f"{first} and {second} hold different results of {what} under one key: {why}. Code was changed that has no weights, or "
        "a file was; name one of the two results folders alone, or delete this record in the wrong one"
    )


class Seen:
    """The folders in which cells were met so far, and what differs between them."""

    def __init__(self) -> None:
        self.folders: dict[str, list[Path]] = {}
        self.differences: dict[tuple[Path, Path], Differences] = {}

    def meet(self, key: str, cell: Cell, folder: Path, results: Path) -> None:
        """Compare one more folder of a cell with those before it; `results` is where the folder lies.

        BadInput as of `compare_cells`.
        """
        for other in self.folders.setdefault(key, []):
            if folder.samefile(other):
                return
            if (apart := compare_cells(cell, other, folder)) is not None:
                pair = (other.parent.parent, results)
                found = self.differences.setdefault(pair, Differences(*pair))
                found.cells, found.most = found.cells + 1, max(found.most, apart)
        self.folders[key].append(folder)

    def lines(self, kept: str) -> list[str]:
        """A line for each two folders between which something differs."""
        return [each.line(kept) for each in self.differences.values()]
