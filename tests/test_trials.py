"""A small round of the kill, damage and range trials; the large one is run by hand (benchmarks/results/trials.txt)."""

import importlib.util
import random
from pathlib import Path

import pytest

pytestmark = pytest.mark.strangers


@pytest.fixture(scope="module")
def trials():
    spec = importlib.util.spec_from_file_location("trials", Path(__file__).parents[1] / "benchmarks" / "trials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("attack", "certify"):  # two chunks of each cell
        module.COMMANDS[name] = module.but(module.COMMANDS[name], "--n", "10")
    return module


def test_damage_never_changes_a_number(trials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = trials.damages(tmp_path, 25, random.Random(1))
    assert said["damaged files"] == 25 and said["refused"] + said["left out or not done"] > 10
    assert said["wrong numbers"] == said["tracebacks"] == 0


def test_numbers_out_of_range_are_refused(trials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "COMMANDS", {key: trials.COMMANDS[key] for key in ("attack", "certify")})
    said = trials.ranges(tmp_path)
    assert said["settings swept"] > 25 and said["not refused"] == said["tracebacks"] == 0


@pytest.mark.parametrize(("name", "count"), [("train", 1), ("attack", 1), ("certify", 1)])
def test_a_killed_command_finishes_with_the_same_bits_and_leaves_nothing(trials, tmp_path, monkeypatch, name, count):
    monkeypatch.setattr(trials, "COMMANDS", {name: trials.COMMANDS[name]})
    said = trials.kills(tmp_path, count, random.Random(2))
    assert said["kills"] >= count and said["left for good"] == said["wrong numbers"] == 0
