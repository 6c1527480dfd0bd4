"""The trial of the audit in small: what it says of a masked network. That honest ones stand is in tests of the audit."""

import dataclasses

import pytest

from rush_bench.audits.experiments import BUDGETS
from rush_bench.datasets import load_dataset

SMALL = {"steps": 10, "lengths": (5, 10, 20), "restarts": 2, "losses_steps": 10, "part_steps": 15, "sweep_steps": 20}
SMALL |= {"long": 20, "targets": 2, "points": 10, "queries": (200,)}


@pytest.fixture(scope="module")
def trial(script):
    return script("verdict_trial")


def test_a_masked_network_is_refused_and_never_honest(trial, tmp_path):
    network = trial.MASKS["rounded, logits x 1e-7"](trial.trained("plain", 0.0, 0))
    budget = dataclasses.replace(BUDGETS["quick"], **SMALL)
    found = trial.tried(network, "one", 0.05, load_dataset("digits", "test", 16), budget, tmp_path)
    assert found.refused() and not found.honest(), (found.worst, found.flags())
