"""`train`: done, stopped, continued, interrupted, and the disks it cannot write to."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from rush_bench.training import loop
from rush_bench.training.stage import Stage

TINY = ["--preset", "smoke", "--set", "network.name=resnet", "--set", "network.blocks=1", "--set", "network.width=4"]
TINY += ["--set", "n_train=30", "--set", "pretrain.epochs=1", "--set", "finetune.epochs=1", "--device", "cpu"]


def test_train_leaves_a_model_and_a_second_run_does_nothing(rush_bench, mine: Path) -> None:
    first = rush_bench("train", "rush", "--dataset", mine, *TINY, "--json")
    assert first.exit_code == 0, first.output
    card = json.loads(first.stdout)
    assert (card["name"], card["votes"], card["settings"]["pretrain"]["epochs"]) == ("rush-mine", [1, 64], 1)
    written = Path("models/rush-mine/model.safetensors").stat().st_mtime_ns
    again = rush_bench("train", "rush", "--dataset", mine, *TINY)
    assert (again.exit_code, again.stdout) == (0, "")
    assert "nothing to do" in again.stderr and "rush-mine" in again.stderr
    assert Path("models/rush-mine/model.safetensors").stat().st_mtime_ns == written


def test_options_reach_the_training(rush_bench, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[pretrain]\nlr = 0.25\nepochs = 9\n")
    options = ["--config", "mine.toml", *TINY, "--name", "other", "--store", "elsewhere", "--seed", "5", "--json"]
    result = rush_bench("train", "simclr", "--dataset", mine, *options)
    assert result.exit_code == 0, result.output
    card = json.loads(Path("elsewhere/other/card.json").read_text())
    assert card == json.loads(result.stdout)
    assert card["seed"] == 5
    assert card["settings"]["pretrain"]["lr"] == 0.25 and card["settings"]["pretrain"]["epochs"] == 1  # --set is last


def test_stopped_by_max_minutes_is_3_and_the_same_command_finishes(rush_bench, mine: Path) -> None:
    args = ["train", "simclr", "--dataset", mine, *TINY]
    stopped = rush_bench(*args, "--max-minutes", "0")
    assert (stopped.exit_code, stopped.stdout) == (3, "")
    assert "the same command" in stopped.stderr
    assert not Path("models/simclr-mine/card.json").exists()
    assert rush_bench(*args).exit_code == 0
    assert Path("models/simclr-mine/card.json").exists()


def test_other_settings_under_the_same_name_are_refused(rush_bench, mine: Path) -> None:
    assert rush_bench("train", "simclr", "--dataset", mine, *TINY).exit_code == 0
    result = rush_bench("train", "simclr", "--dataset", mine, *TINY, "--set", "pretrain.lr=0.125")
    assert result.exit_code == 2
    assert "pretrain.lr" in result.stderr and "--name" in result.stderr


def test_control_c_leaves_work_that_the_same_command_finishes(rush_bench, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step

    def interrupted(stage: Stage, *rest: object) -> object:
        if stage.name == "finetune":  # a checkpoint of what came before is there
            signal.raise_signal(signal.SIGINT)
        return step(stage, *rest)

    args = ["train", "simclr", "--dataset", mine, *TINY]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", interrupted)
            stopped = rush_bench(*args)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stopped.exit_code, stopped.stdout) == (130, ""), stopped.stderr
    assert stopped.stderr.endswith("stopped; the same command continues\n") and "Traceback" not in stopped.stderr
    assert Path("models/simclr-mine/.training/checkpoint.pt").exists()
    assert rush_bench(*args).exit_code == 0 and Path("models/simclr-mine/card.json").exists()


def test_a_full_disk_is_one_error_that_names_the_file(rush_bench, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = rush_bench("train", "simclr", "--dataset", mine, *TINY)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "No space left" in result.stderr and "models/simclr-mine" in result.stderr and "free some space" in result.stderr
    left = [path for path in Path("models").rglob("*") if path.suffix in (".pt", ".safetensors", ".json")]
    assert left == [], "half-written files stay"
    monkeypatch.undo()
    monkeypatch.chdir(mine.parent)
    assert rush_bench("train", "simclr", "--dataset", mine, *TINY).exit_code == 0


def test_a_store_that_is_no_folder_is_one_error(rush_bench, mine: Path) -> None:
    Path("models").write_text("a file")
    result = rush_bench("train", "simclr", "--dataset", mine, *TINY)
    assert (result.exit_code, result.stdout) == (1, ""), result.exception
    assert "error: cannot write models/" in result.stderr and "choose another folder" in result.stderr
