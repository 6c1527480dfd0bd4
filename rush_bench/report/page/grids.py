"""Tables of the page: the values of the other tables with what a reader can sort, point at and follow to its record."""

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rush_bench.audits.evidence import Evidence
from rush_bench.audits.experiments import EXPERIMENTS
from rush_bench.audits.run import Audit
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate
from rush_bench.report import audits, certificates, corruptions, settle
from rush_bench.report.columns import estimate_of
from rush_bench.report.figures import percent
from rush_bench.report.layout import BOUND, DASH, NARROW, drop_columns, header, is_text, lay_out, lift_shared_columns
from rush_bench.report.rows import Row

BOLD = "Bold: the highest of at least two of the same data sets, threat, suite and n; pre-training on the same images is none."
NAMED = ("defense", "attack", "corruption", "severity", "experiment", "trial", "suite", "dataset")  # labels in a record's name


@dataclass(frozen=True)
class Cell:
    """`text` as other tables print it; `value` is all of the number, by which a column is sorted, `interval` its ends.

    `tip` is shown to a reader who points at it, `record` the anchor of what it was computed from; `mark` a footnote's
    mark and `why` its meaning; `kind` a class of the style.
    """

    text: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    tip: str = ""
    record: str = ""
    best: bool = False
    mark: str = ""
    why: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """`shown`: at first; the reader may choose others. `kind`: `words` are set flush left, `long` ones folded."""

    header: str
    kind: str = "number"
    shown: bool = True


@dataclass(frozen=True)
class Grid:
    """A table: blocks are (title, lines); each is sorted by itself. `shared`: what hidden columns say in every line."""

    name: str
    columns: list[Column]
    blocks: list[tuple[str, list[list[Cell]]]]
    notes: Sequence[str] = ()
    shared: str = ""


class Records:
    """The cells that the page rests on, each with its anchor; `folder` is the results folder."""

    def __init__(self, results: Sequence[CellResult], folder: Path) -> None:
        self.by_folder: dict[Path, list[CellResult]] = {}
        for result in sorted(results, key=lambda each: each.folder):
            self.by_folder.setdefault(result.folder, []).append(result)
        self.anchors = {path: f"r{k}" for k, path in enumerate(self.by_folder)}
        self.folder = folder

    def anchor(self, result: CellResult | None) -> str:
        """The id of its entry, empty for none."""
        return "" if result is None else self.anchors[result.folder]

    def entries(self) -> dict[str, list[dict[str, Any]]]:
        """By place, one entry per cell: what it is, what it cost, and all that is written down of it; sorted by name."""
        by_folder: dict[str, list[dict[str, Any]]] = {}
        for path, same in self.by_folder.items():
            first = same[0]
            about = {"chunks": f"{first.chunks_done} of {first.chunks}", "folder": str(path.relative_to(self.folder))}
            if first.chunks_done:
                frame = first.frame
                about |= {kind: f"{frame[kind].mean():,.6g} per image" for kind in ("forwards", "backwards")}
                about |= {"seconds": f"{frame['seconds'].sum():,.4g}", "largest distance": f"{frame['distance'].max():.6g}"}
                about |= {"made on": "; ".join(first.made_on) or "not noted: an older record"}
            text = json.dumps({"identity": first.identity, "labels": [cell.labels for cell in same]}, indent=1)
            name = " · ".join(str(first.labels[key]) for key in NAMED if first.labels.get(key) not in (None, ""))
            entry = {"id": self.anchors[path], "name": name, "about": about, "text": text, "complete": first.complete}
            by_folder.setdefault(str(path.parent.relative_to(self.folder)), []).append(entry)
        return {place: sorted(found, key=lambda entry: entry["name"]) for place, found in by_folder.items()}


def measured(name: str, frame: pd.DataFrame, lines: Sequence[Row | None], records: Records) -> Grid:
    """A frame of `tables.plain` or `tables.paper`, with the row behind each of its lines."""
    frame = frame.reset_index(drop=True)
    layout = lay_out(frame)
    narrow, shared = lift_shared_columns(drop_columns(layout, {*NARROW} - {"threat"}))
    meanings = {mark: text for mark, text in layout.notes if mark}

    def cell(i: int, k: int) -> Cell:
        column, row = layout.columns[k], lines[i]
        value = frame.at[i, column] if column in frame else None
        number = float(value) if isinstance(value, numbers.Real) and not math.isnan(value) else None
        found = row.estimates.get(estimate_of(column)) if row else None
        result = row.cells.get(estimate_of(column)) if row else None
        if column.startswith("measured_") and number is None:  # a deterministic defence has no fresh draws
            found = result = None
        marks = layout.marks.get((i, k), "")
        why = [f"{mark}: {meanings[mark]}" for mark in marks.split(",") if mark]
        why += [str(frame.at[i, "notes"])] if BOUND in marks and row and row.notes else []
        tip = ""
        if found is not None and result is not None:
            tip = f"{percent(header(column), found)} · {settings_text(result)}"
        elif number is not None and column.startswith("published_"):
            tip = f"published: {frame.at[i, 'published_source']}"
        interval = (100 * found.low, 100 * found.high) if found else None
        best = (i, k) in layout.bold
        return Cell(layout.cells[i][k], number, interval, tip, records.anchor(result), best, marks, " ".join(why))

    columns = [
        Column(
            header(column),
            "words" if is_text(column) else "number",
            column in narrow.columns and any(line[k] != DASH for line in layout.cells),
        )
        for k, column in enumerate(layout.columns)
    ]
    blocks = [(title, [[cell(i, k) for k in range(len(columns))] for i in span]) for title, span in layout.blocks]
    notes = [f"{mark} {text}".strip() for mark, text in layout.notes]
    notes += [BOLD] if layout.bold and "block" not in frame else []
    return Grid(name, columns, blocks, notes, shared)


def settings_text(result: CellResult) -> str:
    """The attack of a cell in a line: its name, its settings, K, n and the seed."""
    attack = dict(result.identity["attack"])
    words = [str(attack.pop("name"))]
    words += [f"over {len(attack.pop('of'))} cells"] if "of" in attack else []
    words += [f"{key}={value}" for key, value in attack.items()]
    return ", ".join([*words, f"K={result.identity['repeats']}", f"n={result.labels['n']}", f"seed={result.identity['seed']}"])


def trials(name: str, evidence: Evidence, records: Records) -> Grid:
    """The trials of one defence, a block per experiment; with the waterfall's differences where there are any."""
    values = {id(entry): line for entry, line in zip(evidence.entries, settle.frame(evidence).to_dict("records"), strict=True)}
    keys = {"Accuracy": "accuracy", "K": "k", "Forward": "forwards", "Back": "backwards", "Seconds": "seconds"}
    steps = {id(bar.entry): bar.step for bar in settle.bars(evidence) if bar.step is not None}
    blocks = []
    for experiment, entries in settle.sections(evidence):
        lines = []
        for entry in entries:
            known, line = values[id(entry)], []
            for column, text in zip(settle.COLUMNS, settle.texts(entry), strict=True):
                number = known.get(keys.get(column, ""))
                cell = Cell(text, None if number is None or math.isnan(number) else number)
                if column == "Accuracy" and entry.complete:
                    cell = _accuracy(text, entry.trial, entry.estimate, entry.result, records)
                line.append(cell)
            if steps:
                step = steps.get(id(entry))
                line.insert(2, Cell("") if step is None else Cell(settle.percent(step, signed=True), 100 * step.value))
            lines.append(line)
        blocks.append((f"{experiment} {EXPERIMENTS[experiment].title}. Reading: {EXPERIMENTS[experiment].reading}.", lines))
    columns = [Column(column, {"Trial": "words", "Besides": "long"}.get(column, "number")) for column in settle.COLUMNS]
    if steps:
        columns.insert(2, Column("Change, paired"))
    return Grid(name, columns, blocks, settle.notes(evidence))


def _accuracy(text: str, name: str, found: Estimate, result: CellResult, records: Records) -> Cell:
    tip = f"{percent(name, found)} · {settings_text(result)}"
    return Cell(text, 100 * found.value, (100 * found.low, 100 * found.high), tip, records.anchor(result))


def findings(name: str, audit: Audit) -> Grid:
    """The checks of an audit."""
    names, lines = audits.lay_out(audit)
    columns = {"Figure": "number", "Passes if": "number", "What": "long", "Source and notes": "long"}
    cells = []
    for finding, line in zip(audit.findings, lines, strict=True):
        kinds = {"Outcome": finding.status.replace(" ", "-")}
        values = {"Figure": finding.figure, "Passes if": finding.threshold}
        cells.append([Cell(t, values.get(c), kind=kinds.get(c, "")) for c, t in zip(names, line, strict=True)])
    return Grid(name, [Column(column, columns.get(column, "words")) for column in names], [("", cells)])


def certified(name: str, complete: Mapping[str, CellResult], sets: Mapping[str, pd.DataFrame], records: Records) -> Grid:
    """Certified accuracies at the radii that the cells share."""
    radii = certificates.shared_radii(list(complete.values()))
    layout = certificates.table(sets, radii, certificates.caveats_of(complete.values())).whole
    lines = []
    for (title, result), texts in zip(complete.items(), layout.cells, strict=True):
        found = certificates.summary(sets[title], radii)["certified"]
        facts, accuracies = texts[1 : -len(found)], texts[-len(found) :]
        cells = [Cell(title, record=records.anchor(result)), *(Cell(t, None if t == DASH else float(t)) for t in facts)]
        for text, at in zip(accuracies, found, strict=True):
            estimate = Estimate(at["accuracy"], at["low"], at["high"])
            cells.append(_accuracy(text, f"at radius {at['radius']:.6g}", estimate, result, records))
        lines.append(cells)
    columns = [
        Column(column, "number" if k else "words", any(line[k].text != DASH for line in lines))
        for k, column in enumerate(layout.columns)
    ]
    return Grid(name, columns, [("", lines)], [note for _, note in layout.notes])


def corrupted(name: str, frame: pd.DataFrame) -> Grid:
    """The table of common corruptions, mCE where there is a reference."""
    header, body = corruptions.lay_out(frame)
    known = {(line["corruption"], line["defense"]): line for line in frame.to_dict("records")}
    lines = []
    for first, *texts in body[: None if frame["reference"].notna().any() else -1]:
        cells = [Cell(first)]
        for defense, text in zip(header[1:], texts, strict=True):
            key = "accuracy" if (first, defense) in known else "ce"
            line = known[first if key == "accuracy" else corruptions.MEAN, defense]
            value, low, high = (line[part] for part in (key, f"{key}_low", f"{key}_high"))
            severities = ", ".join(f"{s}: {line[f'severity_{s}']:.6g}" for s in corruptions.SEVERITIES)
            tip = f"{value:.6g} [{low:.6g}, {high:.6g}]" + (f" · severities {severities}" if key == "accuracy" else "")
            cells.append(Cell(text) if math.isnan(value) else Cell(text, value, (low, high), tip))
        lines.append(cells)
    return Grid(
        name,
        [Column(column, "number" if k else "words") for k, column in enumerate(header)],
        [("", lines)],
        [corruptions.caption(frame)],
    )
