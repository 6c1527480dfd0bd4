"""`run`: plans, runs, resumes, fails job by job; what it makes is what the single commands make."""

import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pytest
import torch

from rush_bench.attacks.pgd import PGD
from rush_bench.files import sha256_file
from rush_bench.networks import build
from rush_bench.records import load_results

FILE = """
title = "two systems in a moment"
out = "results/tiny"
store = "kept"

[[train]]
recipe = ["simclr", "rush"]
dataset = "mine.npz"
preset = "smoke"
[train.set]
network = { name = "resnet", blocks = [1], width = 4 }
n_train = 30
pretrain.epochs = 1
finetune.epochs = 1

[[attack]]
models = ["simclr", "rush@1"]
suite = ["linf8-quick", "linf16-quick"]
attacks = ["clean", "pgd"]
dataset = "mine.npz"
n = 6
repeats = 2
chunk = 3
set.pgd = { steps = 1, select_draws = 1 }
"""
TABLE = "results/tiny/table.csv"


@pytest.fixture
def tiny(rush_bench, mine: Path):
    """`tiny("--plan", more="[[audit]]...")` runs the file in this process; `more` is added to it."""

    def run(*args: object, text: str = FILE, more: str = ""):
        (mine.parent / "tiny.toml").write_text(text + more)
        return rush_bench("run", "tiny.toml", "--device", "cpu", *args)

    return run


def written(folder: str = ".") -> dict[str, int]:
    """When every chunk and every model was written."""
    return {str(path): path.stat().st_mtime_ns for kind in ("*.npz", "*.safetensors") for path in Path(folder).rglob(kind)}


def states(result) -> dict[str, str]:
    return {job["name"]: job["state"] for job in json.loads(result.stdout)["jobs"]}


def test_models_of_the_same_network_are_paid_each(tiny) -> None:
    text = FILE.replace('recipe = ["simclr", "rush"]', 'recipe = "simclr"\nseed = [0, 1]').replace(
        '["simclr", "rush@1"]', '"simclr"'
    )
    jobs = {job["name"]: job for job in json.loads(tiny("--plan", "--json", text=text).stdout)["jobs"]}
    first, second = (jobs[f"attack {model} linf8-quick"]["passes"] for model in ("simclr-mine", "simclr-mine-s1"))
    assert first == second > 0


def test_it_plans_runs_and_has_nothing_left(tiny, rush_bench, monkeypatch) -> None:
    """Where the processor has bfloat16, attacks search in it, and the plan looks for those very cells."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    before = tiny("--plan", "--json")
    assert before.exit_code == 0 and not Path("kept").exists() and not Path("results").exists()
    names = ["train simclr-mine", "train rush-mine"]
    names += [f"attack {model} linf{eps}-quick" for model in ("simclr-mine", "rush-mine@1") for eps in (8, 16)]
    assert states(before) == {**dict.fromkeys(names, "missing"), "table": "anew"}
    jobs = {job["name"]: job for job in json.loads(before.stdout)["jobs"]}
    # 30 images of one batch: two views that learn, then the head on a forward pass; RUSH's head goes back to its biases
    assert jobs["train simclr-mine"]["passes"] == 30 * (6 + 1) and jobs["train rush-mine"]["passes"] == 30 * (6 + 2)
    assert all(job["seconds"] > 0 for job in jobs.values() if job["kind"] != "table")
    # the clean cell of both suites is one, and is paid once
    assert jobs["attack simclr-mine linf8-quick"]["passes"] == jobs["attack simclr-mine linf16-quick"]["passes"] + 6 * 2

    done = tiny()
    assert done.exit_code == 0, done.output
    assert "rush-mine@1" in done.stdout and "plan" in done.stderr
    table = pd.read_csv(TABLE)
    assert set(table["defense"]) == {"simclr-mine", "rush-mine@1"} and len(table) == 4
    assert table["pgd"].notna().all() and (table["n"] == 6).all()

    there = written()
    again = tiny("--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["failed"] == {}
    assert set(states(again).values()) == {"done", "anew"} and written() == there
    for job in jobs.values():  # the commands that it names find their work done
        assert rush_bench(*shlex.split(job["command"])[1:]).exit_code == 0
    assert written() == there


OTHERS = """
store = "kept"

[[import]]
file = "theirs.pt"
name = "theirs"
recipe = "noise_sup"
noise = "uniform:0.3"
normalise = "none"
dataset = "digits"

[[train]]
recipe = "rocl"
dataset = "digits"
preset = "smoke"
set.network = { name = "resnet", blocks = [1], width = 4 }

[[train]]
recipe = "finetune"
from = "rocl-digits"
name = "again"
dataset = "digits"
preset = "smoke"
protocol = "SLF"

[[train]]
recipe = "noise_sup"
from = "theirs"
name = "further"
dataset = "digits"
preset = "smoke"

[[train]]
recipe = "noise_sup"
from = "DeACL.pt"
name = "grown"
dataset = "colour.npz"
set.size = 8
preset = "smoke"

[[attack]]
models = ["theirs@1", "rocl@3", "rocl", "again", "further@1"]
suite = "linf8-quick"
attacks = "pgd"
dataset = "digits"
n = 6
"""


def test_what_starts_elsewhere_has_a_price_too(tiny) -> None:
    """Imports, trainings that start from what is not there yet or from a file, and attacks on any of them."""
    for file, size, channels, names in (
        ("theirs.pt", 16, 1, {"encoder.": "", "head.": "fc."}),
        ("DeACL.pt", 8, 3, {"encoder.": "backbone.", "head.": "classifier_adv."}),
    ):
        net = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 10, "channels": channels, "size": size})
        state = {key: value + 0.1 if "running" in key else value for key, value in net.state_dict().items()}
        for old, new in names.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        torch.save({"state_dict": state}, file)
    pixels, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2
    images = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}
    np.savez("colour.npz", classes=np.array(["a", "b"]), **images)
    plan = tiny("--plan", "--json", text=OTHERS)
    assert plan.exit_code == 0, plan.output
    jobs = {job["name"]: job for job in json.loads(plan.stdout)["jobs"]}
    assert set(states(plan).values()) == {"missing", "anew"} and jobs.pop("table")["state"] == "anew"
    assert all(job["passes"] > 0 < job["seconds"] for job in jobs.values())
    assert jobs["import theirs"]["passes"] == 500 * 16  # images that it tries at most, and votes
    assert jobs["train further"]["passes"] == 2 * 256 * 3
    assert jobs["train grown"]["passes"] == 2 * 36 * 3
    rocl = {name: jobs[f"attack {name} linf8-quick"]["passes"] for name in ("rocl-digits", "rocl-digits@3", "again")}
    assert rocl["rocl-digits"] == rocl["again"] < rocl["rocl-digits@3"]
    assert not Path("kept").exists()


def test_stopped_by_max_minutes_is_3_and_the_same_command_finishes(tiny) -> None:
    stopped = tiny("--max-minutes", "0")
    assert stopped.exit_code == 3 and "the same command continues" in stopped.stderr and not Path(TABLE).exists()
    assert states(tiny("--plan", "--json"))["train simclr-mine"] == "missing"
    assert tiny().exit_code == 0 and Path(TABLE).exists()


def test_a_training_that_was_stopped_is_in_progress_and_costs_less(tiny, rush_bench) -> None:
    jobs = {job["name"]: job for job in json.loads(tiny("--plan", "--json").stdout)["jobs"]}
    words = shlex.split(jobs["train rush-mine"]["command"])[1:]
    assert rush_bench(*words, "--max-minutes", "0").exit_code == 3
    found = next(job for job in json.loads(tiny("--plan", "--json").stdout)["jobs"] if job["name"] == "train rush-mine")
    assert found["state"] == "in progress" and found["passes"] <= jobs["train rush-mine"]["passes"]


def test_a_cell_that_fails_fails_its_job_alone(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PGD.run

    def run(self, defense, images, *args):
        return images + 0.5 if defense.name == "simclr-mine" else real(self, defense, images, *args)

    with monkeypatch.context() as patched:
        patched.setattr(PGD, "run", run)
        result = tiny("--json")
    assert result.exit_code == 1
    failed = json.loads(result.stdout)["failed"]
    assert set(failed) == {f"attack simclr-mine linf{eps}-quick" for eps in (8, 16)}
    table = pd.read_csv(TABLE)
    assert (table["pgd"].notna() == (table["defense"] != "simclr-mine")).all() and table["clean"].notna().all()
    assert tiny().exit_code == 0 and pd.read_csv(TABLE)["pgd"].notna().all()


def test_a_training_that_fails_takes_its_attacks_with_it(tiny) -> None:
    other = '[[train]]\nrecipe = "noise_sup"\ndataset = "mine.npz"\nset.train.lr = 1e30\n\n[[attack]]\n'
    worse = FILE.replace("[[attack]]\n", other).replace('["simclr", "rush@1"]', '["simclr", "rush@1", "noise_sup@1"]')
    result = tiny("--json", text=worse)
    assert result.exit_code == 1, result.output
    failed = json.loads(result.stdout)["failed"]
    assert set(failed) == {"train noise_sup-mine", *(f"attack noise_sup-mine@1 linf{eps}-quick" for eps in (8, 16))}
    assert "needs noise_sup-mine, which failed" in failed["attack noise_sup-mine@1 linf8-quick"]
    assert set(pd.read_csv(TABLE)["defense"]) == {"simclr-mine", "rush-mine@1"}


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("theirs"), 1, "ZeroDivisionError: theirs"),
        (
            RuntimeError("CUDA error: out of memory"),
            1,
            "out of memory (CUDA error: out of memory); attack with a smaller --memory, train with a smaller batch "
            "(--set STAGE.batch_size=N), or free what others use; the same command continues",
        ),
    ],
)
def test_ctrl_c_stops_it_and_a_defect_fails_its_job(tiny, monkeypatch: pytest.MonkeyPatch, error, code: int, says: str) -> None:
    def train(recipe: str, **options: object) -> None:
        raise error

    monkeypatch.setattr("rush_bench.training.train", train)
    result = tiny("--json")
    assert result.exit_code == code, result.output
    if code == 130:
        assert result.stderr.endswith("stopped; the same command continues\n")
    else:
        assert json.loads(result.stdout)["failed"]["train rush-mine"] == says


def test_what_cannot_run_here_is_told_and_the_rest_runs(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    more = '\n[[train]]\nrecipe = "pgd_at"\ndataset = "cifar10"\n'
    text = FILE.replace('["simclr", "rush@1"]', '["simclr", "rush@1", "pgd_at"]')
    result = tiny("--json", text=text, more=more)
    said = json.loads(result.stdout)
    jobs = {job["name"]: job for job in said["jobs"]}
    assert result.exit_code == 1 and jobs["train pgd_at-cifar10"]["state"] == "impossible"
    assert "cifar10.npz" in jobs["train pgd_at-cifar10"]["why"]
    assert set(said["failed"]) == {"train pgd_at-cifar10", *(f"attack pgd_at-cifar10 linf{eps}-quick" for eps in (8, 16))}
    assert set(pd.read_csv(TABLE)["defense"]) == {"simclr-mine", "rush-mine@1"}
    attacks = [f"attack pgd_at-cifar10 linf{eps}-quick" for eps in (8, 16)]
    assert f"impossible: {', '.join(attacks)}: needs pgd_at-cifar10, which cannot be had\n" in result.stderr


def _no_network(*args: object) -> None:
    raise OSError("Network is unreachable")


def arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What every chunk holds but for the time it took, by cell and chunk."""
    found = {}
    for result in load_results(folder / "results/tiny"):
        for path in sorted(result.folder.glob("chunk-*.npz")):
            with np.load(path) as file:
                found[f"{result.folder.name}/{path.name}"] = {name: file[name] for name in file.files if name != "seconds"}
    return found


class Forked:
    """Stands for `subprocess.Popen` of a command of ours; torch, which takes seconds to import, is there already."""

    def __init__(self, words: Sequence[str], *, stdout: int, stderr: IO[str], env: Mapping[str, str]) -> None:
        assert list(words[:3]) == [sys.executable, "-m", "rush_bench"] and stdout == subprocess.DEVNULL
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(words[2:], stderr, env))
        self.process.start()
        self.terminate, self.kill, self.wait = self.process.terminate, self.process.kill, self.process.join

    @staticmethod
    def _run(words: Sequence[str], stderr: IO[str], env: Mapping[str, str]) -> None:
        os.environ |= env
        sys.argv = list(words)
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(stderr):
            runpy.run_module("rush_bench", run_name="__main__", alter_sys=True)

    def poll(self) -> int | None:
        return self.process.exitcode


@pytest.mark.strangers
def test_killed_and_shared_it_gives_the_same_bits(tiny, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny().exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tiny.toml", "mine.npz"):
        shutil.copy(tmp_path / name, other / name)
    shutil.copytree(tmp_path / "kept/simclr-mine", other / "kept/simclr-mine")  # one training is enough to be shared
    monkeypatch.chdir(other)
    monkeypatch.setattr(subprocess, "Popen", Forked)
    line = [sys.executable, "-m", "rush_bench", "run", "tiny.toml", "--device", "cpu", "--workers", "2"]
    with Path(os.devnull).open("w") as nothing:
        shared = Forked(line, stdout=subprocess.DEVNULL, stderr=nothing, env={"OMP_NUM_THREADS": "1"})
    log, begun = other / "results/tiny/worker-2.log", time.monotonic()
    while not list(other.glob("results/tiny/runs/*/chunk-0001.npz")) or "rush-bench" not in log.read_text():
        assert shared.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.02)
    shared.kill()  # in the midst of the attacks
    shared.wait()
    finished = tiny()  # its worker may still be at work
    assert finished.exit_code == 0 and "rush-mine@1" in finished.stdout, finished.output
    mine_, theirs = arrays(tmp_path), arrays(other)
    assert mine_.keys() == theirs.keys() and len(mine_) == 2 * (2 + 2 * 4)
    for place, made in mine_.items():
        assert made.keys() == theirs[place].keys()
        assert all(np.array_equal(made[name], theirs[place][name]) for name in made), place
    trained = "kept/rush-mine/model.safetensors"
    assert sha256_file(tmp_path / trained) == sha256_file(other / trained)
    here, there = (pd.read_csv(folder / TABLE).drop(columns="training_seconds") for folder in (tmp_path, other))
    assert here.equals(there)


def test_the_shipped_ones_are_listed(rush_bench) -> None:
    text = rush_bench("run", "--list").stdout
    assert [name for name in ("demo", "digits") if f" {name} " not in text] == []
    assert rush_bench("run").stdout == text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[attack]]", "[[atack]]", "did you mean 'attack'?"),
        ("out = ", "outt = ", "did you mean 'out'?"),
        ("preset =", "presett =", "[[train]] 1 named 'presett'; did you mean 'preset'?"),
        ('["simclr", "rush"]', '"rsuh"', "[[train]] 1, recipe: no recipe named 'rsuh'; did you mean 'rush'?"),
        ('preset = "smoke"', 'preset = "smok"', "[[train]] 1: no preset named 'smok'; did you mean 'smoke'?"),
        ("pretrain.epochs = 1", "pretrain.epoch = 1", "did you mean 'pretrain.epochs'?"),
        ("pretrain.epochs = 1", "pretrain.epochs = 0", "setting pretrain.epochs=0 must be a whole number, at least 1"),
        ('"linf16-quick"', '"linf16-quik"', "[[attack]] 1: no suite named 'linf16-quik'"),
        ('"pgd"]', '"pgt"]', "[[attack]] 1: no attack named 'pgt'"),
        ("steps = 1", "stpes = 1", "[[attack]] 1: no setting named 'pgd.stpes'; did you mean 'pgd.step"),
        ("n = 6", 'n = "ten"', "[[attack]] 1: --n takes a number"),
        ("repeats = 2", "repeats = 0", "[[attack]] 1: Invalid value for '--repeats'"),
        ('models = ["simclr", "rush@1"]', 'models = "acl"', "no model of tiny.toml: [[attack]] 1 named 'acl'"),
        ('models = ["simclr", "rush@1"]', 'models = "simclr@64"', "chooses deterministic models alone"),
        ("n = 6", 'store = "elsewhere"', "store is for the whole file"),
        ("n = 6", "n = {a = 1}", "is to be text, a number"),
        ('dataset = "mine.npz"\npreset', 'cost = 1\ndataset = "mine.npz"\npreset', "say of which in [equal_cost]"),
        ('recipe = ["simclr", "rush"]', "", "recipe is missing"),
        ('["simclr", "rush"]', '["simclr", "rush"]\nname = "same"', "another job makes 'same' too"),
        (
            "[[attack]]",
            '[[train]]\nrecipe = "finetune"\nfrom = "simclr-mine"\ndataset = "mine.npz"\n[[attack]]',
            "needs a name",
        ),
        ('dataset = "mine.npz"\npreset', "preset", "dataset is missing"),
        ('dataset = "mine.npz"\npreset', 'dataset = "mien"\npreset', "[[train]] 1: no dataset named 'mien'"),
        ("title =", "title", "tiny.toml cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_fix(tiny, old: str, new: str, says: str) -> None:
    assert old in FILE
    result = tiny(text=FILE.replace(old, new, 1))
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not Path("results").exists() and not Path("kept").exists()


def test_a_name_that_is_none_is_told(rush_bench) -> None:
    result = rush_bench("run", "dmo")
    assert result.exit_code == 2 and "did you mean 'demo'?" in result.stderr
