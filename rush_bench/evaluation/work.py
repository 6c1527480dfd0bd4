"""The one measuring loop: attacks, corruptions, certificates and probes are cells, worked off chunk by chunk.

A kind of measurement says what its cells are and how a chunk is made (`Job`). All else is here, once: whether the records at
hand are of this code (`behaviour`), who takes which chunk, when to stop, what an error costs, and how it is reported.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rush_bench.datasets import Images, as_data
from rush_bench.deadline import NEVER, Deadline
from rush_bench.defenses import Defense, as_defenses
from rush_bench.defenses.base import check_shown
from rush_bench.errors import BadInput, Failure, RushBenchError, out_of_memory
from rush_bench.evaluation.answers import check_answers
from rush_bench.evaluation.behaviour import Changed, check_behaviour, sample_of
from rush_bench.files import digest
from rush_bench.noise import check_seed
from rush_bench.progress import Bar
from rush_bench.records import FORMAT, Cell, CellResult
from rush_bench.settings import MOST, Count, fits


class Store(Protocol):
    """Where chunks lie: a `CellStore`, or the probes' own."""

    def open(self, cell: Any) -> None: ...
    def has(self, cell: Any, chunk: int) -> bool: ...
    def lock(self, cell: Any, chunk: int) -> AbstractContextManager[bool]: ...
    def write(self, cell: Any, chunk: int, arrays: Any, adversarial: Any = None) -> None: ...


@dataclass(frozen=True)
class Job:
    """One cell to work off; a kind of measurement gives `label` and `chunk`.

    `cell` is what its store takes; `data` the images, of which a few are the guard's sample; `of` jobs of the same run
    whose chunk c must be there before this one's is made, and whose failure is this one's too.
    """

    cell: Any
    defense: Defense
    data: Images
    of: tuple[Any, ...] = field(default=(), kw_only=True)

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar; what fails is known by it."""
        raise NotImplementedError

    @property
    def sample(self) -> Images:
        """On these the defence must do what it did when the records at hand were made."""
        return sample_of(self.data)

    def chunk(self, store: Any, c: int) -> tuple[Any, Any]:
        """What `Store.write` takes: the arrays of chunk c, and x' or None."""
        raise NotImplementedError

    def figure(self, arrays: Any) -> str:
        """What the bar says of a chunk."""
        return f"{arrays['correct'].sum() / arrays['repeats'].sum():.1%} right in the last chunk"


@dataclass(repr=False)
class Run:
    """What a measurement leaves: its cells' results, what failed, and whether all that was asked for is there.

    `done`: whether this call's share (its shard) is there, but for what failed. `contradictions` are attacks that took more
    than a certificate of the same weights in the same folder leaves (`rush_bench.certificates.check.Comparison`): a bug.
    """

    results: list[CellResult]
    failed: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    done: bool = True
    contradictions: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        done = sum(result.complete for result in self.results)
        failures = f", {len(self.failed)} failed" if self.failed else ""
        return f"{type(self).__name__}({done} of {len(self.results)} cells complete{failures}, in {str(self.folder)!r})"

    @property
    def complete(self) -> bool:
        """Whether every cell has all its chunks."""
        return not self.failed and all(result.complete for result in self.results)

    def extend(self, other: "Run") -> None:
        """Take in another run: the same measurement on other images."""
        self.results += other.results
        self.failed |= other.failed
        self.done = self.done and other.done
        self.contradictions += other.contradictions


def work(
    store: Store,
    jobs: Sequence[Job],
    folder: Path,
    *,
    title: str,
    shard: tuple[int, int] = (1, 1),
    deadline: Deadline = NEVER,
    quiet: bool = False,
    after: Callable[[Any, int, float], str | None] = lambda job, c, seconds: None,
) -> tuple[dict[str, str], bool]:
    """Work off the chunks that are missing; returns what failed, by job, with the reason, and whether the share is done.

    Any number of processes may do so at once: each takes what is free, comes back for what another holds, and stops between
    chunks once the deadline is over. `folder` keeps what defences do (see `behaviour`): BadInput where
    its records are of other code. An error fails its cell, and a defence that fails on the sample all of its cells; the
    others continue. `after` is called for each finished chunk (job, chunk, seconds) and may return a line to print.
    """
    failed: dict[str, str] = {}
    broken = _broken(jobs, folder)
    for job in jobs:
        store.open(job.cell)
    mine = _share(jobs, *shard)
    chunks_done = sum(store.has(job.cell, c) for job, c in mine)
    with Bar(title, len(mine), chunks_done, quiet=quiet) as bar:

        def fail(job: Job, reason: str) -> None:
            failed[job.label] = reason
            bar.note(f"failed: {job.label}: {reason}")

        def missing() -> list[tuple[Job, int]]:
            left = [(job, c) for job, c in mine if job.label not in failed and not store.has(job.cell, c)]
            if len(mine) - len(left) > bar.done:  # by other processes, or given up
                bar.show(len(mine) - len(left))
            return left

        for job in jobs:
            if error := broken.get(_guarded(job)):
                fail(job, _reason(error))
        while left := missing():
            waiting = 0
            for job, c in left:
                blocked = next((part for part in job.of if not store.has(part.cell, c)), None)
                if job.label in failed:
                    continue
                if blocked is not None and blocked.label in failed:
                    fail(job, Failure(f"needs {blocked.label}, which failed", failed[blocked.label]))
                    continue
                if deadline.over:
                    return failed, False
                with store.lock(job.cell, c) as locked:
                    if blocked is not None or not locked:  # another process is at it: come back when the rest is done
                        waiting += 1
                    elif not store.has(job.cell, c):
                        begun = time.perf_counter()
                        try:
                            arrays, adversarial = job.chunk(store, c)
                        except Exception as error:  # a defence or an attack is anybody's code: the other cells go on
                            fail(job, _reason(error))
                            continue
                        try:
                            store.write(job.cell, c, arrays, adversarial)
                        except ValueError as error:  # what such code left is no chunk of this cell
                            fail(job, _reason(error))
                            continue
                        bar.advance(job.figure(arrays), title=job.label)
                        if line := after(job, c, time.perf_counter() - begun):
                            bar.note(line)
            if waiting == len(left):
                time.sleep(0.2)
    return failed, True


def _share(jobs: Sequence[Job], k: int, n: int) -> list[tuple[Job, int]]:
    """Every n-th chunk, from the k-th: of all there are, or of each cell's where a cell waits for the same chunk of others."""
    chunks = [(job, c) for job in jobs for c in range(job.cell.chunks)]
    return [(job, c) for job, c in chunks if c % n == k - 1] if any(job.of for job in jobs) else chunks[k - 1 :: n]


def _guarded(job: Job) -> tuple[int, str]:
    return id(job.defense), job.sample.digest


def _broken(jobs: Sequence[Job], folder: Path) -> dict[tuple[int, str], Exception]:
    """The defences that fail on their sample, with the error; BadInput where one is another than the records there are of."""
    broken: dict[tuple[int, str], Exception] = {}
    for job in {_guarded(job): job for job in jobs}.values():
        try:
            check_behaviour(folder, job.defense, job.sample)
        except Changed:
            raise
        except Exception as error:  # its old records, if any, cannot be distinguished from those of other code
            broken[_guarded(job)] = error
    return broken


def _reason(error: Exception) -> str:
    if isinstance(error, RushBenchError):
        return Failure(str(error), error)
    if says := out_of_memory(error):
        return says
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def check_asked(
    defenses: Any, data: Any, shard: tuple[int, int] = (1, 1), seed: int = 0, verb: str = "attack"
) -> tuple[list[Defense], Images]:
    """The defences and the images (see `as_defenses`, `as_data`).

    BadInput for no images, one that is there twice, ones that a defence does not take, no such shard or seed, two defences of
    one name, and a defence of somebody's own that does not answer by its stream and by the image alone (see `check_answers`).
    """
    defenses, data = as_defenses(defenses), as_data(data)
    if not len(data):
        raise BadInput(f'there are no images to {verb}; pass data=rb.load_dataset("cifar10", split="test", n=1000)')
    check_positions(data)
    if not fits(tuple[int, ...], shard) or len(shard) != 2:
        raise BadInput(f"shard {shard!r} must be two whole numbers (k, n), such as (1, 2)")
    if not 1 <= shard[0] <= shard[1]:
        raise BadInput(f"shard {shard[0]}/{shard[1]}: write k/n with 1 <= k <= n")
    check_seed(seed)
    names = [defense.name for defense in defenses]
    for name in names:
        check_shown(name)
    if len(set(names)) < len(names):
        raise BadInput(f"two defences share a name ({', '.join(names)}); pass name=... to tell them apart in the table")
    for defense in defenses:
        check_fits(defense, data)
        check_answers(defense, data)
    return defenses, data


def check_positions(data: Images) -> None:
    """Refuse an image that is there twice: an interval takes each as one more that was drawn."""
    if len(different := data.index.unique()) < len(data):
        raise BadInput(f"{len(data)} images stand at {len(different)} positions of {data.name}; take each position once")


def check_fits(defense: Defense, data: Images) -> None:
    """Refuse images that a defence does not take, that it has too few classes for, or that have no labels."""
    if tuple(defense.shape) != tuple(data.shape):
        raise BadInput(f"{defense.name} takes images {tuple(defense.shape)}, {data.name} has {tuple(data.shape)}")
    if defense.classes < len(data.classes):
        raise BadInput(f"{defense.name} has {defense.classes} classes, {data.name} has {len(data.classes)}")
    if int(data.labels.min()) < 0:
        raise BadInput(f"the {data.split} split of {data.name} has no labels; attack its test split")


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight shards."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise BadInput(f"--shard takes k/n with 1 <= k <= n, such as 1/4, not {text!r}")
    return int(k), int(n)


def cell_of(
    defense: Defense,
    data: Images,
    *,
    attack: dict[str, Any],
    threat: dict[str, Any] | None,
    labels: dict[str, Any],
    seed: int,
    repeats: int,
    chunk: int,
    defense_identity: dict[str, Any] | None = None,
) -> Cell:
    """A cell of a defence on images: `labels` join those of both; `defense_identity`, where it is not all of the defence.

    BadInput for `repeats` or a `chunk` that are no whole numbers from 1 on.
    """
    for name, value in (("repeats", repeats), ("chunk", chunk)):
        if not fits(Count, value):
            raise BadInput(f"{name} = {value!r} must be a whole number, at least 1 and at most {MOST}")
    repeats, chunk = int(repeats), int(chunk)  # numpy's too, for the key
    found = defense_identity or defense.identity()
    identity = {
        "format": FORMAT,
        "weights": found.get("weights") or digest(found),
        "defense": found,
        "attack": attack,
        "images": data.digest,
        "threat": threat,
        "seed": int(seed),  # numpy's too, for the key
        "repeats": repeats,
        "chunk": chunk,
    }
    about = {"dataset": data.name, "split": data.split, **defense.labels(), "n": len(data)}
    if data.copies:
        about["copies"] = data.copies
    return Cell(identity, {**about, "deterministic": defense.deterministic, "classes": defense.classes, **labels})
