"""`run --on`: the jobs of a cluster are submitted again while there is work, and make what one process makes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from rush_bench.bench import cluster
from rush_bench.bench import run as running
from rush_bench.bench.cluster import GIB, TRIES, Where, Worker, check_room, parse, run_on
from rush_bench.cli import main
from rush_bench.deadline import NEVER, Deadline
from rush_bench.errors import BadInput
from rush_bench.records import load_results

FILE = """
out = "results"
store = "kept"

[[train]]
recipe = "pgd_at"
dataset = "mine.npz"
preset = "smoke"
[train.set]
network = { name = "resnet", blocks = [1], width = 4 }
n_train = 30
train.epochs = 1
attack.steps = 1

[[attack]]
suite = "linf8-quick"
attacks = ["clean", "pgd"]
dataset = "mine.npz"
n = 6
chunk = 3
set.pgd = { steps = 1 }
"""


class Jobs:
    """An executor whose jobs end as told: an exit code, or the error that killed them; None: never."""

    def __init__(self, *ends: int | Exception | None) -> None:
        self.ends, self.submitted, self.cancelled, self.asked = list(ends), list[Worker](), 0, list[dict]()

    def update_parameters(self, **asked: object) -> None:
        self.asked.append(asked)

    def submit(self, worker: Worker) -> SimpleNamespace:
        self.submitted.append(worker)
        end = self.ends.pop(0)

        def result() -> int:
            if isinstance(end, Exception):
                raise end
            return end

        def cancel() -> None:
            self.cancelled += 1

        paths = SimpleNamespace(stderr=f"job-{len(self.submitted)}.err")
        return SimpleNamespace(
            job_id=str(len(self.submitted)), done=lambda: end is not None, result=result, cancel=cancel, paths=paths
        )


def outcome(monkeypatch, jobs: Jobs, count: int, deadline: Deadline = NEVER, gpus: int = 0, between=lambda: None) -> list[str]:
    monkeypatch.setattr(cluster, "executor_of", lambda where, folder: jobs)
    monkeypatch.setattr(cluster, "LOOK", 0.0)
    where = Where("local", count, {"timeout_min": 60, "cpus_per_task": 2})
    return run_on(where, ["a.toml"], Path("out"), deadline, gpus, lambda text: None, between)


def test_a_job_with_work_left_is_submitted_again_until_there_is_none(monkeypatch) -> None:
    jobs = Jobs(3, 3, 3, 0, 0)
    assert outcome(monkeypatch, jobs, 2) == [] and len(jobs.submitted) == 5
    assert {worker.line for worker in jobs.submitted} == {("a.toml", "--max-minutes", "54.000000")}


def test_nothing_is_submitted_again_once_the_time_is_over(monkeypatch) -> None:
    jobs = Jobs(3)
    assert outcome(monkeypatch, jobs, 1, deadline=Deadline(0.0)) == [] and len(jobs.submitted) == 1


def test_a_job_that_dies_has_more_tries_and_one_that_fails_has_none(monkeypatch) -> None:
    jobs = Jobs(*[MemoryError("no room")] * TRIES)
    (wrong,) = outcome(monkeypatch, jobs, 1)
    assert "no room" in wrong and f"job-{TRIES}.err" in wrong
    jobs = Jobs(MemoryError(), 0)
    assert outcome(monkeypatch, jobs, 1) == []
    jobs = Jobs(1, 0)
    (wrong,) = outcome(monkeypatch, jobs, 1)
    assert "exit code 1" in wrong and len(jobs.submitted) == 1


def test_ctrl_c_cancels_what_still_runs(monkeypatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    jobs = Jobs(0, None, None)
    with pytest.raises(KeyboardInterrupt):
        outcome(monkeypatch, jobs, 3, between=stop)
    assert jobs.cancelled == 2


def test_each_process_of_this_machine_sees_one_gpu(monkeypatch) -> None:
    jobs = Jobs(0, 0, 0)
    outcome(monkeypatch, jobs, 3, gpus=3)
    assert [asked["visible_gpus"] for asked in jobs.asked] == [[0], [1], [2]]


@pytest.mark.parametrize("on", ["slurm", "local:0", "local:x", "pbs:3", ":2"])
def test_a_cluster_and_a_number(on) -> None:
    with pytest.raises(BadInput, match="slurm:N or local:N"):
        parse(on, [])


def test_what_is_asked_of_it(monkeypatch) -> None:
    where = parse("slurm:8", ["timeout_min=30", "slurm_partition=gpu"])
    assert where.asked == {"timeout_min": 30, "cpus_per_task": 1, "name": "rush-bench", "slurm_partition": "gpu"}
    with pytest.raises(BadInput, match="KEY=VALUE"):
        parse("slurm:8", ["gpu"])


def test_no_more_processes_than_gpus_and_memory(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "free_memory", lambda: 3 * GIB)
    check_room(3, 0)
    with pytest.raises(BadInput, match="4 GiB"):
        check_room(4, 0)
    with pytest.raises(BadInput, match="2 processes on 1 GPUs"):
        check_room(2, 1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch):
    """An empty folder with `mine.npz` and the file; runs a command there."""
    rng, arrays = np.random.default_rng(0), {"classes": np.array(list("abcde"))}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 5
        arrays[f"{part}_images"] = (labels[:, None, None] * 50 + rng.integers(0, 25, (count, 8, 8))).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(tmp_path / "mine.npz", **arrays)
    (tmp_path / "tiny.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return lambda *words: CliRunner().invoke(main, ["run", "tiny.toml", "--device", "cpu", *words])


def test_a_job_on_this_machine_runs_the_file(here) -> None:
    pytest.importorskip("submitit")
    result = here("--on", "local:1", "--ask", "timeout_min=9")
    assert result.exit_code == 0, result.output
    assert "pgd_at-mine" in result.stdout and list(Path("results/jobs").glob("*_log.err"))
    assert all(cell.complete for cell in load_results(Path("results")))


def test_what_the_jobs_left_is_told(here, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "run_on", lambda *given: ["job 7 died"])
    result = here("--on", "local:1", "--json")
    failed = json.loads(result.stdout)["failed"]
    assert result.exit_code == 1
    assert failed["train pgd_at-mine"] == failed["attack pgd_at-mine linf8-quick"] == "job 7 died"
    monkeypatch.setattr(cluster, "run_on", lambda *given: [])
    assert here("--on", "local:1").exit_code == 3


def test_the_page_is_made_again_now_and_then(monkeypatch) -> None:
    clock, made = [0.0], []
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])

    def execute(job, minutes, quiet):
        made.append(clock[0])
        clock[0] += 10  # a page that takes long
        raise BadInput("no record yet")

    monkeypatch.setattr(running, "execute", execute)
    page = running.Page(SimpleNamespace(planned=[SimpleNamespace(job=SimpleNamespace(kind="report"))]))
    for now in (1, running.FRESH, 100, 70 + 10 / running.PAGE_SHARE):
        clock[0] = now
        page.refresh()
    assert made == [running.FRESH, 70 + 10 / running.PAGE_SHARE]


def test_a_worker_that_is_preempted_is_queued_as_it_was() -> None:
    pytest.importorskip("submitit")
    worker = Worker(("tiny.toml",))
    assert worker.checkpoint().function == worker
