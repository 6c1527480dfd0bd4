"""The cells of one defence by experiment and trial: what checks, tables and figures are made from. No torch is imported."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rush_bench.audits.experiments import EXPERIMENTS
from rush_bench.audits.roles import AS_PUBLISHED, Role, role_of
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, any_of_k, clopper_pearson, interval, paired_difference


@dataclass(frozen=True)
class Entry:
    """A trial and its cell."""

    experiment: str
    trial: str
    result: CellResult

    @property
    def complete(self) -> bool:
        """Whether every chunk is there; only then has it numbers."""
        return self.result.complete

    @property
    def attack(self) -> dict[str, Any]:
        """The attack with its settings, as the record has them."""
        return self.result.identity["attack"]

    @property
    def role(self) -> Role | None:
        """What checks, claims and figures know it by."""
        return role_of(self.experiment, self.attack, self.result.labels["on"])

    @property
    def eps(self) -> float:
        """Radius of the threat."""
        return float(self.result.labels["eps"])

    @property
    def correct(self) -> NDArray[np.int64]:
        """Right predictions of each image (n,)."""
        return self.result.frame["correct"].to_numpy()

    @property
    def repeats(self) -> NDArray[np.int64]:
        """Predictions of each image (n,)."""
        return self.result.frame["repeats"].to_numpy()

    @property
    def largest_class(self) -> float:
        """The share of the images that have the most frequent label."""
        return float(np.unique(self.result.frame["label"].to_numpy(), return_counts=True)[1].max() / len(self.correct))

    @property
    def rates(self) -> NDArray[np.float64]:
        """Estimated chance of being right of each image (n,)."""
        return self.correct / self.repeats

    @property
    def estimate(self) -> Estimate:
        """Accuracy with its 95 % interval."""
        return interval(self.correct, self.repeats, self.result.labels["deterministic"])

    def other(self, kind: str) -> Estimate | None:
        """Accuracy by other counts of the record: `bank`, `unseen` (banks), `official` (bookkeeping); None without."""
        frame = self.result.frame
        if f"{kind}_correct" not in frame:
            return None
        right, of = frame[f"{kind}_correct"].to_numpy(), frame[f"{kind}_repeats"].to_numpy()
        return interval(right, of, bool((of == 1).all()))

    def any_of(self, k: int) -> Estimate | None:
        """Accuracy where one wrong prediction of k loses (A2); None where K is smaller than k."""
        if self.result.labels["deterministic"] or self.repeats.min() < k:
            return None
        right = 1 - any_of_k(self.correct, self.repeats, k)
        return Estimate(float(right.mean()), *clopper_pearson(float(right.sum()), len(right)))

    def minus(self, other: "Entry") -> Estimate:
        """This accuracy less the other's, paired by image (A3)."""
        return paired_difference(self.correct, self.repeats, other.correct, other.repeats)


@dataclass(frozen=True)
class Evidence:
    """All trials of one defence (`subject`) at one threat.

    `certificates` are finished ones of the same weights and noise; `uncertified` is how many were asked for and are not there.
    """

    subject: str
    labels: dict[str, Any]
    entries: tuple[Entry, ...]
    certificates: tuple[CellResult, ...] = ()
    uncertified: int = 0

    def of(self, experiment: str, complete: bool = True) -> list[Entry]:
        """The trials of an experiment in the order of the plan; with `complete`, finished ones alone."""
        return [entry for entry in self.entries if entry.experiment == experiment and (entry.complete or not complete)]

    def of_roles(self, *roles: Role) -> list[Entry]:
        """The finished trials of these roles in the order of the plan."""
        return [entry for entry in self.entries if entry.complete and entry.role in roles]

    def get(self, role: Role) -> Entry | None:
        """The first finished trial of a role, None where there is none."""
        return next(iter(self.of_roles(role)), None)

    def own(self) -> Iterator[Entry]:
        """Finished attacks on the defence itself at the threat itself: those that may lower its worst case."""
        for entry in self.entries:
            labels = entry.result.labels
            itself = (
                labels.get("on", "") == "" and labels.get("scale", 1.0) == 1.0 and labels["attack"] not in ("clean", "worst")
            )
            if entry.complete and itself and not labels.get("other_threat"):
                yield entry

    @property
    def worst(self) -> Entry | None:
        """The per-image worst case over all."""
        return self.get(Role.WORST)

    @property
    def replay(self) -> Entry | None:
        """The highest of the published evaluations replayed on these weights (T15; PGD-20 of a deterministic defence)."""
        return max(self.of_roles(*AS_PUBLISHED, Role.USUAL_PGD), key=lambda entry: entry.estimate.value, default=None)

    @property
    def clean(self) -> Entry | None:
        """Accuracy on clean images."""
        return next((entry for entry in self.of("T10") if entry.attack["name"] == "clean"), None)

    @property
    def complete(self) -> bool:
        """Whether all its trials are finished, and its certificates."""
        return not self.uncertified and all(entry.complete for entry in self.entries)


def entries_of(results: Iterable[CellResult]) -> list[Entry]:
    """Cells of settle as entries, in the order of the experiments; other cells are passed over."""
    found = [Entry(r.labels["experiment"], r.labels["trial"], r) for r in results if r.labels.get("experiment") in EXPERIMENTS]
    order = list(EXPERIMENTS)
    return sorted(found, key=lambda entry: (order.index(entry.experiment), entry.result.labels.get("order", 0)))
