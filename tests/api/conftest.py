"""A tiny network, its images, a folder of finished records and a store: what the examples of the public functions stand on."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rush_bench as rb
from rush_bench.api import settle as settled
from rush_bench.attacks.suites import parse_suite
from rush_bench.evaluation import runner
from rush_bench.networks import build
from rush_bench.store import save_model

QUICK = parse_suite("linf8-quick", only=("clean", "pgd"), overrides={"pgd.steps": 1, "pgd.select_draws": 1})


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()


@pytest.fixture(autouse=True)
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to `results/` goes nowhere that matters."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of an audit, which take as long as it, are not drawn; they have tests of their own."""
    monkeypatch.setattr(settled, "write_figures", lambda *found: [])


@pytest.fixture
def network() -> nn.Module:
    return linear()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with `linear` on ten digits, clean and under PGD."""
    folder, digits = tmp_path_factory.mktemp("measured"), rb.load_dataset("digits", "test", 10)
    runner.attack(rb.Deterministic(linear(), shape=digits.shape, name="linear"), QUICK, digits, out=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the model `tiny`, smoothed by uniform noise, untrained."""
    folder = tmp_path_factory.mktemp("store")
    model = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 10, "channels": 1, "size": 8})
    card = {"name": "tiny", "recipe": "rush", "dataset": "digits", "pretrain_dataset": "digits", "protocol": "SLF"}
    card |= {"extra_data": None, "preset": "smoke", "network": model.spec, "noise": {"law": "uniform", "scale": 0.3}}
    save_model(folder / "tiny", card | {"votes": [1, 16]}, model.state_dict())
    return folder
