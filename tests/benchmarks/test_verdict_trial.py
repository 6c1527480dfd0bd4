"""The trial of the audit in small: what it says of a masked network. That honest ones stand is in tests of the audit."""

import dataclasses

import pytest

from rush_bench.audits.experiments import BUDGETS
from rush_bench.datasets import load_dataset

SMALL = {"steps": 4, "lengths": (2, 4), "restarts": 1, "losses_steps": 2, "part_steps": 2, "sweep_steps": 2, "long": 4}
SMALL |= {"targets": 1, "points": 2, "queries": (50,)}


@pytest.fixture(scope="module")
def trial(script):
    return script("verdict_trial")


def test_a_masked_network_is_refused_and_never_honest(trial, tmp_path, monkeypatch):
    make, views, _ = trial.RECIPES["plain"]
    monkeypatch.setitem(trial.RECIPES, "plain", (make, views, 4))
    network = trial.MASKS["rounded, logits x 1e-7"](trial.trained("plain", 0.0, 0))
    budget = dataclasses.replace(BUDGETS["quick"], **SMALL)
    found = trial.tried(network, "one", 0.05, load_dataset("digits", "test", 10), budget, tmp_path)
    assert found.refused() and not found.honest(), (found.worst, found.flags())
