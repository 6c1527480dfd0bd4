"""What experiments will take: passes reckoned, rates measured here, and the time left as chunks come in."""

import copy
import math
import time
from dataclasses import dataclass

import torch

from rush_bench.attacks.cost import prediction_rows
from rush_bench.audits.experiments import Trial
from rush_bench.certificates.sampling import Sampling
from rush_bench.datasets import Images
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.evaluation.runner import Job
from rush_bench.noise import Stream
from rush_bench.records import Cell, CellStore


@dataclass(frozen=True)
class Cost:
    """Cells with chunks missing, their rows forward and backward, and the seconds they are expected to take here."""

    jobs: int
    forwards: float
    backwards: float
    seconds: float


@dataclass(frozen=True)
class Planned:
    """The jobs of one defence, and what is expected of those that are not done yet."""

    defense: Defense
    jobs: tuple[Job, ...]
    seconds: dict[str, float]  # by cell key, per image
    costs: dict[str, Cost]  # by experiment, of what is missing
    certificates: tuple[tuple[str, Sampling], ...] = ()


def priced(
    defense: Defense,
    jobs: list[tuple[Trial, Job]],
    data: Images,
    certificates: tuple[tuple[str, Sampling], ...],
    cells: CellStore,
) -> Planned:
    """The jobs of one defence with what is expected of them, at rates measured once for each network among them."""
    speed: dict[int, tuple[float, float]] = {}
    seconds: dict[str, float] = {}
    costs: dict[str, Cost] = {}
    for trial, job in jobs:
        target = job.defense
        body = id(getattr(target, "body", target))
        if body not in speed:
            speed[body] = rates(target, data)
        forwards, backwards = job.attack.passes(target) if job.attack is not None else (0.0, 0.0)
        forwards += job.cell.identity["repeats"] * prediction_rows(target)
        fresh = job.cell.key not in seconds
        seconds[job.cell.key] = forwards * speed[body][0] + backwards * speed[body][1]
        before = costs.get(trial.experiment, Cost(0, 0, 0, 0))
        left = images_left(cells, job.cell)
        if fresh and left:  # a cell of two experiments is paid once
            costs[trial.experiment] = Cost(
                before.jobs + 1,
                before.forwards + forwards * left,
                before.backwards + backwards * left,
                before.seconds + seconds[job.cell.key] * left,
            )
    return Planned(defense, tuple(job for _, job in jobs), seconds, costs, certificates)


def images_left(cells: CellStore, cell: Cell) -> int:
    """Images of the chunks that are missing."""
    return sum(len(cell.rows(c)) for c in range(cell.chunks) if not cells.has(cell, c))


def rates(defense: Defense, data: Images, rows: int = 512) -> tuple[float, float]:
    """Seconds a row takes forward, and more for its way back: measured on a few images of the data."""
    part = data.take(list(range(min(len(data), 32))))
    images, labels = part.floats().to(defense.device), part.labels.to(defense.device)
    draws = 1 if defense.deterministic else max(1, rows // len(part))
    stream = Stream(0, "rates", part.index)
    passes = copy.copy(defense.passes)

    def counted() -> tuple[int, int]:
        return defense.passes.forwards, defense.passes.backwards

    best = [math.inf, math.inf]
    for _ in range(2):  # the first call pays for warming up
        begun, before = time.perf_counter(), counted()
        predictions = max(1, draws // max(defense.draws, 1))
        for k in range(predictions):
            defense.predict(images, stream.skip(k))
        _wait(defense.device)
        # a custom defence may not count; a purifier counts its steps
        forward_count = counted()[0] - before[0] or len(part) * predictions * max(defense.draws, 1)
        forward = (time.perf_counter() - begun) / forward_count
        begun, before = time.perf_counter(), counted()
        try:
            defense.gradient(images, labels, "ce", draws, stream)
            _wait(defense.device)
            forwards, backwards = (
                after - earlier or len(part) * draws for after, earlier in zip(counted(), before, strict=True)
            )
            backward = (time.perf_counter() - begun - forwards * forward) / backwards
        except (BadInput, RuntimeError):  # no gradients: the cells that need them will fail with the reason
            backward = forward
        best = [min(best[0], forward), min(best[1], max(backward, 0.1 * forward))]
    defense.passes.forwards, defense.passes.backwards = passes.forwards, passes.backwards
    return best[0], best[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Forecast:
    """Compares measured with predicted time, and reports it after the first chunk of every experiment."""

    def __init__(self, seconds: dict[str, float], store: CellStore, planned: list[Planned]) -> None:
        self.seconds, self.seen = seconds, set[tuple[str, str]]()
        self.predicted = self.taken = 0.0
        unique = {job.cell.key: job for plan in planned for job in plan.jobs}
        self.left = {
            (job.cell.key, c): self._of(job, c)
            for job in unique.values()
            for c in range(job.cell.chunks)
            if not store.has(job.cell, c)
        }

    def _of(self, job: Job, c: int) -> float:
        seconds = self.seconds[job.cell.key]
        return 0.0 if math.isnan(seconds) else seconds * len(job.cell.rows(c))

    def after(self, job: Job, c: int, seconds: float) -> str | None:
        """Note a chunk; a line after the first of its experiment."""
        predicted = self._of(job, c)
        self.left.pop((job.cell.key, c), None)
        if predicted:
            self.predicted, self.taken = self.predicted + predicted, self.taken + seconds
        labels = job.cell.labels
        key = (labels["subject"], labels["experiment"])
        if key in self.seen or not predicted:
            return None
        self.seen.add(key)
        ratio = self.taken / self.predicted
        n = len(job.cell.rows(c))
        return (
            f"{labels['subject']} {labels['experiment']} ({labels['trial']}): {n / seconds:.3g} images/s, "
            f"{seconds:.1f} s where {predicted:.1f} s were predicted; so far {ratio:.2f} times the prediction, "
            f"about {ratio * sum(self.left.values()) / 60:.0f} min of it left"
        )
