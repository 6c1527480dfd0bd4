"""`rush_bench.compare`: two defences on the images that both were measured on."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rush_bench.api.table import Results, cells_of, trainings_of
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import digest
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, paired_difference
from rush_bench.registry import datasets
from rush_bench.report import columns as columns_of
from rush_bench.report.caveats import copies_caveat, label_caveat, unusual_settings
from rush_bench.report.layout import BOUND, DASH, UPPER, drop_columns, header
from rush_bench.report.rows import attacks_in, threat_text
from rush_bench.report.rows import rows as rows_of
from rush_bench.report.settle import percent
from rush_bench.report.table import Table, text_table
from rush_bench.report.trainings import Trainings, training_named
from rush_bench.report.trainings import terms as measured_alike

Terms = tuple[Any, ...]
# what two cells agree in to be compared; the same attack may have other settings on a defence without noise
TERMS = ("dataset", "split", "attack", "suite", "norm", "eps")
OTHER_PIXELS = (
    "The two have other pixels at the same positions of {}: another size of the images, or another data set of that name."
)
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
        results: a results folder or pack, several, or cells (`load_results`); certificates and experiments of `settle` among
            them are left out.
        seeds: each of the two stands for all trainings that differ from it in the seed alone and were measured alike: the
            difference is that of their means.
        store: folder of the models, whose cards say which those are (None: models; packs have cards of their own).

    Returns:
        A table, a row per attack of the same suite, with settings that differ from the suite's on neither or on both alike,
        that both have finished, on the images that both have (the notes name what is left out): accuracies of
        both and their difference in percent, with `difference_low` and `difference_high`, the ends of its 95 % interval. With
        `seeds` also their numbers, `first_trainings` and `second_trainings`, and the standard deviations over them, `first_sd`,
        `second_sd` and `difference_sd`, the root of the sum of their squares (NaN where there is one training).

    Raises:
        BadInput: a name that no finished cell has, no attack with equal settings on an image that both have; `seeds` where
            neither has several, where a seed was trained twice, or where both are of one system; `store` without `seeds`.

    Source: paired differences are protocol 2 (`rush-bench docs protocol`).

    Examples:
        >>> import rush_bench as rb
        >>> rb.compare("linear", "linear", measured).frame["difference"].tolist()
        [0.0, 0.0, 0.0]
    """
    if store is not None and not seeds:
        raise BadInput("store would have no effect: only the comparison over seeds reads cards")
    store = store or "models"
    given, folders = cells_of(results)
    found = attacks_in(given)
    cells = [cell for cell in found if cell.complete and "correct" in cell.arrays]
    known = list(dict.fromkeys(str(cell.labels["defense"]) for cell in cells))
    for name in (first, second):
        if name not in known:
            raise unknown_name("defence with finished cells", name, known)
    settings = _settings(found)
    trainings = trainings_of(cells, store, folders) if seeds else {}
    alike = _alike(cells, trainings, settings)
    pairs, apart = _pairs(_of(cells, first), _of(cells, second), settings, alike)
    sides = [{terms: alike(pair[k]) for terms, pair in pairs.items()} for k in (0, 1)]
    if seeds:
        for trained in (trained for side in sides for trained in side.values()):
            _check_seeds(trained, trainings)
        if any({id(cell) for cell in sides[0][terms]} & set(map(id, trained)) for terms, trained in sides[1].items()):
            raise BadInput(f"{first} and {second} are trainings of one system: with seeds each would be compared with itself")
        if not any(len(trained) > 1 for side in sides for trained in side.values()):
            raise BadInput(
                f"no other seed of {first} or {second} was measured alike, as far as the cards of {store} tell: attack one, "
                "name the store of their models, or leave seeds out"
            )
    rows = {terms: row for terms in pairs if (row := _row(terms, sides[0][terms], sides[1][terms]))}
    if not rows:
        why = f" with equal settings ({'; '.join(apart)})" if apart else ""
        raise BadInput(f"{first} and {second} share no finished attack on the same images{why}: run the same suite on both")
    _tell_apart(rows)
    words = [_words(row) if seeds else _words(row)[:-1] for row in rows.values()]
    frame = pd.DataFrame(rows.values())
    columns = ["dataset", "threat", "suite", "Attack", first, second, "Difference", "n", "Trainings"]
    if not seeds:
        columns.pop()
        frame = frame.drop(columns=[name for name in frame if name.endswith(("_sd", "_trainings"))])
    notes = [PAIRED, *([MEANS] if seeds else []), *(f"Left out, settings differ: {text}." for text in apart)]
    other = dict.fromkeys(str(terms[0]) for terms in rows if _other_pixels(sides[0][terms][0], sides[1][terms][0]))
    notes += [OTHER_PIXELS.format(name) for name in other]
    usual = dict.fromkeys(text for terms in rows for side in sides if (text := settings(side[terms][0])))
    notes += [f"Both: {text}." for text in usual]
    table = text_table(frame, columns, words, f"A: {first}, B: {second}", [*notes, *_caveats(sides, found)])
    compared = {cell.identity["weights"] for side in sides for trained in side.values() for cell in trained}
    of_these = rows_of(cell for cell in found if cell.identity["weights"] in compared)
    bounds = {digest(cell.identity) for row in of_these for name, cell in row.cells.items() if name in row.bounds}
    marked = {
        (i, 4 + k): BOUND
        for i, terms in enumerate(rows)
        for k, side in enumerate(sides)
        if any(digest(cell.identity) in bounds for cell in side[terms])
    }
    if marked:
        table.whole = replace(table.whole, marks=marked, notes=[*table.whole.notes, (BOUND, UPPER)])
    # on a terminal names stand above the table, and the suite tells the threat
    columns[4:6] = "A", "B"
    table.narrow = drop_columns(replace(table.whole, columns=columns), ("threat",))
    return table


def _caveats(sides: Sequence[Mapping[Terms, list[CellResult]]], found: Iterable[CellResult]) -> list[str]:
    """What speaks against the images and labels that were compared; of labels the clean accuracies of both tell."""
    compared = [cell for side in sides for trained in side.values() for cell in trained]
    said = dict.fromkeys(f"{cell.labels['dataset']}: {text}" for cell in compared if (text := copies_caveat(cell)))
    of = {(cell.labels["defense"], cell.identity["images"]) for cell in compared}
    clean = [cell for cell in found if cell.complete and (cell.labels["defense"], cell.identity["images"]) in of]
    said |= dict.fromkeys(f"{cell.labels['defense']}: {text}" for cell in clean if (text := label_caveat(cell)))
    return list(said)


def _of(cells: Sequence[CellResult], name: str) -> dict[Terms, list[CellResult]]:
    """The cells of a defence by their terms, those of the most images and predictions first; BadInput for two networks."""
    found = [cell for cell in cells if cell.labels["defense"] == name]
    if len({cell.identity["weights"] for cell in found}) > 1:
        raise BadInput(f"{name} is the name of several networks there; compare the cells of one: compare(a, b, cells)")
    by_terms: dict[Terms, list[CellResult]] = defaultdict(list)
    for cell in sorted(found, key=lambda cell: (-cell.labels["n"], -cell.identity["repeats"], cell.folder)):
        by_terms[_terms(cell)].append(cell)
    return by_terms


def _settings(cells: Iterable[CellResult]) -> Callable[[CellResult], str]:
    """In words, which settings of a cell are not those of its suite: its own, or of a worst case those of its parts."""
    by_key = {digest(cell.identity): cell for cell in cells}

    def text(cell: CellResult) -> str:
        of = cell.identity["attack"].get("of")
        parts = [by_key[key] for key in of if key in by_key] if of else [cell]
        unusual = {part.labels["attack"]: part.remembered(unusual_settings) for part in parts}
        return "; ".join(f"{header(name)} with {words}" for name, words in sorted(unusual.items()) if words)

    return text


def _pairs(
    first: Mapping[Terms, list[CellResult]],
    second: Mapping[Terms, list[CellResult]],
    settings: Callable[[CellResult], str],
    alike: Callable[[CellResult], list[CellResult]],
) -> tuple[dict[Terms, tuple[CellResult, CellResult]], list[str]]:
    """Of each terms that both have, two cells with the same settings, those of the suite where both have such cells, and of
    these the ones of most trainings.

    And in words the terms that have no such pair: there accuracies would differ by the attacks, not by the defences.
    """
    pairs, apart = {}, []
    for terms in sorted(first.keys() & second.keys(), key=_order):
        choices = [(a, b) for a in first[terms] for b in second[terms] if settings(a) == settings(b)]
        if choices:
            pairs[terms] = min(choices, key=lambda pair: (settings(pair[0]) != "", -sum(len(alike(cell)) for cell in pair)))
        else:
            a, b = (settings(side[terms][0]) or "as usual" for side in (first, second))
            apart.append(f"{header(terms[2])} at {threat_text(*terms[4:6])}: {a}, against {b}")
    return pairs, apart


def _terms(cell: CellResult) -> Terms:
    """What it shares with the cell of the other defence; clean images are the same under every threat and suite.

    Last, of a data set that is not registered, the images themselves: only in others a position names an image for ever.
    """
    attacked = cell.labels["attack"] != "clean"
    shared = [cell.labels.get(key) if attacked or key in TERMS[:3] else None for key in TERMS]
    return *shared, "" if cell.labels["dataset"] in datasets.entries else str(cell.identity["images"])


def _order(terms: Terms) -> Terms:
    """By data set, threat and suite, attacks as the columns of a table."""
    dataset, split, attack, suite, norm, eps, images = terms
    place = [column.name for column in columns_of.plain([attack])].index(attack)
    return str(dataset), str(split), images, str(norm or ""), eps or 0.0, str(suite or ""), place, attack


def _alike(
    cells: Sequence[CellResult], trainings: Trainings, settings: Callable[[CellResult], str]
) -> Callable[[CellResult], list[CellResult]]:
    """Of a cell, those of the trainings that differ in the seed alone and were measured alike; itself where none is known."""
    groups: dict[tuple[Any, ...], dict[str, CellResult]] = defaultdict(dict)
    keys: dict[int, tuple[Any, ...]] = {}
    for cell in cells:
        if trained := training_named(cell.labels, trainings):
            key = keys[id(cell)] = (trained.system, _terms(cell), measured_alike(cell), settings(cell))
            groups[key][cell.identity["weights"]] = cell
    return lambda cell: list(groups[keys[id(cell)]].values()) if id(cell) in keys else [cell]


def _check_seeds(trained: Sequence[CellResult], trainings: Trainings) -> None:
    """BadInput where a seed was trained twice."""
    seeds = [found.seed for cell in trained if (found := training_named(cell.labels, trainings))]
    if len(set(seeds)) < len(seeds):
        names = ", ".join(sorted(str(cell.labels["defense"]) for cell in trained))
        raise BadInput(f"{names}: a seed was trained twice; give the cells of one of each: compare(a, b, cells)")


def _tell_apart(rows: Mapping[Terms, dict[str, Any]]) -> None:
    """Where several sets of images go by one name, its rows say which: by the first letters of the images' digest."""
    sets: dict[str, set[str]] = defaultdict(set)
    for dataset, *_, images in rows:
        sets[dataset].add(images)
    for (dataset, *_, images), row in rows.items():
        if len(sets[dataset]) > 1:
            row["dataset"] = f"{dataset} [{images[:6]}]"


def _other_pixels(a: CellResult, b: CellResult) -> bool:
    """Whether two cells have the same positions of a registered data set, and other images there."""
    return a.identity["images"] != b.identity["images"] and set(a.arrays["index"]) == set(b.arrays["index"])


def _row(terms: Terms, first: Sequence[CellResult], second: Sequence[CellResult]) -> dict[str, Any] | None:
    """Each side: a cell, or one a training."""
    a, b = first[0], second[0]
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
        numbers |= {name: 100 * float(np.mean(correct / repeats)), f"{name}_sd": spreads[-1], f"{name}_trainings": len(frames)}
    parts = ("difference", "difference_low", "difference_high")
    numbers |= {part: 100 * value for part, value in zip(parts, paired_difference(*counts), strict=True)}
    about = {key: value for key, value in zip(TERMS, terms, strict=False) if key != "split"}
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
