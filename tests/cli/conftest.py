"""A store with two tiny models, images of the user's own, and a way to run the command in this process or in its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from rush_bench.cli import main
from rush_bench.networks import build
from rush_bench.store import save_model

# One step of each attack, one chunk: the commands are tested here, not the attacks.
QUICK = ["--suite", "linf8-quick", "--n", "10", "--repeats", "2", "--set", "pgd.steps=1", "--set", "pgd.select_draws=1"]
QUICK += ["--set", "square.queries=10"]
QUICK += ["--set", "eot.steps=1", "--set", "eot.draws=1", "--set", "eot.select_draws=1", "--set", "apgd.steps=2"]
QUICK += ["--set", "apgd.bank=1"]


@pytest.fixture
def rush_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUSH_BENCH_DATA", raising=False)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of trials and certificates, which take as long as the rest, are not drawn; they have tests of their own."""
    monkeypatch.setattr("rush_bench.api.settle.write_figures", lambda *found: [])
    monkeypatch.setattr("rush_bench.report.certificates.figure", lambda *found: None)


@pytest.fixture
def process() -> Callable[..., "subprocess.Popen[str]"]:
    """Start a command in a process of its own."""

    def start(args: Sequence[object], cwd: Path, **options: object) -> "subprocess.Popen[str]":
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        # a background job of a shell script hands down an ignored SIGINT, with which Ctrl-C would do nothing
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rush_bench.cli import main; main()"
        )
        line = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.Popen(line, cwd=cwd, env=environment, text=True, **options)  # type: ignore[call-overload]

    return start


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """`mine.npz`: 60 train and 20 test images, 1 x 8 x 8, five classes told apart by their brightness."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"classes": np.array(list("abcde"))}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 5
        arrays[f"{part}_images"] = (labels[:, None, None] * 50 + rng.integers(0, 25, (count, 8, 8))).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path / "mine.npz"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """`models/` with `plain-mine` (deterministic) and `rush-mine` (votes 1 and 64), untrained."""
    network = {"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8}
    for name, votes, noise in (("plain", [0], None), ("rush", [1, 64], {"law": "uniform", "scale": 0.3})):
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            model = build(network)
        card = {"name": f"{name}-mine", "recipe": name, "dataset": "mine", "pretrain_dataset": "mine", "protocol": "SLF"}
        card |= {"extra_data": None, "preset": "smoke", "network": model.spec, "noise": noise, "votes": votes}
        card |= {"settings": {"pretrain": {"lr": 0.5}}}
        save_model(tmp_path / "models" / f"{name}-mine", card, model.state_dict())
    return tmp_path / "models"


@pytest.fixture
def but() -> Callable[..., list[object]]:
    """The usual options, each with its value, less those of one value that are given: they are taken once."""

    def options(usual: Sequence[object], given: Sequence[object]) -> list[object]:
        pairs = zip(usual[::2], usual[1::2], strict=True)
        return [*(word for pair in pairs for word in pair if pair[0] in ("--set", "--models") or pair[0] not in given), *given]

    return options


@pytest.fixture
def quick() -> list[str]:
    """Options that make an attack take a moment."""
    return list(QUICK)
