"""The runner: every defence x column x chunk of images, one file a chunk, so that any process can stop, share or go on."""

import dataclasses
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rush_bench.attacks.base import Attack, Threat
from rush_bench.attacks.suites import Suite, parse_suite
from rush_bench.datasets import Images
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput, Failure, RushBenchError
from rush_bench.evaluation.behaviour import check_behaviour
from rush_bench.evaluation.records import FORMAT, Cell, CellResult, CellStore
from rush_bench.evaluation.score import check, score
from rush_bench.evaluation.turns import Status, bar_for, in_turn
from rush_bench.files import digest
from rush_bench.noise import Stream
from rush_bench.registry import attacks as registry
from rush_bench.settings import override


@dataclass
class Run:
    """What `attack` leaves: its cells' results, what failed and whether all that was asked for is there.

    `contradictions` are attacks that took more than a certificate of the same weights in the same folder leaves (see
    `rush_bench.certify.check.Comparison`): one of the two programs has a bug.
    """

    results: list[CellResult]
    failed: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    contradictions: list[Any] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every cell has all its chunks."""
        return not self.failed and all(result.complete for result in self.results)

    def table(self, style: str = "plain") -> Any:
        """A pandas frame; `paper` lays it out as Table 1 of the RUSH paper."""
        from rush_bench.report.tables import table

        return table(self.results, style)


@dataclass(frozen=True)
class Job:
    """One cell to run: `attack` is None for the worst case over `of`, the cells before it."""

    cell: Cell
    defense: Defense
    attack: Attack | None
    of: tuple["Job", ...] = ()

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        labels = self.cell.labels
        return " ".join(str(labels[key]) for key in ("defense", "attack", "suite", "experiment", "trial") if labels.get(key))


def attack(
    defenses: Sequence[Defense],
    suite: str | Suite = "linf8",
    data: Images | None = None,
    *,
    out: Path | str | None = None,
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
) -> Run:
    """Run a suite on defences. The same call again, from any number of processes, finishes what is left.

    `suite` is a name (`linf8`, `l2-0.5`, `linf8-quick`) or a parsed one; `out` the results folder (None: a temporary one);
    `repeats` K, the independent predictions an x' is scored by (None: 1 if deterministic, else 100 at one vote, 16 at 64
    votes; a fifth of that in quick suites); `shard` (k, n) takes every n-th chunk; `max_minutes` stops between chunks.
    Errors of one cell (an attack that returns rubbish, a loss that is not finite) fail that cell and are listed in
    `Run.failed`; bad input raises BadInput before anything runs.
    """
    suite = parse_suite(suite) if isinstance(suite, str) else suite
    data = check_asked(defenses, data, shard)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="rush-bench-"))
    store = CellStore(folder)
    jobs = [job for defense in defenses for job in _plan(defense, suite, data, seed, repeats, chunk)]
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    failed = work(store, jobs, data, seed=seed, shard=shard, deadline=deadline, quiet=quiet)
    results = [store.result(job.cell) for job in jobs]
    # certificates stand above this room, which no name at import time may know: the one place that looks up
    from rush_bench.certify.check import clashes

    return Run(results, failed, folder, clashes(results, folder, folder / "settle"))


def default_repeats(votes: int, quick: bool) -> int:
    """K fresh predictions an image: 1 if deterministic, 100 at one vote, 16 at 64 votes (protocol 7); quick: a fifth."""
    if votes == 0:
        return 1
    full = min(100, max(16, 1024 // votes))
    return -(-full // 5) if quick else full


def check_asked(defenses: Sequence[Defense], data: Images | None, shard: tuple[int, int]) -> Images:
    """The images, or BadInput: none, ones that a defence does not take, no such shard, two defences of one name."""
    if data is None or not len(data):
        raise BadInput('there are no images to attack; pass data=rb.load_dataset("cifar10", split="test", n=1000)')
    if not 1 <= shard[0] <= shard[1]:
        raise BadInput(f"shard {shard[0]}/{shard[1]}: write k/n with 1 <= k <= n")
    names = [defense.name for defense in defenses]
    if len(set(names)) < len(names):
        raise BadInput(f"two defences share a name ({', '.join(names)}); pass name=... to tell them apart in the table")
    for defense in defenses:
        check_fits(defense, data)
    return data


def check_fits(defense: Defense, data: Images) -> None:
    """Refuse images that a defence does not take, that it has too few classes for, or that have no labels."""
    if tuple(defense.shape) != tuple(data.shape):
        raise BadInput(f"{defense.name} takes images {tuple(defense.shape)}, {data.name} has {tuple(data.shape)}")
    if defense.classes < len(data.classes):
        raise BadInput(f"{defense.name} has {defense.classes} classes, {data.name} has {len(data.classes)}")
    if int(data.labels.min()) < 0:
        raise BadInput(f"the {data.split} split of {data.name} has no labels; attack its test split")


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
) -> Job:
    """The cell of one registered attack on a defence; `labels` join those of the defence and the data (`suite`, `quick`)."""
    made: Attack = override(registry.load(column)(), settings, name=column)
    how = {"name": column, **made.settings()}
    if column != "clean" and defense.precision != "float32":
        how["precision"] = defense.precision  # another search finds another x'
    who = defense.identity()
    identity = {
        "format": FORMAT,
        "weights": who.get("weights") or digest(who),
        "defense": who,
        "attack": how,
        "images": data.digest,
        # the clean accuracy is the same cell whatever the suite's eps
        "threat": None if column == "clean" else {"norm": threat.norm, "eps": threat.eps},
        "seed": seed,
        "repeats": repeats,
        "chunk": chunk,
    }
    return Job(Cell(identity, {**_labels(defense, data, threat), **labels, "attack": column}), defense, made)


def worst_job(of: Sequence[Job], labels: dict[str, Any], repeats: int | None = None) -> Job:
    """The per-image worst case over cells of one defence, threat and K (A2), scored again, with `repeats` if given."""
    last = of[-1]
    identity = {**last.cell.identity, "attack": {"name": "worst", "of": [job.cell.key for job in of]}}
    identity["repeats"] = repeats or identity["repeats"]
    return Job(Cell(identity, {**last.cell.labels, **labels, "attack": "worst"}), last.defense, None, tuple(of))


def _labels(defense: Defense, data: Images, threat: Threat) -> dict[str, Any]:
    return {
        "dataset": data.name,
        "split": data.split,
        **defense.labels(),
        "norm": threat.norm,
        "eps": threat.eps,
        "n": len(data),
        "deterministic": defense.deterministic,
        "classes": defense.classes,
    }


def _plan(defense: Defense, suite: Suite, data: Images, seed: int, repeats: int | None, chunk: int) -> list[Job]:
    labels = {"suite": suite.shown, "quick": suite.quick}
    repeats = repeats or default_repeats(defense.draws, suite.quick)
    threat = Threat(suite.norm, suite.eps)  # type: ignore[arg-type]  # parse_suite knows no other norm
    jobs = [
        job_for(defense, data, column, settings, threat, labels, seed=seed, repeats=repeats, chunk=chunk)
        for column, settings in suite.columns.items()
        if column != "eot" or not defense.deterministic
    ]
    return [*jobs, worst_job(jobs, labels)] if len(jobs) > 1 else jobs


def work(
    store: CellStore,
    jobs: Sequence[Job],
    data: Images,
    *,
    seed: int,
    shard: tuple[int, int] = (1, 1),
    deadline: float | None = None,
    quiet: bool = False,
    title: str = "attack",
    after: Callable[[Job, int, float], str | None] = lambda job, c, seconds: None,
) -> dict[str, str]:
    """Work off the chunks that are missing; returns what failed, by job, with the reason.

    BadInput where the store has records of another defence under the same key (see `behaviour`).
    `after` hears of each chunk done (job, chunk, seconds it took) and may answer a line to print.
    """
    check_behaviour(store.runs.parent, (job.defense for job in jobs), data)
    for job in jobs:
        store.open(job.cell)
    mine = [(job, c) for job in jobs for c in range(job.cell.chunks) if c % shard[1] == shard[0] - 1]
    failed: dict[str, str] = {}

    def status(job: Job, c: int) -> Status:
        """The worst case waits for its parts, and fails with them."""
        blocked = next((part for part in job.of if not store.has(part.cell, c)), None)
        if blocked is not None and blocked.label in failed:
            failed.setdefault(job.label, Failure(f"needs {blocked.label}, which failed", failed[blocked.label]))
        if job.label in failed:
            return "drop"
        return "ready" if blocked is None else "wait"

    with bar_for(store, title, mine, quiet) as bar:
        for job, c in in_turn(store, mine, bar, deadline, status):
            begun = time.perf_counter()
            arrays, attacked = _guarded(store, job, c, data, seed, failed)
            if arrays is not None:
                store.write(job.cell, c, arrays, attacked)
                rate = arrays["correct"].sum() / arrays["repeats"].sum()
                bar.advance(f"{rate:.1%} right in the last chunk", title=job.label)
                if line := after(job, c, time.perf_counter() - begun):
                    bar.note(line)
    for label, reason in failed.items():
        bar.note(f"failed: {label}: {reason}")
    return failed


def _guarded(
    store: CellStore, job: Job, c: int, data: Images, seed: int, failed: dict[str, str]
) -> tuple[dict[str, np.ndarray] | None, np.ndarray | None]:
    """One chunk; an error fails its cell and lets the others go on. BadInput of an attack says that it does not apply."""
    try:
        return _chunk(store, job, c, data, seed)
    except RushBenchError as error:
        failed[job.label] = Failure(str(error), error)
    except Exception as error:  # an attack is anybody's code, and one cell's failure must not lose the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        failed[job.label] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None, None


def _chunk(store: CellStore, job: Job, c: int, data: Images, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    part = data.take(list(job.cell.rows(c)))
    defense, repeats = job.defense, job.cell.identity["repeats"]
    images, labels = part.floats().to(defense.device), part.labels.to(defense.device)
    threat = Threat(job.cell.labels["norm"], job.cell.labels["eps"])
    begun, passes = time.perf_counter(), dataclasses.replace(defense.passes)
    extra: dict[str, Any] = {}
    if job.attack is None:
        attacked, source = _lowest(store, job, c, images)
        extra["source"] = source
        purpose = "score-worst"  # x' was chosen on the draws of "score": judge it on others (A2)
    else:
        stream = Stream(seed, f"attack/{job.cell.labels['attack']}", part.index)
        attacked = job.attack.run(defense, images, labels, threat, stream)
        purpose = "score"
    distance = check(attacked, images, part.index, threat)
    if job.attack is not None:
        extra |= job.attack.extra(defense, attacked, labels, stream)
    used = defense.passes
    cost = {
        "forwards": (used.forwards - passes.forwards) / len(part),
        "backwards": (used.backwards - passes.backwards) / len(part),
        "seconds": (time.perf_counter() - begun) / len(part),
    }
    scored = score(defense, attacked, labels, part.index, Stream(seed, purpose), repeats)
    arrays = {
        "index": part.index.numpy(),
        "label": part.labels.numpy(),
        **scored,
        "distance": distance.cpu().numpy(),
        **{key: np.full(len(part), value) for key, value in cost.items()},
        **extra,
    }
    clean = job.attack is not None and job.cell.labels["attack"] == "clean"
    return arrays, None if clean else attacked.cpu().numpy()


def _lowest(store: CellStore, job: Job, c: int, images: Tensor) -> tuple[Tensor, np.ndarray]:
    """Per image the x' with the lowest estimated chance of being right over the suite, ties by margin (A2)."""
    records = [store.read(part.cell, c) for part in job.of]
    rate = np.stack([r["correct"] / r["repeats"] for r in records])
    tie = np.stack([r["margin"] for r in records])
    source = np.lexsort((tie, rate), axis=0)[0]
    points = [
        images if part.cell.labels["attack"] == "clean" else torch.from_numpy(store.read_adversarial(part.cell, c)).to(images)
        for part in job.of
    ]
    rows = torch.arange(len(images))
    return torch.stack(points)[torch.from_numpy(source), rows].contiguous(), source


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight shards."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise BadInput(f"--shard takes k/n with 1 <= k <= n, such as 1/4, not {text!r}")
    return int(k), int(n)
