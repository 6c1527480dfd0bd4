"""`rush_bench.compare`: two defences on the images that both were measured on."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rush_bench.api.table import Results, cells_of
from rush_bench.errors import BadInput, unknown_name
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, paired_difference
from rush_bench.registry import datasets
from rush_bench.report import columns as columns_of
from rush_bench.report.layout import DASH, header
from rush_bench.report.rows import threat_text
from rush_bench.report.settle import percent
from rush_bench.report.table import Table, text_table

# what two cells agree in to be compared; the same attack may have other settings on a defence without noise
TERMS = ("dataset", "split", "attack", "suite", "norm", "eps")
PAIRED = "A less B in points, paired by image, with a 95 % interval of Student's t over the images that both have."


def compare(first: str, second: str, results: Results = "results") -> Table:
    """The accuracy of one defence less that of another, by attack, paired by image.

    Args:
        first: name of a defence as tables show it: `rush-cifar10@64`.
        second: name of the other.
        results: a results folder or pack, several, or cells (`load_results`).

    Returns:
        A table, a row per attack of the same suite that both have finished, on the images that both have: accuracies of
        both and their difference in percent, with `difference_low` and `difference_high`, the ends of its 95 % interval.

    Raises:
        BadInput: a name that no finished cell has, or no attack and image that both have.

    Source: paired differences are protocol 2 (`rush-bench docs protocol`).

    Examples:
        >>> import rush_bench as rb
        >>> rb.compare("linear", "linear", measured).frame["difference"].tolist()
        [0.0, 0.0, 0.0]
    """
    cells = [cell for cell in cells_of(results)[0] if cell.complete and "correct" in cell.arrays]
    known = list(dict.fromkeys(str(cell.labels["defense"]) for cell in cells))
    for name in (first, second):
        if name not in known:
            raise unknown_name("defence with finished cells", name, known)
    first_cells, second_cells = ({_terms(cell): cell for cell in _of(cells, name)} for name in (first, second))
    shared = sorted(first_cells.keys() & second_cells.keys(), key=_order)
    rows = [row for terms in shared if (row := _row(terms, first_cells[terms], second_cells[terms]))]
    if not rows:
        raise BadInput(f"{first} and {second} share no finished attack on the same images: run the same suite on both")
    heads = ["Data set", "Threat", "Suite", "Attack", first, second, "Difference", "n"]
    return text_table(pd.DataFrame(rows), heads, [_words(row) for row in rows], f"{first} less {second}", [PAIRED])


def _of(cells: Sequence[CellResult], name: str) -> list[CellResult]:
    """The cells of a defence, of the same terms that of the most images and predictions last; BadInput for two networks."""
    found = [cell for cell in cells if cell.labels["defense"] == name]
    if len({cell.identity["weights"] for cell in found}) > 1:
        raise BadInput(f"{name} is the name of several networks there; compare the cells of one: compare(a, b, cells)")
    return sorted(found, key=lambda cell: (cell.labels["n"], cell.identity["repeats"]))


def _terms(cell: CellResult) -> tuple[Any, ...]:
    """What it shares with the cell of the other defence; clean images are the same under every threat and suite."""
    attacked = cell.labels["attack"] != "clean"
    return tuple(cell.labels.get(key) if attacked or key in TERMS[:3] else None for key in TERMS)


def _order(terms: tuple[Any, ...]) -> tuple[Any, ...]:
    """By data set, threat and suite, attacks as the columns of a table."""
    dataset, split, attack, suite, norm, eps = terms
    place = [column.name for column in columns_of.plain([attack])].index(attack)
    return str(dataset), str(split), str(norm or ""), eps or 0.0, str(suite or ""), place, attack


def _row(terms: tuple[Any, ...], first: CellResult, second: CellResult) -> dict[str, Any] | None:
    same = first.identity["images"] == second.identity["images"]
    if not same and first.labels["dataset"] not in datasets.entries:  # only there a position names an image for ever
        return None
    both = first.frame.merge(second.frame, on="index", suffixes=("_a", "_b"))
    if both.empty:
        return None
    if (both["label_a"] != both["label_b"]).any():
        raise BadInput(f"{first.folder} and {second.folder} have other labels for the same images: they are of two data sets")
    a, b = ([both[f"{part}_{side}"].to_numpy() for part in ("correct", "repeats")] for side in "ab")
    about = {key: value for key, value in zip(TERMS, terms, strict=True) if key != "split"}
    numbers: dict[str, Any] = {"n": len(both), "first": 100 * float((a[0] / a[1]).mean())}
    numbers["second"] = 100 * float((b[0] / b[1]).mean())
    parts = ("difference", "difference_low", "difference_high")
    found = paired_difference(*a, *b)
    return about | numbers | {part: 100 * value for part, value in zip(parts, found, strict=True)}


def _words(row: dict[str, Any]) -> list[str]:
    difference = Estimate(*(row[part] / 100 for part in ("difference", "difference_low", "difference_high")))
    threat = "none" if row["eps"] is None else threat_text(row["norm"], row["eps"])
    numbers = [f"{row['first']:.1f}", f"{row['second']:.1f}", percent(difference, signed=True), str(row["n"])]
    return [row["dataset"], threat, row["suite"] or DASH, header(row["attack"]), *numbers]
