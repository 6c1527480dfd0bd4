"""Certifying a smoothed defence: chunk by chunk, resumable, one cell a (network, noise, norm, settings, images, seed).

A cell is a cell of the records (`rush_bench.records`) under `<results>/certificates`: a row per image, `counts`
of its estimation draws, `repeats` how many there were, `correct` how many of them got the label; besides, `predict` (-1:
abstained), `bound` and `radius` in full precision. When a cell is whole, `certificate.tsv` (all columns) and, in mode fixed,
`cohen.tsv` (the six columns of Cohen's code) lie beside its chunks.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rush_bench.certificates.bounds import Certificate, certificate
from rush_bench.certificates.check import FOLDER
from rush_bench.certificates.sampling import Counts, Plan, Sampling, estimate, make_plan, stated
from rush_bench.certificates.tsv import write_tsv
from rush_bench.datasets import Images
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense, Network, is_network
from rush_bench.errors import BadInput
from rush_bench.evaluation.score import made_on
from rush_bench.evaluation.work import Job, Run, cell_of, check_asked, work
from rush_bench.noise import Noise, Stream
from rush_bench.records import Arrays, CellStore

GUARDED = 16  # votes at which the guard looks, whatever the defence's: a certificate is of them all


@dataclass(frozen=True)
class _Job(Job):
    defense: Defense  # at the votes that the guard looks at
    settings: Sampling
    theorem: Certificate
    plan: Plan

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        return f"{self.cell.labels['defense']} certify {self.theorem.norm}"

    def figure(self, arrays: Arrays) -> str:
        """Share certified so far, and at what cost."""
        right = (arrays["predict"] == arrays["label"]).mean()
        return f"{right:.0%} certified, {arrays['repeats'].mean():.0f} draws per image in the last chunk"

    def chunk(self, store: CellStore, c: int) -> tuple[Arrays, None]:
        """Certify the images of chunk c."""
        part, seed = self.data.take(list(self.cell.rows(c))), self.cell.identity["seed"]
        images = part.floats().to(self.defense.device)
        begun = time.perf_counter()
        selection = Stream(seed, "certify/select", part.index)
        selected = self.defense.of_votes(self.settings.selection).predict(images, selection).labels.cpu().numpy()

        def draw(rows: Counts, first: int, count: int) -> Counts:
            which = torch.from_numpy(rows)
            stream = Stream(seed, "certify/estimate", part.index[which], first)
            return self.defense.of_votes(count).predict(images[which.to(images.device)], stream).votes.cpu().numpy()

        found = estimate(self.plan, selected, self.defense.classes, draw, self.settings.give_up_level)
        seconds = time.perf_counter() - begun
        passes = self.settings.selection + found.used
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
            "made_on": made_on(self.defense),
            "predict": np.where(certified, selected, -1),
            "bound": found.bound,
            "radius": np.where(certified, self.theorem.radius(np.maximum(found.bound, 0.5)), 0.0),
        }, None


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
    max_minutes: float | Deadline | None = None,
    quiet: bool = False,
) -> Run:
    """Certify smoothed defences on images. The same call again, from any number of processes, finishes what is left.

    What is certified is the defence with infinitely many votes, so `rush@1` and `rush@64` have one certificate. `norm` is
    the law's first unless given (l2 for Gaussian noise, l1 or linf for uniform, l1 for Laplace); `out` the results folder
    (None: a temporary one); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks. Errors: BadInput for
    a defence without noise, a bank, a norm without a theorem, images that do not fit.
    """
    settings = settings or Sampling()
    defenses, data = check_asked(defenses, data, shard, seed, "certify")
    cells, deadline = plan(defenses, data, settings, norm, seed, chunk), Deadline.after(max_minutes)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder / FOLDER)
    failed, done = work(store, cells, folder, title="certify", shard=shard, deadline=deadline, quiet=quiet)
    results = [store.result(job.cell) for job in cells]
    for result in results:
        if result.complete:
            write_tsv(result)
    return Run(results, failed, folder, done)


def plan(
    defenses: Sequence[Defense], data: Images, settings: Sampling, norm: str | None = None, seed: int = 0, chunk: int = 10
) -> list[_Job]:
    """The cells of certificates, one per network and law whatever the votes."""
    jobs: dict[str, _Job] = {}
    for defense in defenses:
        job = _job(defense, data, settings, norm, seed, chunk)
        jobs.setdefault(job.cell.key, job)
    return list(jobs.values())


def _job(defense: Defense, data: Images, settings: Sampling, norm: str | None, seed: int, chunk: int) -> _Job:
    law = law_of(defense)
    if law is None:
        kind = "deterministic" if defense.deterministic else "randomised, but by no known noise law"
        if isinstance(defense, Network) and not is_network(defense):
            kind = f"a {type(defense).__name__} with a predict of its own, of which no theorem speaks"
        raise BadInput(
            f"{defense.name} is {kind}: "
            "a certificate needs Smoothed(network, noise=...), such as rush@64 of the store or --model with --noise"
        )
    theorem = certificate(law, norm, int(np.prod(defense.shape)))
    plan = make_plan(settings, theorem)
    identity = {key: value for key, value in defense.identity().items() if key != "votes"}
    cell = cell_of(
        defense,
        data,
        defense_identity=identity,
        attack={"name": "certify", "norm": theorem.norm, "dimension": theorem.dimension, **stated(settings, plan)},
        threat={"norm": theorem.norm, "eps": None},
        labels={
            "defense": defense.name.split("@")[0],
            "votes": None,
            "attack": "certify",
            "suite": settings.mode,
            "norm": theorem.norm,
            "law": identity["noise"]["law"],
            "scale": identity["noise"]["scale"],
            "alpha": settings.alpha,
            "deterministic": False,
        },
        seed=seed,
        repeats=settings.draws,
        chunk=chunk,
    )
    return _Job(cell, defense.of_votes(GUARDED), data, settings, theorem, plan)


def law_of(defense: Defense) -> Noise | None:
    """The noise that a certificate of a defence is about; None for a bank, for one that draws otherwise or nothing,
    and for one that does more than its network, as prepare the image first."""
    return defense.noise if isinstance(defense, Network) and is_network(defense) and not defense.deterministic else None
