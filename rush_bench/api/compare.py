"""`rush_bench.compare`: two defences on the images that both were measured on."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rush_bench.api.table import Results, cells_of, trainings_of
from rush_bench.errors import BadInput, unknown_name
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, paired_difference
from rush_bench.registry import datasets
from rush_bench.report import columns as columns_of
from rush_bench.report.layout import DASH, drop_columns, header
from rush_bench.report.rows import threat_text
from rush_bench.report.settle import percent
from rush_bench.report.table import Table, text_table
from rush_bench.report.trainings import Training, Trainings
from rush_bench.report.trainings import terms as measured_alike

Terms = tuple[Any, ...]
# what two cells agree in to be compared; the same attack may have other settings on a defence without noise
TERMS = ("dataset", "split", "attack", "suite", "norm", "eps")
PAIRED = "A less B in points, paired by image, with a 95 % interval of Student's t over the images that both have."
MEANS = (
    "Means over trainings that differ in their seed alone, ± the standard deviation over them; of a difference, over pairs of "
    "one training each. Intervals are over images and draws, for these trainings."
)


def compare(
    first: str, second: str, results: Results = "results", *, seeds: bool = False, store: Path | str | None = None
) -> Table:
    """The accuracy of one defence less that of another, by attack, paired by image.

    Args:
        first: name of a defence as tables show it: `rush-cifar10@64`.
        second: name of the other.
        results: a results folder or pack, several, or cells (`load_results`).
        seeds: each of the two stands for all trainings that differ from it in the seed alone and were measured alike: the
            difference is that of their means.
        store: folder of the models, whose cards say which those are (None: models; packs have cards of their own).

    Returns:
        A table, a row per attack of the same suite that both have finished, on the images that both have: accuracies of
        both and their difference in percent, with `difference_low` and `difference_high`, the ends of its 95 % interval. With
        `seeds` also their numbers, `first_trainings` and `second_trainings`, and the standard deviations over them, `first_sd`,
        `second_sd` and `difference_sd`, the root of the sum of their squares (NaN where there is one training).

    Raises:
        BadInput: a name that no finished cell has, no attack and image that both have; `seeds` where neither has several, where
            a seed was trained twice, or where both are of one system; `store` without `seeds`.

    Source: paired differences are protocol 2 (`rush-bench docs protocol`).

    Examples:
        >>> import rush_bench as rb
        >>> rb.compare("linear", "linear", measured).frame["difference"].tolist()
        [0.0, 0.0, 0.0]
    """
    if store is not None and not seeds:
        raise BadInput("store would have no effect: only the comparison over seeds reads cards")
    store = store or "models"
    found, folders = cells_of(results)
    cells = [cell for cell in found if cell.complete and "correct" in cell.arrays]
    known = list(dict.fromkeys(str(cell.labels["defense"]) for cell in cells))
    for name in (first, second):
        if name not in known:
            raise unknown_name("defence with finished cells", name, known)
    sides = [{_terms(cell): [cell] for cell in _of(cells, name)} for name in (first, second)]
    if seeds:
        trainings = trainings_of(cells, store, folders)
        sides = [_with_seeds(side, cells, trainings) for side in sides]
        if any({id(cell) for cell in sides[0].get(terms, [])} & set(map(id, cells)) for terms, cells in sides[1].items()):
            raise BadInput(f"{first} and {second} are trainings of one system: with seeds each would be compared with itself")
        if not any(len(trained) > 1 for side in sides for trained in side.values()):
            raise BadInput(
                f"no other seed of {first} or {second} was measured alike, as far as the cards of {store} tell: attack one, "
                "name the store of their models, or leave seeds out"
            )
    shared = sorted(sides[0].keys() & sides[1].keys(), key=_order)
    rows = [row for terms in shared if (row := _row(terms, sides[0][terms], sides[1][terms]))]
    if not rows:
        raise BadInput(f"{first} and {second} share no finished attack on the same images: run the same suite on both")
    words = [_words(row) if seeds else _words(row)[:-1] for row in rows]
    frame = pd.DataFrame(rows)
    columns = ["dataset", "threat", "suite", "Attack", first, second, "Difference", "n", "Trainings"]
    if not seeds:
        columns.pop()
        frame = frame.drop(columns=[name for name in frame if name.endswith(("_sd", "_trainings"))])
    table = text_table(frame, columns, words, f"A: {first}, B: {second}", [PAIRED, *([MEANS] if seeds else [])])
    # on a terminal names stand above the table, and the suite tells the threat
    columns[4:6] = "A", "B"
    table.narrow = drop_columns(replace(table.whole, columns=columns), ("threat",))
    return table


def _of(cells: Sequence[CellResult], name: str) -> list[CellResult]:
    """The cells of a defence, of the same terms that of the most images and predictions last; BadInput for two networks."""
    found = [cell for cell in cells if cell.labels["defense"] == name]
    if len({cell.identity["weights"] for cell in found}) > 1:
        raise BadInput(f"{name} is the name of several networks there; compare the cells of one: compare(a, b, cells)")
    return sorted(found, key=lambda cell: (cell.labels["n"], cell.identity["repeats"]))


def _terms(cell: CellResult) -> Terms:
    """What it shares with the cell of the other defence; clean images are the same under every threat and suite."""
    attacked = cell.labels["attack"] != "clean"
    return tuple(cell.labels.get(key) if attacked or key in TERMS[:3] else None for key in TERMS)


def _order(terms: Terms) -> Terms:
    """By data set, threat and suite, attacks as the columns of a table."""
    dataset, split, attack, suite, norm, eps = terms
    place = [column.name for column in columns_of.plain([attack])].index(attack)
    return str(dataset), str(split), str(norm or ""), eps or 0.0, str(suite or ""), place, attack


def _with_seeds(
    side: dict[Terms, list[CellResult]], cells: Sequence[CellResult], trainings: Trainings
) -> dict[Terms, list[CellResult]]:
    """Each cell with those of trainings that differ from its own in the seed alone; BadInput where a seed was trained twice."""

    def training(cell: CellResult) -> Training | None:
        return trainings.get((str(cell.labels.get("sha256")), str(cell.labels.get("recipe"))))

    groups: dict[tuple[Any, ...], dict[str, CellResult]] = defaultdict(dict)
    for cell in cells:
        if trained := training(cell):
            groups[trained.system, _terms(cell), measured_alike(cell)][cell.identity["weights"]] = cell
    found = {}
    for terms, (cell,) in side.items():
        trained = training(cell)
        found[terms] = list(groups[trained.system, terms, measured_alike(cell)].values()) if trained else [cell]
        seeds = [other.seed for cell in found[terms] if (other := training(cell))]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(str(cell.labels["defense"]) for cell in found[terms])
            raise BadInput(f"{names}: a seed was trained twice; give the cells of one of each: compare(a, b, cells)")
    return found


def _row(terms: Terms, first: Sequence[CellResult], second: Sequence[CellResult]) -> dict[str, Any] | None:
    """Each side: a cell, or one a training."""
    a, b = first[0], second[0]
    same = a.identity["images"] == b.identity["images"]
    if not same and a.labels["dataset"] not in datasets.entries:  # only there a position names an image for ever
        return None
    both = [cell.frame.set_index("index") for cell in (*first, *second)]
    shared = both[0].index.intersection(both[-1].index, sort=False)
    if shared.empty:
        return None
    both = [frame.loc[shared] for frame in both]
    if (both[0]["label"] != both[-1]["label"]).any():
        raise BadInput(f"{a.folder} and {b.folder} have other labels for the same images: they are of two data sets")
    numbers: dict[str, Any] = {"n": len(shared)}
    counts, spreads = [], []
    for name, frames in (("first", both[: len(first)]), ("second", both[len(first) :])):
        correct, repeats = (sum(frame[part].to_numpy() for frame in frames) for part in ("correct", "repeats"))
        counts += [correct, repeats]
        rates = [100 * float(np.mean(frame["correct"].to_numpy() / frame["repeats"].to_numpy())) for frame in frames]
        spreads.append(float(np.std(rates, ddof=1)) if len(rates) > 1 else math.nan)
        numbers |= {name: float(np.mean(rates)), f"{name}_sd": spreads[-1], f"{name}_trainings": len(frames)}
    parts = ("difference", "difference_low", "difference_high")
    numbers |= {part: 100 * value for part, value in zip(parts, paired_difference(*counts), strict=True)}
    about = {key: value for key, value in zip(TERMS, terms, strict=True) if key != "split"}
    return about | numbers | {"difference_sd": math.hypot(*spreads)}


def _words(row: dict[str, Any]) -> list[str]:
    difference = Estimate(*(row[part] / 100 for part in ("difference", "difference_low", "difference_high")))
    threat = "none" if row["eps"] is None else threat_text(row["norm"], row["eps"])
    sides = [f"{row[side]:.1f}" + _spread(row, side) for side in ("first", "second")]
    change, _, ends = percent(difference, signed=True).partition(" ")
    trainings = f"{row['first_trainings']}, {row['second_trainings']}"
    words = [row["dataset"], threat, row["suite"] or DASH, header(row["attack"])]
    return [*words, *sides, f"{change}{_spread(row, 'difference')} {ends}", str(row["n"]), trainings]


def _spread(row: dict[str, Any], name: str) -> str:
    sd = row[f"{name}_sd"]
    return "" if math.isnan(sd) else f" ± {sd:.1f}"
