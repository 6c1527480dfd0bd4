"""The trial of the audit in small: an honest network stands where it should, a masked one never does."""

import dataclasses

import pytest

from rush_bench.audits.experiments import BUDGETS
from rush_bench.datasets import load_dataset

SMALL = {"steps": 10, "lengths": (5, 10, 20), "restarts": 2, "losses_steps": 10, "part_steps": 15, "sweep_steps": 20}
SMALL |= {"long": 20, "targets": 2, "points": 10}


@pytest.fixture(scope="module")
def trial(script):
    return script("verdict_trial")


@pytest.fixture(scope="module")
def honest(trial):
    return trial.trained("plain", 0.0, 0)


# Fewer images for the masked: only an honest one has to show what its claim needs.
@pytest.mark.parametrize(("mask", "images"), [(None, 60), ("rounded, logits x 1e-7", 30)])
def test_an_honest_network_stands_and_a_masked_one_does_not(trial, honest, tmp_path, mask, images):
    network = honest if mask is None else trial.MASKS[mask](honest)
    budget = dataclasses.replace(BUDGETS["quick"], **SMALL)
    found = trial.tried(network, "one", 0.05, load_dataset("digits", "test", images), budget, tmp_path)
    assert (found.honest(), found.refused()) == (mask is None, mask is not None), (found.worst, found.flags())
