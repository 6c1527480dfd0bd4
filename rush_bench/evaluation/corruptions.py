"""Accuracy under common corruptions: a cell per defence, corruption and severity; nothing is attacked, x' is the image.

Cells are those of the records, under `<results>/corruptions`, so that no table of attacks takes them for its rows.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets import Images
from rush_bench.datasets.corruptions import SEVERITIES, CorruptedImages
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.evaluation.behaviour import sample_of
from rush_bench.evaluation.runner import default_repeats
from rush_bench.evaluation.score import Meter, made_on, score
from rush_bench.evaluation.work import Job, Run, cell_of, check_asked, work
from rush_bench.noise import Stream
from rush_bench.records import Arrays, Cell, CellStore

FOLDER = "corruptions"


@dataclass(frozen=True)
class _Job(Job):
    load: Callable[[str, int], Images]

    @property
    def where(self) -> tuple[str, int]:
        return self.cell.labels["corruption"], self.cell.labels["severity"]

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        return " ".join(map(str, (self.defense.name, *self.where)))

    def chunk(self, store: CellStore, c: int) -> tuple[Arrays, None]:
        """Score the corrupted images of chunk c."""
        part, identity = self.load(*self.where).take(list(self.cell.rows(c))), self.cell.identity
        images, labels = part.floats().to(self.defense.device), part.labels.to(self.defense.device)
        # Another purpose in each cell: the draws of an image are independent over severities and corruptions.
        stream = Stream(identity["seed"], "corruption/{}/{}".format(*self.where))
        meter = Meter(self.defense)
        scored = score(self.defense, images, labels, part.index, stream, identity["repeats"])
        return {
            "index": part.index.numpy(),
            "label": part.labels.numpy(),
            **scored,
            "distance": np.zeros(len(part)),  # from the image that was given, which is the corrupted one
            **meter.cost(len(part)),
            "made_on": made_on(self.defense),
        }, None


def evaluate(
    defenses: Sequence[Defense],
    data: CorruptedImages,
    *,
    out: Path | str | None = None,
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 500,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | Deadline | None = None,
    quiet: bool = False,
) -> Run:
    """Score defences on each corruption and severity. The same call again, from any number of processes, continues.

    `repeats` is K, the independent predictions of an image in each cell (None: 1 if deterministic, else a fifth of an
    attack's, 20 at one vote and 4 at 64: a mean over 75 cells needs no more). `out` is the results folder (None: a
    temporary one); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks. An error fails its cell (see
    `rush_bench.evaluation.work`); bad input raises BadInput before anything runs.
    """
    jobs = plan(defenses, data, shard, seed=seed, repeats=repeats, chunk=chunk)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder / FOLDER)
    failed, done = work(store, jobs, folder, title=FOLDER, shard=shard, deadline=Deadline.after(max_minutes), quiet=quiet)
    return Run([store.result(job.cell) for job in jobs], failed, folder, done)


def plan(
    defenses: Sequence[Defense],
    data: CorruptedImages,
    shard: tuple[int, int] = (1, 1),
    *,
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 500,
) -> list[_Job]:
    """The cells of defences on each corruption and severity."""
    load = lru_cache(maxsize=1)(data.images)  # jobs of one corruption and severity follow each other
    defenses, _ = check_asked(defenses, load(data.corruptions[0], SEVERITIES[0]), shard, seed)
    jobs = []
    for corruption in data.corruptions:
        sample = sample_of(load(corruption, SEVERITIES[0]))  # for the guard: one look per corruption
        for severity in SEVERITIES:
            images = load(corruption, severity)
            for defense in defenses:
                cell = _cell(defense, images, corruption, severity, seed, repeats, chunk)
                jobs.append(_Job(cell, defense, sample, load))
    return jobs


def _cell(defense: Defense, images: Images, corruption: str, severity: int, seed: int, repeats: int | None, chunk: int) -> Cell:
    which: dict[str, Any] = {"corruption": corruption, "severity": severity}
    return cell_of(
        defense,
        images,
        attack={"name": "corruption", **which},
        threat=None,
        labels={"attack": "corruption", "suite": FOLDER, **which},
        seed=seed,
        repeats=1 if defense.deterministic else default_repeats(defense.draws, quick=True) if repeats is None else repeats,
        chunk=chunk,
    )
