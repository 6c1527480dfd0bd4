"""Tables as pandas frames, from records alone (protocol 8): `plain`, and `paper` in the layout of the RUSH paper's Table 1.

Numbers are percent; `<column>_low` and `<column>_high` are the ends of the 95 % interval. NaN: not measured, or not finished.
`table.py` has them as a value that prints and writes itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from rush_bench.errors import unknown_name
from rush_bench.records import CellResult, save_indexes
from rush_bench.records.published import BLOCKS, PublishedRow, published
from rush_bench.report import columns as columns_of
from rush_bench.report.rows import Row, rows, transferred_from
from rush_bench.report.trainings import Trainings

STYLES = ("plain", "paper")
FORMATS = ("csv", "md", "tex")
PUBLISHED = ("standard", "pgd", "aa")
FACTS = ("protocol", "extra_data", "architecture")
TRAINING = ("training_seeds", "training_passes", "training_images", "training_seconds")
WHOLE = ("n", "K", "seed")  # whole numbers that may be missing
Line = tuple[PublishedRow | None, Row | None]  # of the paper style: what is published, what was measured; one at least
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}


def table(results: Iterable[CellResult], style: str = "plain", trainings: Trainings | None = None) -> pd.DataFrame:
    """All that was measured, a row per (defence, data set, threat, suite, n); or Table 1 with it beside the published.

    Cells that are not finished are NaN and a note. Rows that differ in n or any setting are never merged. With `trainings` (by
    the SHA-256 of a model's weights) there are columns of what training cost, and trainings that differ in their seed alone
    have a row for their mean, with `<column>_sd`, beside one each, which is `in_mean` then.
    """
    check_style(style)
    results = list(results)
    found = rows(results, trainings)
    save_indexes(results)
    return plain(found) if style == "plain" else paper(paper_lines(found))


def check_style(style: str) -> None:
    """BadInput for a style that there is not, with the nearest."""
    if style not in STYLES:
        raise unknown_name("table style", style, STYLES)


def check_formats(formats: Sequence[str]) -> Sequence[str]:
    """BadInput for a kind of file that no table is written as, with the nearest."""
    for name in formats:
        if name not in FORMATS:
            raise unknown_name("table format", name, FORMATS)
    return formats


def plain(found: Sequence[Row]) -> pd.DataFrame:
    """The plain style: a line per row, in their order."""
    columns = ["defense", "dataset", "pretrain_dataset", "threat", "suite"]
    shown = {column.name: column.estimate for column in columns_of.plain(_measured_in(found))}
    columns += [part for name in shown for part in parts_of(name)]
    columns += ["K", "n", *FACTS, "budget", *TRAINING, "in_mean", "seed", "upper_bounds", "notes"]
    lines = [_about(row) | _numbers(row, shown) for row in found]
    return _framed(lines, columns)


def paper_lines(found: Sequence[Row]) -> list[Line]:
    """Blocks and rows as in the paper; what is measured stands beside its row, other systems follow in their block."""
    eligible = [row for row in found if (row.is_linf8() or not row.threat) and not row.in_mean]
    best: dict[tuple[str, ...], Row] = {}
    for row in eligible:  # one row per defence: l-inf 8/255 with its widest evaluation
        key = (block_of(row.labels), str(row.labels.get("model")), row.labels["defense"], row.weights, str(row.seed))
        if key not in best or _width(row) > _width(best[key]):
            best[key] = row
    measured = list(best.values())
    used: set[int] = set()
    lines: dict[str, list[Line]] = {block: [] for block in BLOCKS}
    for entry in published().table1:
        beside = sorted(
            (r for r in measured if id(r) not in used and matches_published(entry, r.labels)), key=_width, reverse=True
        )[:1]
        used |= {id(row) for row in beside}
        lines[entry.block].append((entry, beside[0] if beside else None))
    for row in measured:
        if id(row) not in used:
            lines.setdefault(block_of(row.labels), []).append((None, row))
    for row in found:  # each training that a mean above holds: for the CSV alone
        if row.in_mean and row.is_linf8():
            lines.setdefault(block_of(row.labels), []).append((None, row))
    return [line for block in lines.values() for line in block]


def paper(lines: Sequence[Line]) -> pd.DataFrame:
    """The paper style: a row per line, in their order."""
    cells, shown = [], columns_of.paper(_measured_in(row for _, row in lines if row))
    for entry, row in lines:
        about = _published(entry) if entry else {}
        if row and not entry:
            about = {"block": block_of(row.labels), "method": row.labels["defense"]}
        cells.append(about | (_measured(row, shown) if row else {}))
    columns = ["block", "method", "footnotes", *(f"published_{name}" for name in PUBLISHED), "published_source"]
    columns += [f"published_{name}" for name in FACTS]
    columns += ["measured_as", *(part for column in shown for part in parts_of(column.in_paper)), "n", "K", *FACTS, "budget"]
    columns += [*TRAINING, "in_mean", "suite", "seed", "upper_bounds", "notes"]
    return _framed(cells, columns)


def _measured_in(found: Iterable[Row]) -> set[str]:
    """The names of all estimates there are."""
    return {name for row in found for name in row.estimates}


def _framed(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The frame of these lines, without columns of trainings where no card was at hand, and of means where there are none."""
    frame = pd.DataFrame(lines, columns=columns)
    for name in WHOLE:
        frame[name] = frame[name].astype("Int64")
    left_out = [] if frame["in_mean"].eq(True).any() else [name for name in frame if name == "in_mean" or name.endswith("_sd")]
    return frame.drop(columns=[*left_out, *(TRAINING if frame["training_seeds"].isna().all() else ())])


def parts_of(name: str) -> list[str]:
    """The columns of a frame that a column of a table is made of."""
    if name == "published_setting":
        return [f"published_{fact}" for fact in FACTS]
    return [name, f"{name}_low", f"{name}_high", f"{name}_sd"]


def _numbers(row: Row, wanted: dict[str, str]) -> dict[str, float]:
    cells: dict[str, float] = {}
    for column, name in wanted.items():
        if name in row.estimates:
            numbers = [*row.estimates[name], row.spread.get(name, math.nan)]
            cells |= dict(zip(parts_of(column), (100 * part for part in numbers), strict=True))
    return cells


def _about(row: Row) -> dict[str, Any]:
    labels = row.labels
    about = {name: labels.get(name) for name in ("defense", "dataset", "pretrain_dataset", "suite", "n", *FACTS)}
    if "extra_data" in labels and labels["extra_data"] is None:  # stated: none; a label that is absent is not known
        about["extra_data"] = "none"
    return about | {
        "threat": row.threat_text,
        "K": row.repeats,
        "seed": row.seed,
        "budget": labels.get("budget") or labels.get("preset"),
        "upper_bounds": ",".join(row.bounds),
        "notes": "; ".join(row.notes),
        "in_mean": row.in_mean,
        **_training(row),
    }


def _training(row: Row) -> dict[str, Any]:
    if row.training is None:
        return {}
    seeds = row.training_seeds or (row.training.seed,)
    costs = {f"training_{name}": getattr(row.training, name) for name in ("passes", "images", "seconds")}
    return {"training_seeds": ",".join(map(str, seeds)), **costs}


def _measured(row: Row, shown: Sequence[columns_of.Column]) -> dict[str, Any]:
    # a deterministic defence has no bank, hence nothing but one number
    wanted = {column.in_paper: column.estimate for column in shown if not (column.of and row.labels["deterministic"])}
    about = _about(row)
    kept = ("n", "K", *FACTS, "budget", *TRAINING, "in_mean", "suite", "seed", "notes", "upper_bounds")
    return {name: about[name] for name in kept if name in about} | {
        "measured_as": about["defense"],
        **_numbers(row, wanted),
    }


def _published(entry: PublishedRow) -> dict[str, Any]:
    facts = {f"published_{name}": str(fact) for name in FACTS if (fact := getattr(entry, name))}
    numbers = {f"published_{name}": getattr(entry, name) for name in PUBLISHED}
    about = {"block": entry.block, "method": entry.method, "footnotes": ",".join(entry.footnotes)}
    return about | {"published_source": entry.source} | numbers | facts


def block_of(labels: Mapping[str, Any]) -> str:
    """The block of what was measured: `CIFAR-10`, `CIFAR-10 -> STL-10`; without pre-training, the data set alone."""
    dataset = labels["dataset"]
    title, before = TITLES.get(dataset, dataset), transferred_from(dataset, labels.get("pretrain_dataset"))
    return f"{TITLES.get(before, before)} -> {title}" if before else title


def matches_published(entry: PublishedRow, labels: Mapping[str, Any]) -> bool:
    """Whether what was measured, by its labels, is the system, votes and data of a published row."""
    votes = entry.votes is None or labels.get("votes") == entry.votes
    return entry.beside and block_of(labels) == entry.block and labels.get("recipe") == entry.system and votes


def _width(row: Row) -> tuple[Any, ...]:
    """What is shown where several rows would fit: attacked at all, full suite, largest n, most columns, paper's training."""
    attacked = sum(column.panel is not None and column.name in row.estimates for column in columns_of.COLUMNS)
    paper = row.labels.get("preset") == "paper"
    return (attacked > 0, not row.quick and bool(row.threat), row.labels["n"], attacked, paper, row.repeats)
