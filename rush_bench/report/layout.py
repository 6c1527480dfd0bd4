"""Frames of `tables.py` as text: columns, words, what is best, notes. Their style is read off their columns."""

import dataclasses
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rush_bench.attacks.suites import is_quick
from rush_bench.errors import unknown_name
from rush_bench.progress import amount
from rush_bench.records.published import published
from rush_bench.report.columns import COLUMNS, Column, estimate_of, header_of
from rush_bench.report.columns import paper as paper_columns
from rush_bench.report.columns import plain as plain_columns
from rush_bench.report.rows import transferred_from

DASH = "–"
NUMERIC = re.compile(rf"(≥ )?[-+]?\d|{DASH}$")
HEADERS = {
    "defense": "Defence",
    "dataset": "Data set",
    "threat": "Threat",
    "suite": "Suite",
    "method": "Method",
    "published_standard": "Standard (published)",
    "published_pgd": "PGD (published)",
    "published_aa": "AA (published)",
    "published_setting": "Setting (published)",
    "measured_as": "Measured",
    "protocol": "Protocol",
    "extra_data": "Extra data",
    "architecture": "Architecture",
    "budget": "Training",
    "training_passes": "Training cost (passes)",
    "seed": "Seed",
    "setting": "Protocol, network, extra data",
}
TEXT = ("protocol", "extra_data", "architecture", "budget")
LIFTED = ("dataset", "threat", "suite", "K", "n", "setting", *TEXT)  # above the table where they are the same in every row
# Left out on a terminal: the suite's name tells the threat, and one column, `setting`, has the facts.
NARROW = ("threat", "published_setting", *(column.in_paper for column in COLUMNS if column.wide), *TEXT)
PLAIN_FIRST, PLAIN_LAST = ("defense", "dataset", "threat", "suite"), ("K", "n", "seed", *TEXT[:3], "training_passes")
PAPER_FIRST = ("method", "published_standard", "published_pgd", "published_aa", "published_setting", "measured_as")
PAPER_LAST = ("n", "K", "seed", *TEXT, "training_passes")
QUICK, BOUND = "q", "†"
UPPER = "an upper bound, not a measure of robustness: run audit."
REST = "Square on the rest: without gradients, from the worst x' so far, on images that no column before it breaks."
CHOSEN = "Worst may stand above a column that it is the worst of: x' is chosen on one set of draws and scored on another."
INTERVALS = (
    "95 % intervals: Clopper-Pearson for deterministic defences, by the spread of the images' rates for randomised ones."
)
SPREAD = (
    "± is the standard deviation over trainings (seeds); in brackets the 95 % interval of their mean over images and draws."
)
PASSES = "Training cost: passes of an image through the network; forward 1, with its gradient 2, with that of the weights 3."
OF_COLUMN = {REST: "square", CHOSEN: "worst", PASSES: "training_passes"}  # notes that say nothing without it
UNLABELLED = "STL-10 -> STL-10"  # the first is its unlabelled split: footnote 3


@dataclass(frozen=True)
class Layout:
    """A table as text: `marks` hold footnote marks, `bold` the (row, column) of the best."""

    columns: list[str]
    cells: list[list[str]]
    marks: dict[tuple[int, int], str]
    bold: set[tuple[int, int]]
    blocks: list[tuple[str, range]]
    notes: list[tuple[str, str]]


def header(column: str) -> str:
    """What a table calls a column; one of words that are made already is its own name."""
    return HEADERS.get(column) or header_of(column)


def is_text(column: str) -> bool:
    """Whether a column of measured tables is set flush left: names and facts, not numbers."""
    return column in ("method", "defense", "dataset", "threat", "suite", "measured_as", "setting", *TEXT)


def flush_left(layout: Layout) -> list[bool]:
    """Of each column, whether it is set flush left: it holds more than numbers, by its name or by what stands in it."""
    columns = zip(*layout.cells, strict=True) if layout.cells else [()] * len(layout.columns)
    return [
        is_text(name) or any(text and not NUMERIC.match(text) for text in texts)
        for name, texts in zip(layout.columns, columns, strict=True)
    ]


def folded(text: str, width: int) -> str:
    """Lines of whole words, of at most `width` letters where words allow."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


def lay_out(frame: pd.DataFrame, *, narrow: bool = False) -> Layout:
    """Choose and fill the columns of a frame made by `table`, find the best, gather footnotes; `narrow` for a terminal.

    A column in which nothing was measured is left out.
    """
    paper = "block" in frame
    if "in_mean" in frame:  # each training has its line in the CSV
        frame = frame[frame["in_mean"].ne(True)].reset_index(drop=True)
    if paper:
        frame = frame.assign(published_setting=_setting(frame, "published_"))
    if narrow:
        frame = frame.assign(setting=_setting(frame))
    frame = _told_apart(frame.reset_index(drop=True), "measured_as" if paper else "defense")
    measured = measured_columns(frame)
    columns = [*(PAPER_FIRST if paper else PLAIN_FIRST), *measured, *(PAPER_LAST if paper else PLAIN_LAST)]
    columns = [*(name for name in columns if name not in NARROW), "setting"] if narrow else columns
    columns = [name for name in columns if name in frame and not _empty(frame, name)]
    cells = [list(row) for row in zip(*(_texts(frame, name) for name in columns), strict=True)]
    blocks = _blocks(frame) if paper else [("", range(len(frame)))]
    quick = [is_quick(str(suite)) for suite in frame["suite"]]
    footnotes = frame["footnotes"].tolist() if paper else []
    marks = {(i, 0): said for i, said in enumerate(footnotes) if isinstance(said, str) and said}
    shown = [estimate_of(name) for name in columns]
    for i, said in enumerate(frame["upper_bounds"].tolist()):
        bounds = str(said).split(",")
        for k, name in enumerate(columns):
            weak = paper and quick[i] and name in measured and measured[name].weak
            found = [mark for mark, holds in ((QUICK, weak), (BOUND, shown[k] in bounds)) if holds]
            if found and cells[i][k] != DASH:
                marks[i, k] = ",".join(found)
    bold = {(i, columns.index(name)) for i, name in best(frame) if name in columns}
    return Layout(columns, cells, marks, bold, blocks, _notes(frame, paper, any(quick)))


def lift_shared_columns(layout: Layout) -> tuple[Layout, str]:
    """Without the columns that say the same in every row, and what they say, for above the table."""
    same = {
        name: layout.cells[0][k]
        for k, name in enumerate(layout.columns)
        if name in LIFTED and len({row[k] for row in layout.cells}) == 1 and layout.cells[0][k] not in (DASH, "")
    }
    named = {name: f"{HEADERS[name].lower()} " for name in TEXT}
    named |= {"n": "n=", "K": "K=", "setting": f"{HEADERS['setting'].lower()}: "}
    return drop_columns(layout, same), ", ".join(f"{named.get(name, '')}{text}" for name, text in same.items())


def choose(layout: Layout, columns: Sequence[str]) -> Layout:
    """These columns alone, in this order; BadInput for one that the table has not."""
    for name in columns:
        if name not in layout.columns:
            raise unknown_name("column", name, layout.columns)
    kept = [layout.columns.index(name) for name in columns]
    at = {k: place for place, k in enumerate(kept)}
    return dataclasses.replace(
        layout,
        columns=list(columns),
        cells=[[row[k] for k in kept] for row in layout.cells],
        marks={(i, at[k]): mark for (i, k), mark in layout.marks.items() if k in at},
        bold={(i, at[k]) for i, k in layout.bold if k in at},
        notes=[(mark, text) for mark, text in layout.notes if OF_COLUMN.get(text) in (None, *columns)],
    )


def drop_columns(layout: Layout, left_out: Container[str]) -> Layout:
    """The columns but these."""
    return choose(layout, [name for name in layout.columns if name not in left_out])


def measured_blocks(layout: Layout) -> Layout:
    """Without the blocks of the paper style in which nothing was measured; all of them where nothing was at all."""
    if "measured_as" not in layout.columns:
        return layout
    as_ = layout.columns.index("measured_as")
    blocks = [(title, span) for title, span in layout.blocks if any(layout.cells[i][as_] != DASH for i in span)]
    return dataclasses.replace(layout, blocks=blocks) if blocks else layout


def measured_columns(frame: pd.DataFrame) -> dict[str, Column]:
    """The measured accuracies of a frame made by `table`, by their names in it, in order."""
    names = {estimate_of(name) for name in frame if f"{name}_low" in frame}
    return {c.in_paper: c for c in paper_columns(names)} if "block" in frame else {c.name: c for c in plain_columns(names)}


def best(frame: pd.DataFrame) -> set[tuple[int, str]]:
    """(row, column) of the best of each block and column, ties to one decimal included; fewer than two have no best.

    Published standard accuracies with footnote 2 are not ranked, as in the paper. Measured ones are ranked on equal terms
    only: same data sets, threat, suite and n (in a block of the paper style: those of its fullest suite and largest n). An
    upper bound is not ranked.
    """
    bounds = [str(names).split(",") for names in frame["upper_bounds"]]
    columns = {
        name: np.where([estimate_of(name) in row for row in bounds], math.nan, frame[name].to_numpy(float))
        for name in measured_columns(frame)
    }
    if "block" not in frame:
        terms = [frame[name].tolist() for name in ("dataset", "pretrain_dataset", "threat", "suite", "n")]
        lines = ([None if pd.isna(value) else value for value in line] for line in zip(*terms, strict=True))
        groups = _places((dataset, transferred_from(str(dataset), before), *rest) for dataset, before, *rest in lines)
        return {hit for places in groups.values() for name in columns for hit in _tops(name, columns[name], places)}
    published = {name: frame[name].to_numpy(float) for name in PAPER_FIRST[1:4]}
    other = ["2" in str(marks).split(",") for marks in frame["footnotes"]]
    published["published_standard"] = np.where(other, math.nan, published["published_standard"])
    full = [(not is_quick(str(suite)), n) for suite, n in zip(frame["suite"], frame["n"], strict=True)]
    found: set[tuple[int, str]] = set()
    for places in _places(frame["block"]).values():
        measured = [i for i in places if not pd.isna(full[i][1])]
        most = max((full[i] for i in measured), default=None)
        equal = [i for i in measured if full[i] == most]
        for part, rows in ((published, places), (columns, equal)):
            found |= {hit for name in part for hit in _tops(name, part[name], rows)}
    return found


def _places(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """The places of each key."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        found[key].append(i)
    return found


def _tops(name: str, column: NDArray[np.float64], places: Sequence[int]) -> set[tuple[int, str]]:
    shown = {i: column[i].round(1) for i in places if not math.isnan(column[i])}
    most = max(shown.values(), default=None)
    return {(i, name) for i, value in shown.items() if value == most} if len(shown) > 1 else set()


def _empty(frame: pd.DataFrame, name: str) -> bool:
    """Whether a column has nothing to show: nothing was measured, or all was with one seed; others are there in any table."""
    if name == "seed":
        return frame[name].nunique() < 2
    return (f"{name}_low" in frame or name == "training_passes") and bool(frame[name].isna().all()) and not frame.empty


def _texts(frame: pd.DataFrame, name: str) -> list[str]:
    """The cells of a column."""
    if f"{name}_low" in frame:
        parts = [frame[part].tolist() for part in (name, f"{name}_low", f"{name}_high")]
        spreads = frame[f"{name}_sd"].tolist() if f"{name}_sd" in frame else [math.nan] * len(frame)
        return [
            DASH if pd.isna(value) else f"{value:.1f}{'' if math.isnan(sd) else f' ± {sd:.1f}'} [{low:.1f}, {high:.1f}]"
            for value, low, high, sd in zip(*parts, spreads, strict=True)
        ]
    values: list[Any] = [DASH if pd.isna(value) or value == "" else value for value in frame[name].tolist()]
    if name.startswith("published"):
        return [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
    if name == "training_passes":
        return [value if value == DASH else amount(value) for value in values]
    return [str(int(value)) if name in ("n", "K", "seed") and value != DASH else str(value) for value in values]


def _setting(frame: pd.DataFrame, prefix: str = "") -> list[str]:
    """Protocol, architecture and extra data of each row, as far as they are known."""
    parts = frame[[f"{prefix}{name}" for name in ("protocol", "architecture", "extra_data")]].to_numpy()
    return [", ".join(part for part in line if isinstance(part, str)) for line in parts]


def _blocks(frame: pd.DataFrame) -> list[tuple[str, range]]:
    spans = []
    for title, part in frame.groupby("block", sort=False):
        spans.append((str(title), range(part.index[0], part.index[-1] + 1)))
    return spans


def first_distinct(*tellings: Sequence[str]) -> Sequence[str]:
    """Of several ways to mark the same things, the first with a mark for each that no other has; the last where none has."""
    return next((marks for marks in tellings if len({*marks}) == len(marks)), tellings[-1])


def _told_apart(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows that would go by one name, suite and n, with what differs behind the name: the seed or K, else a number."""
    shared = [column for column in (name, "dataset", "threat", "suite", "n", "block") if column in frame]
    names = frame[name].tolist()
    for places in _places(frame[shared].astype(str).itertuples(index=False, name=None)).values():
        if len(places) == 1 or pd.isna(names[places[0]]):
            continue
        tellings = [[f"{what}{frame[column][i]}" for i in places] for what, column in (("seed ", "seed"), ("K=", "K"))]
        marks = first_distinct(*tellings, [f"run {k}" for k in range(1, len(places) + 1)])
        for i, mark in zip(places, marks, strict=True):
            names[i] = f"{names[i]} ({mark})"
    return frame.assign(**{name: names})


def _notes(frame: pd.DataFrame, paper: bool, any_quick: bool) -> list[tuple[str, str]]:
    notes = [
        (
            "",
            f"Accuracy in percent; K predictions per image on n images. {INTERVALS}",
        )
    ]
    if paper:
        notes += list(published().footnotes.items())
        remarks = {f"{row.method}, {row.block}: {row.remark}" for row in published().table1 if row.remark}
        notes += [("", text) for text in sorted(remarks)]
        source = "the RUSH paper, Table 1"
        notes.append(("", f"Published: {source}. Measured: this tool, l-inf 8/255; {DASH} is not measured or not finished."))
        notes.append(("", "(unchecked): noted when the row was written down, its source not opened again."))
    if any_quick:
        what = "fewer steps and draws than the column's name promises; never compare it with a full suite."
        notes.append((QUICK, f"quick suite: {what}") if paper else ("", f"Suites named -quick: {what}"))
    columns = {estimate_of(name): frame[name].to_numpy(float) for name in frame if f"{name}_low" in frame}
    if "square" in columns and not np.isnan(columns["square"]).all():
        notes.append(("", REST))
    derived = {column.name for column in COLUMNS if column.derived} | {"worst"}
    attacks = [column for name, column in columns.items() if name not in derived and not name.endswith("_bank")]
    if len(frame) and any(np.any(columns["worst"].round(1) > column.round(1)) for column in attacks):
        notes.append(("", CHOSEN))
    if any(isinstance(text, str) and text for text in frame["upper_bounds"]):
        notes.append((BOUND, UPPER))
    if any(name.endswith("_sd") for name in frame):
        notes.append(("", SPREAD))
    if "training_passes" in frame and frame["training_passes"].notna().any():
        notes.append(("", PASSES))
    names = frame["measured_as" if paper else "defense"].tolist()
    said: dict[tuple[str, str], list[str]] = defaultdict(list)  # by suite and text, the rows it is about
    for name, suite, text in zip(names, frame["suite"], frame["notes"], strict=True):
        if isinstance(text, str) and text:
            said[suite, text].append(str(name))
    if len({text for _, text in said}) == 1 and sum(map(len, said.values())) == len(names) > 1:
        notes.append(("", f"every row: {next(iter(said))[1]}"))
    else:
        notes += [("", f"{', '.join(about)}, {suite}: {text}") for (suite, text), about in said.items()]
    return notes
