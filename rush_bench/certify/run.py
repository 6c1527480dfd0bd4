"""Certifying a smoothed defence: chunk by chunk, resumable, one cell a (network, noise, norm, settings, images, seed).

A cell is a cell of the records (`rush_bench.evaluation.records`) under `<results>/certificates`: a row an image, `counts`
of its estimation draws, `repeats` how many there were, `correct` how many of them got the label; besides, `predict` (-1:
abstained), `bound` and `radius` in full precision. When a cell is whole, `certificate.tsv` (all columns) and `cohen.tsv`
(the six columns of Cohen's code) lie beside its chunks.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rush_bench.certify.bounds import Certificate, certificate
from rush_bench.certify.check import FOLDER
from rush_bench.certify.sampling import Counts, Plan, Sampling, estimate, make_plan, stated
from rush_bench.certify.tsv import write_tsv
from rush_bench.datasets import Images
from rush_bench.defenses import Defense, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation.records import FORMAT, Cell, CellResult, CellStore
from rush_bench.evaluation.runner import check_fits
from rush_bench.evaluation.turns import bar_for, in_turn
from rush_bench.noise import Stream


@dataclass
class CertifyRun:
    """What `certify` leaves: its cells and whether all that was asked for is there."""

    results: list[CellResult]
    folder: Path
    done: bool = field(default=False)

    @property
    def complete(self) -> bool:
        """Whether every cell has all its chunks."""
        return all(result.complete for result in self.results)


@dataclass(frozen=True)
class _Job:
    cell: Cell
    defense: Smoothed
    theorem: Certificate
    plan: Plan


def certify(
    defenses: Sequence[Defense],
    data: Images,
    settings: Sampling | None = None,
    *,
    norm: str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    chunk: int = 10,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
) -> CertifyRun:
    """Certify smoothed defences on images. The same call again, from any number of processes, finishes what is left.

    What is certified is the defence with infinitely many votes, so `rush@1` and `rush@64` have one certificate. `norm` is
    the law's first unless given (l2 for Gaussian noise; l1 or linf for uniform noise); `out` the results folder (None: a
    temporary one); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks. Errors: BadInput for a
    defence without noise, a bank, a norm without a theorem, images that do not fit.
    """
    settings = settings or Sampling()
    if not len(data):
        raise BadInput('there are no images to certify; pass data=rb.load_dataset("cifar10", split="test", n=500)')
    if not 1 <= shard[0] <= shard[1]:
        raise BadInput(f"shard {shard[0]}/{shard[1]}: write k/n with 1 <= k <= n")
    jobs: dict[str, _Job] = {}
    for defense in defenses:
        job = _plan(defense, data, settings, norm, seed, chunk)
        jobs.setdefault(job.cell.key, job)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder / FOLDER)
    for job in jobs.values():
        store.open(job.cell)
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    done = _work(store, list(jobs.values()), data, settings, seed, shard, deadline, quiet)
    results = [store.result(job.cell) for job in jobs.values()]
    for result in results:
        if result.complete:
            write_tsv(result)
    return CertifyRun(results, folder, done)


def _plan(defense: Defense, data: Images, settings: Sampling, norm: str | None, seed: int, chunk: int) -> _Job:
    if not isinstance(defense, Smoothed):
        raise BadInput(
            f"{defense.name} is {'deterministic' if defense.deterministic else 'randomised, but by no known noise law'}: "
            "a certificate needs Smoothed(network, noise=...), such as rush@64 of the store or --model with --noise"
        )
    check_fits(defense, data)
    assert defense.noise is not None
    theorem = certificate(defense.noise, norm, int(np.prod(defense.shape)))
    plan = make_plan(settings, theorem)
    who = {key: value for key, value in defense.identity().items() if key != "votes"}
    name = defense.name.split("@")[0]
    identity = {
        "format": FORMAT,
        "weights": who["weights"],
        "defense": who,
        "attack": {"name": "certify", "norm": theorem.norm, "dimension": theorem.dimension, **stated(settings, plan)},
        "threat": {"norm": theorem.norm, "eps": None},
        "images": data.digest,
        "seed": seed,
        "repeats": settings.draws,
        "chunk": chunk,
    }
    labels = {
        "dataset": data.name,
        "split": data.split,
        **defense.labels(),
        "defense": name,
        "votes": None,
        "attack": "certify",
        "suite": settings.mode,
        "norm": theorem.norm,
        "law": who["noise"]["law"],
        "scale": who["noise"]["scale"],
        "alpha": settings.alpha,
        "n": len(data),
        "deterministic": False,
        "classes": defense.classes,
    }
    return _Job(Cell(identity, labels), defense, theorem, plan)


def _work(
    store: CellStore,
    jobs: list[_Job],
    data: Images,
    settings: Sampling,
    seed: int,
    shard: tuple[int, int],
    deadline: float | None,
    quiet: bool,
) -> bool:
    """Do this shard's chunks; whether all of them are there."""
    mine = [(job, c) for job in jobs for c in range(job.cell.chunks) if c % shard[1] == shard[0] - 1]
    with bar_for(store, "certify", mine, quiet) as bar:
        for job, c in in_turn(store, mine, bar, deadline):
            arrays = _chunk(job, c, data, settings, seed)
            store.write(job.cell, c, arrays)
            right = (arrays["predict"] == arrays["label"]).mean()
            text = f"{right:.0%} certified, {arrays['repeats'].mean():.0f} draws an image in the last chunk"
            bar.advance(text, title=f"{job.cell.labels['defense']} {job.cell.labels['norm']}")
    return all(store.has(job.cell, c) for job, c in mine)


def _chunk(job: _Job, c: int, data: Images, settings: Sampling, seed: int) -> dict[str, Any]:
    part = data.take(list(job.cell.rows(c)))
    images = part.floats().to(job.defense.device)
    begun = time.perf_counter()
    selection = Stream(seed, "certify/select", part.index)
    selected = _with_votes(job.defense, settings.selection).predict(images, selection).labels.cpu().numpy()

    def draw(rows: Counts, first: int, count: int) -> Counts:
        which = torch.from_numpy(rows)
        stream = Stream(seed, "certify/estimate", part.index[which], first)
        return _with_votes(job.defense, count).predict(images[which.to(images.device)], stream).votes.cpu().numpy()

    found = estimate(job.plan, selected, job.defense.classes, draw, settings.hope)
    seconds = time.perf_counter() - begun
    passes = settings.selection + found.used
    label, n = part.labels.numpy(), np.arange(len(part))
    others = found.counts.copy()
    others[n, label] = -1
    certified = found.bound >= 0.5  # as in Cohen's code; at 1/2 the radius is 0
    return {
        "index": part.index.numpy(),
        "label": label,
        "correct": found.counts[n, label],
        "repeats": found.used,
        "counts": found.counts,
        "margin": (found.counts[n, label] - others.max(1)) / found.used,
        "distance": np.zeros(len(part)),
        "forwards": passes,
        "backwards": np.zeros(len(part)),
        "seconds": seconds * passes / passes.sum(),
        "selected": selected,
        "predict": np.where(certified, selected, -1),
        "bound": found.bound,
        "radius": np.where(certified, job.theorem.radius(np.maximum(found.bound, 0.5)), 0.0),
    }


def _with_votes(defense: Smoothed, votes: int) -> Smoothed:
    """The same defence, sharing its network and its count of passes, at another number of votes."""
    counter = copy.copy(defense)
    counter.draws = votes
    return counter
