"""Attacks: a cell is a defence under one column of a suite; its chunk holds x' and how often it was right on fresh draws."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.health import drawn, health
from rush_bench.attacks.suites import REST, Suite, parse_suite
from rush_bench.certificates.check import clashes
from rush_bench.datasets import Images
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.defenses.base import UNKNOWN_LOSS
from rush_bench.defenses.samplers import positions
from rush_bench.errors import BadInput
from rush_bench.evaluation import work
from rush_bench.evaluation.score import Meter, check, made_on, score
from rush_bench.evaluation.work import Run, cell_of, check_asked
from rush_bench.noise import Stream
from rush_bench.records import Arrays, Cell, CellStore
from rush_bench.registry import attacks as registry
from rush_bench.settings import override
from rush_bench.threats import Threat

HEALTH = ("zero", "error", "frozen")  # what a record keeps of `health`, as `gradient_zero` ...
BROKEN = 0.05  # the estimated chance of being right of an image that no further attack is made on


@dataclass(frozen=True)
class Job(work.Job):
    """One cell of an attack; with `of`, the cells before it, on what their worst case leaves standing (the rest keeps its x').

    `attack` is None for that worst case itself. `known`: the gradients' health by defence, threat and chunk, which jobs of one
    plan share, as it is the same for every attack.
    """

    attack: Attack | None
    known: dict[Any, dict[str, np.ndarray]] = field(default_factory=dict, compare=False, kw_only=True)

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        labels = self.cell.labels
        return " ".join(str(labels[key]) for key in ("defense", "attack", "suite", "experiment", "trial") if labels.get(key))

    def chunk(self, store: CellStore, c: int) -> tuple[Arrays, np.ndarray | None]:
        """Attack the images of chunk c and score x' on fresh draws; what an attack knows per image besides goes in `extra`."""
        part, defense = self.data.take(list(self.cell.rows(c))), self.defense
        seed, repeats = self.cell.identity["seed"], self.cell.identity["repeats"]
        images, labels = part.floats().to(defense.device), part.labels.to(defense.device)
        threat = Threat(self.cell.labels["norm"], self.cell.labels["eps"])
        meter, extra = Meter(defense), dict[str, Any]()
        attacked, standing, purpose = images, torch.ones_like(labels, dtype=torch.bool), "score"
        if self.of:
            attacked, extra["source"], rate = _worst_points(store, self, c, images)
            purpose = f"score-{self.cell.labels['attack']}"  # x' was chosen on the draws of "score": judge it on others (A2)
            standing = torch.from_numpy(rate > BROKEN).to(labels.device)
        if self.attack is not None and standing.any():
            positions = standing.nonzero()[:, 0]
            stream = Stream(seed, f"attack/{self.cell.labels['attack']}", part.index[positions.cpu()])
            asked = defense, images[positions], labels[positions], threat, stream
            if self.of:
                found = self.attack.go_on(*asked, attacked[positions])
            else:
                found, extra = self.attack.recorded(*asked)
            attacked = found if standing.all() else attacked.index_copy(0, positions, found)
        distance = check(attacked, images, part.index, threat)
        cost = meter.cost(len(part))
        if self.attack is not None and self.attack.climbs:
            key = (id(defense), threat, c)
            if key not in self.known:
                self.known[key] = _gradients(defense, images, labels, threat, Stream(seed, "health", part.index))
            extra |= self.known[key]
        elif cost["backwards"].any():  # of other networks: nothing to look at, which is not the same as not having looked
            extra |= {f"gradient_{name}": np.full(len(part), np.nan) for name in HEALTH}
        arrays = {
            "index": part.index.numpy(),
            "label": part.labels.numpy(),
            "distance": distance.cpu().numpy(),
            **cost,
            **score(defense, attacked, labels, part.index, Stream(seed, purpose), repeats),
            **extra,
            "made_on": made_on(defense),
        }
        return arrays, None if self.cell.identity["attack"]["name"] == "clean" else attacked.cpu().numpy()


def attack(
    defenses: Defense | Sequence[Defense],
    suite: str | Suite = "linf8",
    data: Images | Any = None,
    *,
    out: Path | str | None = None,
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | Deadline | None = None,
    quiet: bool = False,
) -> Run:
    """Run a suite on defences. The same call again, from any number of processes, finishes what is left.

    `defenses` is one or several; `data` what `rush_bench.datasets.as_data` takes: images, (x, y), a DataLoader, a name, ...
    `suite` is a name (`linf8`, `l2-0.5`, `linf8-quick`) or a parsed one; `out` the results folder (None: a temporary one);
    `repeats` K, the independent predictions an x' is scored by (None: 1 if deterministic, else 100 at one vote, 16 at 64
    votes; a fifth of that in quick suites); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks.
    Errors of one cell (an attack that returns rubbish, a loss that is not finite) fail that cell and are listed in
    `Run.failed`; bad input raises BadInput before anything runs.
    """
    suite = parse_suite(suite) if isinstance(suite, str) else suite
    defenses, data = check_asked(defenses, data, shard, seed)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder)
    jobs = [job for defense in defenses for job in plan(defense, suite, data, seed, repeats, chunk)]
    deadline = Deadline.after(max_minutes)
    failed, done = work.work(store, jobs, folder, title="attack", shard=shard, deadline=deadline, quiet=quiet)
    results = [store.result(job.cell) for job in jobs]
    return Run(results, failed, folder, done, clashes(results, folder, folder / "settle"))


def default_repeats(votes: int, quick: bool) -> int:
    """K fresh predictions per image: 1 if deterministic, 100 at one vote, 16 at 64 votes (protocol 1); quick: a fifth."""
    if votes == 0:
        return 1
    full = min(100, max(16, 1024 // votes))
    return -(-full // 5) if quick else full


def job_for(
    defense: Defense,
    data: Images,
    column: str,
    settings: dict[str, Any],
    threat: Threat,
    labels: dict[str, Any],
    *,
    seed: int,
    repeats: int,
    chunk: int,
    of: Sequence[Job] = (),
    known: dict[Any, dict[str, np.ndarray]],
) -> Job:
    """The cell of one registered attack on a defence; `labels` join those of the defence and the data (`suite`, `quick`).

    `known` is one and the same for all jobs on the same data, seed and chunks; see `Job`.
    """
    attack: Attack = override(registry.load(column)(), settings, name=column).on(defense)
    recorded = {"name": column, **attack.settings()} | ({"of": [job.cell.key for job in of], "start": "lowest"} if of else {})
    if column != "clean" and defense.precision != "float32":
        recorded["precision"] = defense.precision  # another search finds another x'
    cell = cell_of(
        defense,
        data,
        attack=recorded,
        # the clean accuracy is the same cell whatever the suite's eps
        threat=None if column == "clean" else {"norm": threat.norm, "eps": threat.eps},
        labels={"norm": threat.norm, "eps": threat.eps, **labels, "attack": column},
        seed=seed,
        repeats=repeats,
        chunk=chunk,
    )
    return Job(cell, defense, data, attack, of=tuple(of), known=known)


def worst_job(of: Sequence[Job], labels: dict[str, Any], repeats: int | None = None) -> Job:
    """The per-image worst case over cells of one defence, threat and K (A2), scored again, with `repeats` if given."""
    last = of[-1]
    identity = {**last.cell.identity, "attack": {"name": "worst", "of": [job.cell.key for job in of]}}
    identity["repeats"] = repeats or identity["repeats"]
    return Job(Cell(identity, {**last.cell.labels, **labels, "attack": "worst"}), last.defense, last.data, None, of=tuple(of))


def plan(defense: Defense, suite: Suite, data: Images, seed: int, repeats: int | None, chunk: int) -> list[Job]:
    """The cells of a suite on a defence, in the order in which they need each other; without `eot` on a deterministic one."""
    labels = {"suite": suite.shown, "quick": suite.quick}
    repeats = default_repeats(defense.draws, suite.quick) if repeats is None else repeats
    threat = Threat(suite.norm, suite.eps)  # type: ignore[arg-type]  # parse_suite knows no other norm
    jobs: list[Job] = []
    same: dict[str, Any] = {"seed": seed, "repeats": repeats, "chunk": chunk, "known": {}}
    for column, settings in suite.columns.items():
        if column != "eot" or not defense.deterministic:
            of = jobs if column == REST else ()
            jobs.append(job_for(defense, data, column, settings, threat, labels, **same, of=of))
    if not jobs:
        raise BadInput(
            f"eot is for randomised defences, and {defense.name} is deterministic; add pgd, or leave {defense.name} out"
        )
    return [*jobs, worst_job(jobs, labels)] if len(jobs) > 1 else jobs


def _gradients(defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> dict[str, np.ndarray]:
    """The health of the gradients that an attack climbs, per image; none where the defence does not let it be looked at."""
    order = drawn(stream, len(images))
    back, there = order.argsort(), order.to(images.device)
    try:
        found = health(defense, images[there], labels[there], threat, stream.at(positions(stream, len(images))[order]))
    except UNKNOWN_LOSS:
        return {}
    return {f"gradient_{name}": getattr(found, name).cpu()[back].numpy() for name in HEALTH}


def _worst_points(store: CellStore, job: Job, c: int, images: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Per image the x' with the lowest estimated chance of being right over the cells before, ties by margin (A2).

    x' (n, C, H, W), which cell it is from (n,), and the chance (n,).
    """
    records = [store.read(part.cell, c) for part in job.of]
    rate = np.stack([r["correct"] / r["repeats"] for r in records])
    tie = np.stack([r["margin"] for r in records])
    source = np.lexsort((tie, rate), axis=0)[0]
    points = [
        images if part.cell.labels["attack"] == "clean" else torch.from_numpy(store.read_adversarial(part.cell, c)).to(images)
        for part in job.of
    ]
    positions = torch.arange(len(images))
    return torch.stack(points)[torch.from_numpy(source), positions].contiguous(), source, rate.min(0)
