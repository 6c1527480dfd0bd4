"""`run --on`: the processes of a benchmark file as jobs of submitit, on a SLURM cluster or on this machine.

They share the file as any processes do: each takes what is free, chunk by chunk. A job that is preempted or runs out of its
time is queued again by submitit; one that stopped with work left (exit code 3), or died, is submitted again from here.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rush_bench.deadline import Deadline
from rush_bench.errors import BadInput, MissingPackage, WorkLeft

if TYPE_CHECKING:
    from submitit import Executor, Job

CLUSTERS = ("local", "slurm")
JOBS = "jobs"  # the folder of their logs, in `out`
USUAL = {"timeout_min": 240, "cpus_per_task": 1, "name": "rush-bench"}
TRIES = 3  # of a job that dies
LOOK = 1.0  # seconds between looks at the jobs
SHARE = 0.9  # of a job's time after which it stops between two chunks, before it is stopped
GIB = 2**30  # what a process needs at least: torch and its libraries


@dataclass(frozen=True)
class Where:
    """`slurm:8` or `local:4`: which cluster, how many processes at most, and what each asks of it (submitit's names)."""

    cluster: str
    count: int
    asked: dict[str, Any]


def parse(on: str, asked: Sequence[str]) -> Where:
    """`--on` and its `--ask`s; BadInput for another cluster or no number."""
    cluster, _, count = on.partition(":")
    if cluster not in CLUSTERS or not (count.isdecimal() and int(count) > 0):
        raise BadInput(f"--on {on!r} is to be slurm:N or local:N, N jobs at once")
    given = dict[str, Any]()
    for assignment in asked:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise BadInput(f"--ask takes KEY=VALUE, such as slurm_partition=gpu, not {assignment!r}")
        given[key.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return Where(cluster, int(count), {**USUAL, **given})


def check_room(count: int, gpus: int) -> None:
    """BadInput where this machine has too few GPUs or too little memory for so many processes. gpus: 0 on a CPU."""
    if 0 < gpus < count:
        raise BadInput(f"{count} processes on {gpus} GPUs would share them; give {gpus}, or --device cpu")
    free = free_memory()
    if free is not None and count * GIB > free:
        raise BadInput(f"{count} processes need {count} GiB of memory at least, {free / GIB:.1f} are free; start fewer")


def free_memory() -> int | None:
    """Bytes that this machine, and the control group that we are in, still have; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        with contextlib.suppress(OSError, ValueError):
            group = Path("/sys/fs/cgroup")
            most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, most - used)
        return free
    return None


@dataclass(frozen=True)
class Worker:
    """What a job runs: `rush-bench run`, to an exit code. All that it needs when it is queued again are the records."""

    line: tuple[str, ...]

    def __call__(self) -> int:
        from rush_bench.cli.group import main

        return main.main(["run", *self.line, "--worker"], prog_name="rush-bench", standalone_mode=False) or 0

    def checkpoint(self) -> Any:
        """What submitit queues again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on(
    where: Where,
    line: Sequence[str],
    out: Path,
    deadline: Deadline,
    gpus: int,
    say: Callable[[str], None],
    between: Callable[[], None],
) -> list[str]:
    """Start the jobs and wait for them all, calling `between` meanwhile; returns what went wrong, in words.

    line: the words after `rush-bench run`. A job that stopped with work left is submitted again until `deadline`.
    """
    executor = executor_of(where, out / JOBS)
    with executor.batch() if where.cluster == "slurm" else contextlib.nullcontext():  # an array
        jobs = {k: submit(executor, where, k, line, deadline, gpus) for k in range(where.count)}
    say(f"{where.count} jobs on {where.cluster}, their logs in {out / JOBS}: {', '.join(job.job_id for job in jobs.values())}")
    died, wrong = Counter[int](), []
    try:
        while jobs:
            for k, job in [(k, job) for k, job in jobs.items() if job.done()]:
                code, why = outcome(job)
                died[k] += code is None
                if (code == WorkLeft.exit_code and not deadline.over) or (code is None and died[k] < TRIES):
                    jobs[k] = submit(executor, where, k, line, deadline, gpus)
                    say(f"job {job.job_id} {why or 'has work left'}: again, as {jobs[k].job_id}")
                    continue
                del jobs[k]
                if code not in (0, WorkLeft.exit_code):
                    wrong.append(f"job {job.job_id} {why or f'ended with exit code {code}'}: {job.paths.stderr}")
            between()
            time.sleep(LOOK if jobs else 0)
    finally:
        for job in jobs.values():  # an error or Ctrl-C here
            job.cancel()
    return wrong


def executor_of(where: Where, folder: Path) -> "Executor":
    """submitit's executor; MissingPackage without it, BadInput for what the cluster cannot be asked."""
    try:
        import submitit
    except ImportError as error:
        raise MissingPackage("--on needs submitit: pip install 'rush-bench[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=where.cluster)
        executor.update_parameters(**where.asked)
    except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
        raise BadInput(f"submitit cannot use {where.cluster} here as asked: {error}") from error
    return executor


def submit(executor: "Executor", where: Where, number: int, line: Sequence[str], deadline: Deadline, gpus: int) -> "Job[int]":
    """One process. On this machine it sees one GPU, where there are any; on a cluster it is asked for by --ask."""
    minutes = SHARE * float(where.asked["timeout_min"])
    left = deadline.minutes_left
    words = [*line, "--max-minutes", f"{minutes if left is None else min(minutes, left):.6f}"]
    if where.cluster == "local" and gpus:
        executor.update_parameters(gpus_per_node=1, visible_gpus=[number % gpus])
    with threads(int(where.asked["cpus_per_task"])):
        return executor.submit(Worker(tuple(words)))


def outcome(job: "Job[int]") -> tuple[int | None, str]:
    """The exit code of a job that is done, None where it died, and why."""
    try:
        return int(job.result()), ""
    except Exception as error:  # submitit's own, whatever its worker raised, or what it left could not be read
        return None, f"died ({type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''})"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """What is started inside computes with so many threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
