"""From cells to rows: which cells belong together, and what each is worth. Pure functions of records (protocol 8)."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rush_bench.attacks.suites import is_quick
from rush_bench.errors import BadInput
from rush_bench.files import digest
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, any_of_k, clopper_pearson, interval
from rush_bench.report.caveats import copies_caveat, gradient_caveat, label_caveat, outdone, unusual_settings
from rush_bench.report.trainings import Training, Trainings, training_named, with_means

UNKNOWN = "gradients were not looked at: an older record"
ANY_OF = 10  # the attacker's tries in the any-of-k column (protocol 5)


@dataclass(frozen=True)
class Row:
    """One (defence, images, threat, suite) with an Estimate (fractions) for each finished column.

    Columns are the attacks' names, `aa_bank` and `apgd_bank` (scored on the bank that was attacked), and `worst_any10`.
    `bounds` are those that are upper bounds, no measure of robustness: their attack had no true gradient or was outdone by far
    by another, or `worst` rests on such an attack. `notes` name what is unfinished, differs in settings, or is wrong with
    gradients or labels. `cells` has the record behind each estimate, `parts` all records of the row, unfinished ones too.
    `training`: how the model came about, where its card is at hand. A mean over trainings has their `training_seeds` and in
    `spread` the standard deviation over them of each column; `in_mean`: there is such a row of this one and others.
    """

    labels: dict[str, Any]
    weights: str
    threat: dict[str, Any] | None
    seed: int
    repeats: int
    estimates: dict[str, Estimate]
    notes: tuple[str, ...]
    bounds: tuple[str, ...] = ()
    cells: Mapping[str, CellResult] = field(default_factory=dict, compare=False, repr=False)
    parts: tuple[CellResult, ...] = field(default=(), compare=False, repr=False)
    training: Training | None = None
    training_seeds: tuple[int, ...] = ()
    spread: Mapping[str, float] = field(default_factory=dict)
    in_mean: bool = False

    @property
    def quick(self) -> bool:
        """Whether the suite is a quick one, whose columns are weaker than their names."""
        return bool(self.labels.get("quick", is_quick(str(self.labels["suite"]))))

    @property
    def threat_text(self) -> str:
        """`linf 8/255`, `l2 0.5`, or `none` where only clean images were measured."""
        return threat_text(self.threat["norm"], self.threat["eps"]) if self.threat else "none"

    def is_linf8(self) -> bool:
        """Whether the threat is l-inf 8/255, that of Table 1."""
        return self.threat is not None and self.threat["norm"] == "linf" and math.isclose(self.threat["eps"], 8 / 255)


def threat_text(norm: str, eps: float) -> str:
    """`linf 8/255` or `l2 0.5`."""
    return f"{norm} {round(eps * 255, 3):g}/255" if norm == "linf" else f"{norm} {eps:g}"


def rows(results: Iterable[CellResult], trainings: Trainings | None = None) -> list[Row]:
    """Rows in the order of defence, data set, threat, suite, n. Cells that differ in any setting never share one.

    The clean accuracy has no threat and joins every row of its defence, images, seed and K. `trainings` add the
    mean over those that differ in their seed alone. Of other kinds of cells see `attacks_in`.
    """
    results = attacks_in(results)
    groups: dict[str, list[CellResult]] = defaultdict(list)
    clean: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        if result.labels["attack"] == "clean":
            clean[_group(result, with_threat=False)].append(result)
        else:
            groups[_group(result, with_threat=True)].append(result)
    found, joined = [], set()
    for cells in groups.values():
        key = _group(cells[0], with_threat=False)
        joined.add(key)
        differences = _differences(cells)
        found += [_row([*_single_clean_cell(clean[key]), *variant], differences) for variant in _variants(cells)]
    found += [_row(_single_clean_cell(cells), {}) for key, cells in clean.items() if key not in joined]
    found = _with_digests(found)
    if trainings:
        found = [dataclasses.replace(row, training=training_named(row.labels, trainings)) for row in found]
    return sorted(with_means(found), key=_order)


def attacks_in(results: Iterable[CellResult]) -> list[CellResult]:
    """The cells of attacks: without certificates, which count draws and no answers, and without experiments of `settle`, many
    of which share an attack's name. BadInput where there are only these: it says what shows them.
    """
    results = list(results)
    found = [cell for cell in results if cell.labels["attack"] != "certify" and "experiment" not in cell.labels]
    if results and not found:
        place = results[0].folder.parents[1]
        if any("experiment" in cell.labels for cell in results):
            what, show = "experiments of settle", f"read its tables, {place / '*.md'}"
        else:
            what, show = "certificates", f"show them by `rush-bench certify --read {place / 'runs' / '*'}`"
        raise BadInput(
            f"{place} holds {what}, and attacks alone are tabulated and compared: {show}, or run `rush-bench report`"
        )
    return found


def _with_digests(found: Sequence[Row]) -> list[Row]:
    """Rows of one name whose networks differ get the beginning of their weights' digest beside it."""
    several: dict[str, set[str]] = defaultdict(set)
    for row in found:
        several[row.labels["defense"]].add(row.weights)
    return [
        dataclasses.replace(row, labels={**row.labels, "defense": f"{name} ({row.weights[:6]})"})
        if len(several[name := row.labels["defense"]]) > 1
        else row
        for row in found
    ]


def estimate(result: CellResult, correct: str = "correct", repeats: str = "repeats") -> Estimate:
    """Accuracy of a finished cell with its interval (protocol 1, 2), as fractions."""
    if not result.complete:
        raise ValueError(f"{result.folder} is not finished")
    right, of = result.arrays[correct], result.arrays[repeats]
    one_bank = correct.startswith("bank") and bool((of == 1).all())
    return interval(right, of, result.labels["deterministic"] or one_bank)


def _group(result: CellResult, with_threat: bool) -> str:
    """What cells of one row agree in: all that is hashed but the attack, and the names they go by."""
    left_out = {"attack"} if with_threat else {"attack", "threat"}
    same = {name: value for name, value in result.identity.items() if name not in left_out}
    return digest([same, result.labels["defense"], result.labels["dataset"], result.labels["suite"]])


def _single_clean_cell(cells: Sequence[CellResult]) -> list[CellResult]:
    """One clean cell, a finished one if there is any: they estimate the same quantity."""
    return sorted(cells, key=lambda cell: (not cell.complete, cell.folder))[:1]


def _variants(cells: Sequence[CellResult]) -> list[list[CellResult]]:
    """Split a group that holds one attack under several settings: a worst case names its parts, the rest stand alone."""
    if len({cell.labels["attack"] for cell in cells}) == len(cells):
        return [list(cells)]
    rest, variants = [cell for cell in cells if cell.labels["attack"] != "worst"], []
    taken: set[str] = set()
    for worst in (cell for cell in cells if cell.labels["attack"] == "worst"):
        of = set(worst.identity["attack"].get("of", ()))
        parts = [cell for cell in rest if digest(cell.identity) in of]
        taken |= {digest(cell.identity) for cell in parts}
        variants.append([*parts, worst])
    return variants + [[cell] for cell in rest if digest(cell.identity) not in taken]


def _differences(cells: Sequence[CellResult]) -> dict[str, str]:
    """For each cell (by key) whose attack is there under several settings, those that differ, in words."""
    differences: dict[str, str] = {}
    for name in {cell.labels["attack"] for cell in cells} - {"worst"}:
        same = [cell for cell in cells if cell.labels["attack"] == name]
        keys = sorted({key for cell in same for key in cell.identity["attack"]} - {"of"})
        differ = [key for key in keys if len({str(cell.identity["attack"].get(key)) for cell in same}) > 1]
        for cell in same:
            words = ", ".join(f"{key}={cell.identity['attack'].get(key)}" for key in differ)
            differences |= {digest(cell.identity): words} if differ else {}
    return differences


def _row(cells: Sequence[CellResult], differences: dict[str, str]) -> Row:
    estimates, behind = dict[str, Estimate](), dict[str, CellResult]()
    notes, caveats = list[str](), dict[str, list[str]]()
    for cell in cells:
        name = cell.labels["attack"]
        differing = differences.get(digest(cell.identity)) if differences else None
        if differing := differing or cell.remembered(unusual_settings):
            notes.append(f"{name} with {differing}")
        if not cell.complete:
            notes.append(f"{name}: {cell.chunks_done} of {cell.chunks} chunks")
            continue
        summarised = cell.remembered(summary)
        estimates |= {part: Estimate(*numbers) for part, numbers in summarised["estimates"].items()}
        behind |= dict.fromkeys(summarised["estimates"], cell)
        if summarised["labels"]:
            notes.append(f"{name}: {summarised['labels']}")
        if (caveat := summarised["caveat"]) != "":
            caveats.setdefault(UNKNOWN if caveat is None else caveat, []).append(name)
    for name, caveat in outdone({cell.labels["attack"]: cell for cell in cells if cell.complete}).items():
        caveats.setdefault(caveat, []).append(name)
    notes += [f"{', '.join(names)}: {caveat}" for caveat, names in caveats.items()]
    untrue = {name for caveat, names in caveats.items() if caveat != UNKNOWN for name in names}
    bounded = untrue | {"worst"} if untrue else untrue
    bounds = [name for name, cell in behind.items() if cell.labels["attack"] in bounded]
    first = next((cell for cell in cells if cell.labels["attack"] != "clean"), cells[0])
    if copies := copies_caveat(first):
        notes.append(copies)
    identity = first.identity
    return Row(
        first.labels,
        identity["weights"],
        identity["threat"],
        identity["seed"],
        identity["repeats"],
        estimates,
        tuple(notes),
        tuple(bounds),
        behind,
        tuple(cells),
    )


def summary(cell: CellResult) -> dict[str, Any]:
    """What a row takes from the arrays of a finished cell: `estimates` by column, `caveat` (see `gradient_caveat`), `labels`
    (see `label_caveat`)."""
    name = cell.labels["attack"]
    estimates = {name: estimate(cell)}
    if "bank_correct" in cell.arrays:
        estimates[f"{name}_bank"] = estimate(cell, "bank_correct", "bank_repeats")
    if name == "worst" and not cell.labels["deterministic"] and cell.identity["repeats"] >= ANY_OF:
        estimates[f"worst_any{ANY_OF}"] = _any(cell)
    return {"estimates": estimates, "caveat": gradient_caveat(cell), "labels": label_caveat(cell)}


def _any(cell: CellResult) -> Estimate:
    """Accuracy when one wrong prediction of ten loses. One such trial per image would be Bernoulli; its Clopper-Pearson
    interval is wide enough for the mean of chances, which spreads less."""
    right = 1 - any_of_k(cell.arrays["correct"], cell.arrays["repeats"], ANY_OF)
    return Estimate(float(right.mean()), *clopper_pearson(float(right.sum()), len(right)))


def transferred_from(dataset: str, before: str | None) -> str | None:
    """The data set of the pre-training where it is another one (STL-10's is its unlabelled split); None else."""
    return None if before == dataset != "stl10" else before


def _order(row: Row) -> tuple[Any, ...]:
    labels, threat = row.labels, row.threat or {"norm": "", "eps": 0}
    return (
        labels["dataset"],
        transferred_from(labels["dataset"], labels.get("pretrain_dataset")) or "",
        threat["norm"],
        threat["eps"],
        row.quick,
        labels["suite"],
        -labels["n"],
        labels.get("model") or labels["defense"],
        labels.get("votes") or 0,
        not row.training_seeds,
        row.seed,
        row.repeats,
        row.weights,
        row.notes,
        json.dumps(row.estimates),
    )
