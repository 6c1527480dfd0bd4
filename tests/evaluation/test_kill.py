"""SIGKILL at random moments, ten times: nothing is lost, nothing is corrupted; several processes share the work."""

import multiprocessing
import random
import runpy
import sys
import time

import numpy as np
import pytest

from rush_bench.evaluation.records import load_results

NETWORK = """
import torch
from rush_bench.networks import build as make

torch.set_num_threads(1)

def build():
    return make({"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8}, seed=1).eval()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(out)` starts `rush-bench attack` in a process of its own, on a network and images of the user's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rush_bench.cli.attack", "rush_bench.evaluation.runner", "rush_bench.defenses.load"])
    (tmp_path / "killed_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    split = {f"{name}_images": pixels for name in ("train", "test")} | {
        f"{name}_labels": np.arange(60) % 5 for name in ("train", "test")
    }
    np.savez(tmp_path / "noise.npz", **split, classes=np.array(list("abcde")))
    arguments = [
        "attack",
        "--model",
        "killed_network:build",
        "--noise",
        "uniform:0.2",
        "--votes",
        "2",
        "--suite",
        "linf8-quick",
    ]
    arguments += ["--dataset", str(tmp_path / "noise.npz"), "--chunk", "4", "--set", "eot.steps=4", "--set", "apgd.steps=4"]
    arguments += ["--set", "square.queries=20"]

    def start(out):
        # the child's sys.argv is its parent's
        monkeypatch.setattr(sys, "argv", ["rush-bench", *arguments, "--out", str(out)])
        process = context.Process(target=runpy.run_module, args=("rush_bench",), kwargs={"run_name": "__main__"})
        process.start()
        return process

    return start


def contents(results):
    """Every array of every cell but the time it took, x' included."""
    found = {}
    for result in load_results(results):
        assert result.complete
        key = result.labels["defense"], result.labels["attack"]
        found[key] = result.frame.drop(columns="seconds").sort_values("index").to_numpy(float)
        for path in sorted(result.folder.glob("adversarial-*.npy")):
            found[*key, path.name] = np.load(path)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_ten_kills_lose_nothing(command, tmp_path):
    whole = command(tmp_path / "whole")
    begun = time.monotonic()
    whole.join()
    assert whole.exitcode == 0
    length, draw, kills, moments = time.monotonic() - begun, random.Random(1), 0, set()
    for attempt in range(12):
        out = tmp_path / str(attempt)
        while kills < 10:
            process = command(out)
            process.join(timeout=draw.uniform(0.1, 0.6) * length)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            moments.add(len(list(out.glob("runs/*/chunk-*.npz"))))
        last = command(out)
        last.join()
        assert last.exitcode == 0
        assert same(contents(out), contents(tmp_path / "whole"))
        # neither locks nor temporary files stay, in the folders that were worked on again
        assert not list(out.glob("runs/*/*.lock"))
        if kills == 10:
            break
    assert kills == 10 and len(moments) > 3


def test_several_processes_share_the_work(command, tmp_path):
    processes = [command(tmp_path / "shared") for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    alone = command(tmp_path / "alone")
    alone.join()
    assert same(contents(tmp_path / "shared"), contents(tmp_path / "alone"))
