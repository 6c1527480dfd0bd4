"""Trainings of one system that differ in their seed alone: their mean is a row beside one each. Pure functions of records."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rush_bench.files import digest
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, any_of_k, clopper_pearson, interval

if TYPE_CHECKING:
    from rush_bench.report.rows import Row


@dataclass(frozen=True)
class Training:
    """How a model came about: its system, the digest of all that decides the weights but the seed; the seed; and the cost.

    `passes` are forward equivalents (`rush_bench.training.cost`), `images` counts one as often as it was shown, `seconds` are
    those of the device that trained. None where the card does not tell.
    """

    system: str
    seed: int
    passes: float | None = None
    images: float | None = None
    seconds: float | None = None


# By the SHA-256 of the weights and the recipe: two recipes may end in the same weights and differ in what stands before them.
Trainings = Mapping[tuple[str, str], Training]


def training_named(labels: Mapping[str, Any], trainings: Trainings) -> Training | None:
    """The training of the model that these labels name, of a cell or a row; None where its card is not at hand."""
    return trainings.get((str(labels.get("sha256")), str(labels.get("recipe"))))


def with_means(found: Iterable["Row"]) -> list["Row"]:
    """The rows, and one for the mean over each set of two or more that differ in the training's seed alone."""
    rows = list(found)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.training is not None:
            groups[_terms(row)].append(row)
    means, members = [], set()
    for group in groups.values():
        seeds = [row.training.seed for row in group if row.training is not None]
        if len(set(seeds)) == len(group) > 1 and (mean := _mean(group)) is not None:
            means.append(mean)
            members |= {id(row) for row in group}
    return [dataclasses.replace(row, in_mean=id(row) in members) for row in rows] + means


def _terms(row: "Row") -> str:
    """What trainings of a system must agree in besides, see `terms`."""
    assert row.training is not None
    return digest([row.training.system, sorted(map(terms, row.parts)), row.labels["suite"]])


def terms(cell: CellResult) -> str:
    """All that a cell measured but the weights: attack and its settings, defence, images, threat, K, seed."""
    same = {key: cell.identity[key] for key in ("images", "threat", "seed", "repeats", "chunk")}
    # the keys of cells name the weights
    settings = {key: value for key, value in cell.identity["attack"].items() if key != "of"}
    return digest([cell.labels["attack"], cell.labels["n"], settings, defense_but_weights(cell), same])


def defense_but_weights(cell: CellResult) -> dict[str, Any]:
    """What a cell's identity says of its defence, which trainings of a system have in common."""
    return {key: value for key, value in cell.identity["defense"].items() if key != "weights"}


def _mean(group: Sequence["Row"]) -> "Row | None":
    """The mean over trainings, its interval over images and draws, and the standard deviation over trainings, as fractions."""
    ranked = sorted(group, key=lambda row: row.training.seed if row.training else 0)
    first = ranked[0]
    columns = [name for name in first.estimates if all(name in row.estimates for row in ranked)]
    if not columns:
        return None
    cells = [row.cells for row in ranked]
    estimates = {name: _pooled(name, cells) for name in columns}
    spread = {name: float(np.std([row.estimates[name].value for row in ranked], ddof=1)) for name in columns}
    trainings = [row.training for row in ranked if row.training is not None]
    costs: dict[str, Any] = {
        key: _average([getattr(training, key) for training in trainings]) for key in ("passes", "images", "seconds")
    }
    notes = dict.fromkeys(note for row in ranked for note in row.notes)
    bounds = dict.fromkeys(name for row in ranked for name in row.bounds if name in columns)
    return dataclasses.replace(
        first,
        weights="",
        cells={},
        parts=(),
        estimates=estimates,
        spread=spread,
        notes=tuple(notes),
        bounds=tuple(bounds),
        training=dataclasses.replace(trainings[0], **costs),
        training_seeds=tuple(training.seed for training in trainings),
    )


def _average(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if len(known) == len(numbers) else None


def _pooled(name: str, cells: Sequence[Mapping[str, CellResult]]) -> Estimate:
    """Over the trainings' mean rate of each image, as over the rates of a randomised defence (protocol 1, 2)."""
    frames = [by_column[name].frame for by_column in cells]
    kind = name.removeprefix(cells[0][name].labels["attack"]).removeprefix("_")
    if kind.startswith("any"):
        k = int(kind.removeprefix("any"))
        right = 1 - np.mean([any_of_k(f["correct"].to_numpy(), f["repeats"].to_numpy(), k) for f in frames], axis=0)
        return Estimate(float(right.mean()), *clopper_pearson(float(right.sum()), len(right)))
    prefix = "bank_" if kind == "bank" else ""
    correct, repeats = (np.sum([f[prefix + part].to_numpy() for f in frames], axis=0) for part in ("correct", "repeats"))
    return interval(correct, repeats, deterministic=False)
