"""Tables of `settle`, made from records alone: an experiment after another, a line per trial, each with its interval."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rush_bench.audits.evidence import Entry, Evidence
from rush_bench.audits.experiments import EXPERIMENTS
from rush_bench.audits.roles import AS_PUBLISHED, THEIRS
from rush_bench.files import write_text
from rush_bench.records.published import PublishedRow, published
from rush_bench.records.statistics import Estimate
from rush_bench.report.layout import DASH, INTERVALS, first_distinct
from rush_bench.report.rows import Row, threat_text
from rush_bench.report.tables import matches_published

COLUMNS = ["Trial", "Accuracy", "Besides", "K", "Forward", "Back", "Seconds"]
WIDE = ("Forward", "Back")  # a terminal has no room for them
OTHER = {"bank": "on its bank", "unseen": "on unseen banks", "official": "by its own bookkeeping"}  # counts of a record
ANY = (10, 100)  # T11
NUMBERS = ("accuracy", "low", "high")


@dataclass(frozen=True)
class Bar:
    """A bar of the waterfall (T15). `step` is its accuracy less that of the bar before, paired by image.

    None where it is a replay of what was published, which begins a sequence, or where one of the two is unfinished.
    """

    entry: Entry
    step: Estimate | None

    @property
    def as_published(self) -> bool:
        """Whether it explains a published number and measures no robustness."""
        return self.entry.role in AS_PUBLISHED


def bars(evidence: Evidence) -> list[Bar]:
    """The waterfall, unfinished bars included: corrections in order, the worst case last; empty where T15 was not asked for."""
    found: list[Bar] = []
    for entry in (entry for entry in evidence.of("T15", complete=False) if entry.role not in THEIRS):
        before = found[-1].entry if found and entry.role not in AS_PUBLISHED else None
        finished = before is not None and before.complete and entry.complete
        found.append(Bar(entry, entry.minus(before) if before is not None and finished else None))
    return found


def published_row(evidence: Evidence) -> PublishedRow | None:
    """What is published for this system, data and number of votes, at l-inf 8/255; None elsewhere."""
    row = Row(evidence.labels, "", {"norm": evidence.labels["norm"], "eps": evidence.labels["eps"]}, 0, 0, {}, ())
    if not row.is_linf8():
        return None
    return next((entry for entry in published().table1 if matches_published(entry, evidence.labels)), None)


def percent(estimate: Estimate, signed: bool = False) -> str:
    """`12.3 [10.1, 14.6]`, in percent; `signed` for differences: `-12.3 [-14.6, -10.1]`, `+0.4 [...]`."""
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(round(100 * part, 1) + 0.0 for part in estimate))  # + 0.0: no -0.0


def title(evidence: Evidence) -> str:
    """What the table is of."""
    labels = evidence.labels
    words = [evidence.subject, str(labels.get("dataset")), threat_text(labels["norm"], labels["eps"]), f"n={labels.get('n')}"]
    return ", ".join([*words, f"budget {labels['budget_name']}"])


def frame(evidence: Evidence) -> pd.DataFrame:
    """A row per trial: accuracies as fractions with `low` and `high` (NaN: unfinished), passes per image, seconds in all.

    `bank`, `unseen`, `official`, `any10` and `any100` are accuracies by other counts of the same record.
    """
    names = [*OTHER, *(f"any{k}" for k in ANY)]
    columns = ["experiment", "trial", "on", "defense", "norm", "eps", "attack", "settings", "n", "k", *NUMBERS]
    columns += [part for name in names for part in _parts(name)] + ["forwards", "backwards", "seconds"]
    return pd.DataFrame([_record(entry) for entry in evidence.entries], columns=columns)


def waterfall_frame(evidence: Evidence) -> pd.DataFrame:
    """A row per bar of T15: accuracy, and the `difference` to the bar before with its paired interval, as fractions."""
    rows = []
    for bar in bars(evidence):
        row: dict[str, Any] = {"bar": bar.entry.trial, "as_published": bar.as_published}
        row |= {key: value for key, value in _record(bar.entry).items() if key in (*NUMBERS, *_parts("official"), "k", "n")}
        rows.append(row | (_named("difference", bar.step) if bar.step is not None else {}))
    columns = ["bar", "as_published", *NUMBERS, *_parts("difference"), *_parts("official"), "k", "n"]
    return pd.DataFrame(rows, columns=columns)


def further_scores(entry: Entry) -> str:
    """What else the cell says: the bank that was attacked, unseen banks, official bookkeeping, any of k."""
    words = {f"any of {k}": entry.any_of(k) for k in ANY if entry.experiment == "T11"}
    words |= {text: entry.other(kind) for kind, text in OTHER.items()}
    return "; ".join(f"{text} {percent(found)}" for text, found in words.items() if found is not None)


def lay_out(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for a terminal: a line per experiment with how it is to be read, then its trials."""
    lines = []
    for name, entries in sections(evidence):
        lines.append([f"{name} {EXPERIMENTS[name].title}", "", EXPERIMENTS[name].reading, *[""] * (len(COLUMNS) - 3)])
        lines += [[f"  {first}", *rest] for first, *rest in map(texts, entries)]
    kept = [k for k, column in enumerate(COLUMNS) if column not in WIDE]
    return [COLUMNS[k] for k in kept], [[line[k] for k in kept] for line in lines]


def notes(evidence: Evidence) -> list[str]:
    """What a reader must know beside the numbers."""
    lines = [
        "Accuracy in percent; x' are scored by K predictions per image with noise of their own. Forward, back: rows through "
        f"the network per image; seconds in all. {INTERVALS}",
    ]
    if evidence.of("T15", complete=False):
        lines.append("What stands in T15 as published, or as torchattacks' own, explains a number and measures no robustness.")
    if evidence.labels["budget_name"] == "quick":
        lines.append(
            "Budget quick: fewer images, steps and draws than the protocol, hence weaker attacks; no match for other budgets."
        )
    if not evidence.complete:
        lines.append("Trials with a number of chunks are not finished; the same command continues them.")
    return lines


def plain(evidence: Evidence) -> dict[str, Any]:
    """For --json."""
    return {
        "defense": evidence.subject,
        "labels": evidence.labels,
        "trials": json.loads(frame(evidence).to_json(orient="records")),
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def document(evidence: Evidence) -> str:
    """The evidence as Markdown: a section per experiment, with how it is to be read, and the waterfall with its differences."""
    parts = [f"# {title(evidence)}\n"]
    for name, entries in sections(evidence):
        experiment = EXPERIMENTS[name]
        parts.append(f"## {name} {experiment.title}\n\nReading: {experiment.reading}.\n")
        steps = {id(bar.entry): bar.step for bar in bars(evidence)} if name == "T15" else {}
        columns, lines = list(COLUMNS), [texts(entry) for entry in entries]
        if steps:
            columns.insert(2, "Change")
            for entry, line in zip(entries, lines, strict=True):
                step = steps.get(id(entry))
                line.insert(2, DASH if step is None else percent(step, signed=True))
        kept = [k for k, column in enumerate(columns) if column != "Besides" or any(line[k] for line in lines)]
        parts.append(markdown([columns[k] for k in kept], [[line[k] for k in kept] for line in lines]))
        row = published_row(evidence) if name == "T15" else None
        if row is not None:
            parts.append(f"Published for {row.method}: {published_text(row)} ({row.source}).\n")
        if steps:
            parts.append("Change: against the bar above, paired by image.\n")
    return "\n".join([*parts, *(f"{note}  " for note in notes(evidence))]).rstrip() + "\n"


def published_text(row: PublishedRow) -> str:
    """`PGD 77.8, AA 79.5`."""
    return ", ".join(f"{name} {value:.1f}" for name, value in (("PGD", row.pgd), ("AA", row.aa)) if value is not None)


def as_csv(numbers: pd.DataFrame) -> str:
    """A frame as its file has it."""
    return numbers.to_csv(index=False, float_format="%.6g")


def stem(evidence: Evidence) -> str:
    """The file name of a defence's tables and figures."""
    return f"{evidence.subject}-{group(evidence)}".replace("/", "_")


def stems(of_each: Sequence[Evidence]) -> list[str]:
    """The file name of each; those that would share one say behind it what differs: n, the seed, or their images."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, evidence in enumerate(of_each):
        places[stem(evidence)].append(i)
    names = [""] * len(of_each)
    for name, same in places.items():
        identities = [of_each[i].entries[0].result.identity for i in same]
        sizes = [f"-n{of_each[i].labels.get('n')}" for i in same]
        seeds = [f"-seed{identity['seed']}" for identity in identities]
        both = [size + seed for size, seed in zip(sizes, seeds, strict=True)]
        images = [f"{mark}-{identity['images'][:6]}" for mark, identity in zip(both, identities, strict=True)]
        for i, mark in zip(same, first_distinct([""] * len(same), sizes, seeds, both, images), strict=True):
            names[i] = name + mark
    return names


def group(evidence: Evidence) -> str:
    """What defences must share to stand in one figure, as part of a file name: data set, threat, budget."""
    labels = evidence.labels
    size = f"{round(labels['eps'] * 255, 3):g}" if labels["norm"] == "linf" else f"-{labels['eps']:g}"
    return f"{labels.get('dataset')}-{labels['norm']}{size}-{labels['budget_name']}".replace("/", "_")


def write(of_each: Sequence[Evidence], folder: Path) -> list[Path]:
    """The table of each as CSV and Markdown, and its waterfall as CSV; returns the paths."""
    paths = []
    for evidence in of_each:
        if not any(entry.complete for entry in evidence.entries):
            continue
        contents = {".csv": as_csv(frame(evidence)), ".md": document(evidence)}
        if any(bar.entry.complete for bar in bars(evidence)):
            contents["-waterfall.csv"] = as_csv(waterfall_frame(evidence))
        for suffix, content in contents.items():
            path = Path(folder) / f"{stem(evidence)}{suffix}"
            write_text(path, content)
            paths.append(path)
    return paths


def sections(evidence: Evidence) -> list[tuple[str, list[Entry]]]:
    """Experiments that have trials, in order, with all of them."""
    found = [(name, evidence.of(name, complete=False)) for name in EXPERIMENTS]
    return [(name, entries) for name, entries in found if entries]


def texts(entry: Entry) -> list[str]:
    """A trial as text, by COLUMNS."""
    if not entry.complete:
        return [entry.trial, f"{entry.result.chunks_done} of {entry.result.chunks} chunks", "", "", "", "", ""]
    table = entry.result.frame
    cost = [f"{table[kind].mean():,.0f}" for kind in ("forwards", "backwards")]
    k = str(entry.result.identity["repeats"])
    return [entry.trial, percent(entry.estimate), further_scores(entry), k, *cost, f"{table['seconds'].sum():,.1f}"]


def _record(entry: Entry) -> dict[str, Any]:
    labels, identity = entry.result.labels, entry.result.identity
    row: dict[str, Any] = {"experiment": entry.experiment, "trial": entry.trial, "on": labels["on"]}
    clean = labels["attack"] == "clean"  # its label says the threat of the others
    row |= {
        "defense": labels["defense"],
        "norm": labels["norm"],
        "eps": 0.0 if clean else entry.eps,
        "attack": labels["attack"],
    }
    row |= {"settings": json.dumps(identity["attack"], sort_keys=True, default=str), "n": labels["n"], "k": identity["repeats"]}
    if not entry.complete:
        return row
    table = entry.result.frame
    row |= dict(zip(NUMBERS, entry.estimate, strict=True))
    others = {kind: entry.other(kind) for kind in OTHER}
    others |= {f"any{k}": entry.any_of(k) for k in ANY if entry.experiment == "T11"}
    for kind, found in others.items():
        row |= _named(kind, found) if found is not None else {}
    row |= {kind: table[kind].mean() for kind in ("forwards", "backwards")}
    return row | {"seconds": table["seconds"].sum()}


def _parts(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return dict(zip(_parts(name), estimate, strict=True))
