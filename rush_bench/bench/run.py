"""`run`: a benchmark file from its plan to its tables. Any number of processes may run the same file at once."""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from rush_bench.bench import cluster
from rush_bench.bench import file as files
from rush_bench.bench.jobs import Job, Loaded, Place, expand, unfinished
from rush_bench.bench.plan import Planned, check, plan
from rush_bench.deadline import NEVER, Deadline
from rush_bench.devices import choose_device
from rush_bench.errors import DOES_NOT_STAND, Busy, Failure, RushBenchError, WorkLeft, failed_code, out_of_memory
from rush_bench.files import write_text
from rush_bench.packs import pack_hint
from rush_bench.progress import duration

WAIT = 1.0  # seconds before looking again at what another process is at
FRESH = 60.0  # seconds that a page is good for, or as many as keep making it within PAGE_SHARE of the time
PAGE_SHARE = 0.05
SHOWN = ("table", "report")  # commands whose answer is that of the whole file


@dataclass
class BenchmarkRun:
    """The result of a run: its plan, the failed jobs with their reasons, and the names of those left."""

    benchmark: files.Benchmark
    place: Place
    planned: list[Planned]
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where a job failed (4: each for want of a package), 3 where work is left, else 0."""
        if self.failed:
            return failed_code(self.failed)
        return WorkLeft.exit_code if self.left else 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, JSON-able."""
        place = {"out": str(self.place.out), "store": str(self.place.store)}
        summary = {"benchmark": self.benchmark.name, "title": self.benchmark.title, **place}
        return {
            **summary,
            "jobs": [planned_job.to_dict() for planned_job in self.planned],
            "failed": self.failed,
            "left": self.left,
        }


def run(
    name: str,
    *,
    out: Path | str | None = None,
    store: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    workers: int = 1,
    on: str | None = None,
    asked: Sequence[str] = (),
    max_minutes: float | None = None,
    priced: bool = True,
    quiet: bool = False,
    before: Callable[[list[Planned]], bool] = lambda planned: True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> BenchmarkRun:
    """Run a benchmark file, or a shipped one by its name. The same call again, from any number of processes, continues.

    It leaves a copy of the file in `out`.

    `out` and `store` stand for those of the file; `before` receives the plan, with costs where `priced`, and may cancel it
    by returning False. `quiet`: tables are written, not printed. `workers`: processes, each of one thread; all of them run this
    file, and their logs lie in `out`. `on`: they are jobs of submitit, `slurm:8` or `local:4`, with the resources `asked`
    (`bench.cluster`); this process waits for them and makes the tables. BadInput for a file that is wrong, before anything
    runs. A job that fails is in `failed` and stops none but those that need it.
    """
    where = None if on is None else cluster.parse(on, asked)
    path = files.find(name)
    bench = files.read(path)
    deadline = Deadline.after(max_minutes)
    place = Place(Path(out or bench.out), Path(store or bench.store), Path(data_dir) if data_dir else None, device)
    if (packed := pack_hint(place.out)) and not (place.out / "runs").exists():
        say(f"there are no records in {place.out}{packed}")
    load = Loaded()
    jobs = expand(bench, place, load)
    check(jobs)
    found = BenchmarkRun(bench, place, plan(jobs, place, load, priced))
    del load  # its images are not needed any more
    if not before(found.planned):
        return found
    write_text(place.out / path.name, path.read_text(encoding="utf-8"))
    line = [str(path), "--out", str(place.out), "--store", str(place.store)]
    line += ["--data-dir", str(data_dir)] if data_dir else []
    gpus = gpus_of(device)
    page = Page(found)
    if where is not None:
        if where.cluster == "local":
            cluster.check_room(where.count, gpus)
        line += ["--device", device]
        wrong = cluster.run_on(where, line, place.out, deadline, gpus, say, page.refresh)
        conclude(found, plan(jobs, place, Loaded(), priced=False), wrong, quiet, say)
        return found
    if workers > 1:
        cluster.check_room(workers, gpus)
    devices = [f"cuda:{k}" if gpus > 1 else device for k in range(1, workers)]
    with others([[*line, "--device", each] for each in devices], place.out, deadline):
        work(found, deadline, quiet, say, page.refresh if priced else lambda: None)
    return found


def gpus_of(device: str) -> int:
    """How many GPUs there are to share out; 0 where processes compute on the CPU, 1 where the user has named the one."""
    if choose_device(device).type != "cuda":
        return 0
    return torch.cuda.device_count() if device in ("auto", "cuda") else 1


def conclude(
    found: BenchmarkRun, now: Sequence[Planned], wrong: Sequence[str], quiet: bool, say: Callable[[str], None]
) -> None:
    """After the jobs elsewhere: what they have not done is left, or failed where one of them did; then the tables."""
    for line in wrong:
        say(line)
    for planned_job in now:
        if planned_job.state == "impossible" or (planned_job.state in ("missing", "in progress") and wrong):
            _fail(found, planned_job.job, planned_job.why or "; ".join(wrong), say)
        elif planned_job.state in ("missing", "in progress"):
            found.left.append(planned_job.job.name)
    if not found.left:
        anew = replace(found, planned=[planned_job for planned_job in now if planned_job.state == "anew"])
        work(anew, NEVER, quiet, say, lambda: None)


class Page:
    """The page of the results, updated while jobs run, if the file asks for one."""

    def __init__(self, found: BenchmarkRun) -> None:
        self.jobs = [planned_job.job for planned_job in found.planned if planned_job.job.kind == "report"]
        self.written, self.cost = time.monotonic(), 0.0

    def refresh(self) -> None:
        """Write the page, unless it is recent or would take too much of the time. There may be no record to show yet."""
        begun = time.monotonic()
        if not self.jobs or begun - self.written < max(FRESH, self.cost / PAGE_SHARE):
            return
        for job in self.jobs:
            with contextlib.suppress(RushBenchError):
                execute(job, None, quiet=True)
        self.written = time.monotonic()
        self.cost = self.written - begun


def work(found: BenchmarkRun, deadline: Deadline, quiet: bool, say: Callable[[str], None], between: Callable[[], None]) -> None:
    """Run what is missing: each job when what it needs is there, one that another process works on when that is done.

    `between` is called after each job.
    """
    done = {planned_job.job.name for planned_job in found.planned if planned_job.state == "done"}
    for planned_job in found.planned:
        if planned_job.state == "impossible":
            _fail(found, planned_job.job, planned_job.why, say)
    left = [planned_job.job for planned_job in found.planned if planned_job.state in ("missing", "in progress", "anew")]
    total, begun = len(left), 0
    while left:
        waiting: list[Job] = []
        for job in left:
            lacking = unfinished(job, found.place.store)
            if bad := next((name for name in lacking if name in _models_not_made(found)), None):
                _fail(found, job, Failure(f"needs {bad}, which failed", _models_not_made(found)[bad]), say)
            elif lacking or any(job.waits_for(other) for other in left if other.name not in (*done, *found.failed)):
                waiting.append(job)
            elif deadline.over:
                found.left = [job.name for job in left if job.name not in (*done, *found.failed)]
                return
            else:
                say(f"[{begun + 1}/{total}] {job.line}")
                try:
                    execute(job, deadline.minutes_left, quiet)
                    done.add(job.name)
                    begun += 1
                    between()
                except Busy:
                    waiting.append(job)
                except WorkLeft:
                    waiting.append(job)
                    found.left.append(job.name)
                except RushBenchError as error:
                    _fail(found, job, Failure(str(error), error), say)
                except Exception as error:  # a recipe or a network may be anybody's code: the other jobs continue
                    if not (says := out_of_memory(error)):
                        traceback.print_exc()
                    _fail(found, job, says or f"{type(error).__name__}: {error}", say)
        if found.left:
            found.left = [job.name for job in waiting]
            return
        if len(waiting) == len(left):
            time.sleep(WAIT)
        left = waiting


def _models_not_made(found: BenchmarkRun) -> dict[str, str]:
    """The models that will not be there, with the reason."""
    return {
        planned_job.job.makes: found.failed[planned_job.job.name]
        for planned_job in found.planned
        if planned_job.job.makes and planned_job.job.name in found.failed
    }


def _fail(found: BenchmarkRun, job: Job, why: str, say: Callable[[str], None]) -> None:
    found.failed[job.name] = why
    say(f"failed: {job.name}: {why}")


def execute(job: Job, minutes: float | None, quiet: bool) -> None:
    """Run a command in this process, its answer left out unless it is the file's; what its exit code says is raised."""
    words = list(job.words)
    if minutes is not None and "max-minutes" in files.parameters(job.kind):
        words += ["--max-minutes", f"{minutes:.6f}"]
    with _without_stdout() if quiet or job.kind not in SHOWN else contextlib.nullcontext():
        try:
            code = files.command(job.kind).main(words, prog_name=job.kind, standalone_mode=False, parent=files.group())
        except click.Abort as stopped:  # click's word for Ctrl-C
            raise KeyboardInterrupt from stopped
    if code == WorkLeft.exit_code:
        raise WorkLeft(f"{job.name} has work left")
    if code and code != DOES_NOT_STAND:  # a verdict is a result
        error = RushBenchError("some of its cells failed; the lines above say which and why")
        error.exit_code = code
        raise error


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        yield


@contextlib.contextmanager
def others(lines: Sequence[Sequence[str]], out: Path, deadline: Deadline) -> Iterator[None]:
    """Further processes on the same file while the block runs, one a line; at its end they finish what they are at."""
    started = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for k, line in enumerate(lines):
            out.mkdir(parents=True, exist_ok=True)
            left = deadline.minutes_left
            minutes = [] if left is None else ["--max-minutes", f"{left:.6f}"]
            words = [sys.executable, "-m", "rush_bench", "run", *line, "--worker", *minutes]
            with (out / f"worker-{k + 2}.log").open("a") as log:
                started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log, env=environment))
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:  # an error or Ctrl-C here: they stop as if it were theirs
            if process.poll() is None:
                process.terminate()
                process.wait()


def minutes_text(seconds: float) -> str:
    """`12 s`, `34 min`, `2.5 h`, or a dash where nobody can say."""
    if seconds != seconds:
        return "–"
    return duration(seconds) if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
