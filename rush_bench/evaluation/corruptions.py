"""Accuracy under common corruptions: a cell a defence, corruption and severity; nothing is attacked, x' is the image.

Cells are those of the records, under `<results>/corruptions`, so that no table of attacks takes them for its rows.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets import Images
from rush_bench.datasets.corruptions import SEVERITIES, CorruptedImages
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.evaluation.records import FORMAT, Cell, CellResult, CellStore
from rush_bench.evaluation.runner import check_fits, default_repeats
from rush_bench.evaluation.score import score
from rush_bench.evaluation.turns import Status, bar_for, in_turn
from rush_bench.files import digest
from rush_bench.noise import Stream

FOLDER = "corruptions"


@dataclass
class CorruptionRun:
    """What `evaluate` leaves: its cells, what failed, and whether this call's share is all there."""

    results: list[CellResult]
    folder: Path
    done: bool
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every cell has all its chunks."""
        return all(result.complete for result in self.results)


@dataclass(frozen=True)
class _Job:
    cell: Cell
    defense: Defense
    corruption: str
    severity: int

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        return f"{self.defense.name} {self.corruption} {self.severity}"


def evaluate(
    defenses: Sequence[Defense],
    data: CorruptedImages,
    *,
    out: Path | str | None = None,
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 500,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
) -> CorruptionRun:
    """Score defences on each corruption and severity. The same call again, from any number of processes, goes on.

    `repeats` is K, the independent predictions of an image in each cell (None: 1 if deterministic, else a fifth of an
    attack's, 20 at one vote and 4 at 64: a mean over 75 cells needs no more). `out` is the results folder (None: a
    temporary one); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks. A prediction that is not
    finite fails its cell; bad input raises BadInput before anything runs.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise BadInput(f"shard {shard[0]}/{shard[1]}: write k/n with 1 <= k <= n")
    names = [defense.name for defense in defenses]
    if len(set(names)) < len(names):
        raise BadInput(f"two defences share a name ({', '.join(names)}); give each its own")
    load = lru_cache(maxsize=1)(data.images)  # jobs of one corruption and severity follow each other
    jobs = []
    for corruption in data.corruptions:
        for severity in SEVERITIES:
            images = load(corruption, severity)
            for defense in defenses:
                check_fits(defense, images)
                cell = _cell(defense, images, corruption, severity, seed, repeats, chunk)
                jobs.append(_Job(cell, defense, corruption, severity))
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder / FOLDER)
    for job in jobs:
        store.open(job.cell)
    chunks = [(job, c) for job in jobs for c in range(job.cell.chunks)][shard[0] - 1 :: shard[1]]
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    failed: dict[str, str] = {}

    def status(job: _Job, c: int) -> Status:
        return "drop" if job.label in failed else "ready"

    with bar_for(store, "corruptions", chunks, quiet) as bar:
        for job, c in in_turn(store, chunks, bar, deadline, status):
            try:
                arrays = _chunk(job, c, load(job.corruption, job.severity), seed)
            except RushBenchError as error:
                failed[job.label] = str(error)
                bar.note(f"failed: {job.label}: {error}")
                continue
            store.write(job.cell, c, arrays)
            rate = arrays["correct"].sum() / arrays["repeats"].sum()
            bar.advance(f"{rate:.1%} right in the last chunk", title=job.label)
    done = all(job.label in failed or store.has(job.cell, c) for job, c in chunks)
    return CorruptionRun([store.result(job.cell) for job in jobs], folder, done, failed)


def _cell(defense: Defense, images: Images, corruption: str, severity: int, seed: int, repeats: int | None, chunk: int) -> Cell:
    who = defense.identity()
    identity = {
        "format": FORMAT,
        "weights": who.get("weights") or digest(who),
        "defense": who,
        "attack": {"name": "corruption", "corruption": corruption, "severity": severity},
        "threat": None,
        "images": images.digest,
        "seed": seed,
        "repeats": 1 if defense.deterministic else repeats or default_repeats(defense.draws, quick=True),
        "chunk": chunk,
    }
    labels = {
        **defense.labels(),
        "split": images.split,
        "dataset": images.name,
        "attack": "corruption",
        "suite": "corruptions",
        "corruption": corruption,
        "severity": severity,
        "n": len(images),
        "deterministic": defense.deterministic,
        "classes": defense.classes,
    }
    return Cell(identity, labels)


def _chunk(job: _Job, c: int, data: Images, seed: int) -> dict[str, Any]:
    part = data.take(list(job.cell.rows(c)))
    images, labels = part.floats().to(job.defense.device), part.labels.to(job.defense.device)
    # Another purpose in each cell: the draws of an image are independent over severities and corruptions.
    stream = Stream(seed, f"corruption/{job.corruption}/{job.severity}")
    begun, passes = time.perf_counter(), dataclasses.replace(job.defense.passes)
    scored = score(job.defense, images, labels, part.index, stream, job.cell.identity["repeats"])
    n, used = len(part), job.defense.passes
    return {
        "index": part.index.numpy(),
        "label": part.labels.numpy(),
        **scored,
        "distance": np.zeros(n),  # from the image that was given, which is the corrupted one
        "forwards": np.full(n, (used.forwards - passes.forwards) / n),
        "backwards": np.zeros(n),
        "seconds": np.full(n, (time.perf_counter() - begun) / n),
    }
