"""What `Attack.passes` says before a run against what the run counts."""

import math

import pytest
import torch
from torch import nn

from rush_bench.attacks.base import Attack
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.noise import Stream, Uniform
from rush_bench.registry import attacks
from rush_bench.threats import Threat

SHAPE = (1, 6, 6)
IMAGES = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(5))
LABELS = torch.full((2,), 2)
AA = {"steps": 4, "queries": 20}
CASES = [
    ("clean", {}),
    ("pgd", {}),
    ("pgd", {"restarts": 3, "steps": 7, "select_every": 2, "loss": "margin", "draws": 5}),
    ("eot", {"steps": 12}),
    ("pgd-ablation", {"redraw": 3, "clamp": "graph", "draws": 5}),
    ("pgd-published", {}),
    ("pgd-published", {"keep": "best", "redraw": 1, "steps": 10, "draws": 24, "loss": "ce@logits"}),
    ("eot-apgd", {"steps": 12}),
    ("eot-apgd", {"steps": 12, "stop": False, "losses": ("ce", "dlr-to"), "targets": 2, "draws": 8}),
    ("eot-apgd-t", {"steps": 12, "draws": 4}),
    ("square", {"queries": 60, "redraw": 20}),
    ("transfer", {"steps": 12}),
    ("random-noise", {"points": 5}),
    ("aa", {"steps": 12, "parts": ("apgd-ce", "apgd-t", "fab-t")}),
    ("apgd", {}),
    ("aa-rand", {"steps": 24, "eot_iter": 3}),
    ("aa-published", AA),
    ("aa-published", {**AA, "fab": "targeted", "hand_back": "best", "targets": 3}),
    ("torchattacks-pgdrs", {}),
    ("torchattacks-aa", AA),
]
CROWDED = {"pgd", "pgd-published", "eot-apgd", "apgd", "aa-published", "torchattacks-pgdrs"}


@pytest.fixture(scope="module")
def network():
    """Class 2 of 5, by far: no attack of a small eps breaks it, so none ends early."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).eval()
    with torch.no_grad():
        network[1].weight.copy_(0.05 * torch.randn(5, 36, generator=torch.Generator().manual_seed(6)))
        network[1].bias.copy_(5 * nn.functional.one_hot(torch.tensor(2), 5))
    return network


def _defense(network, kind):
    if kind == "deterministic":
        return Deterministic(network, shape=SHAPE)
    defense = Smoothed(network, noise=Uniform(0.1), votes=1 if kind == "one" else 8, shape=SHAPE)
    if kind == "crowded":  # the draws of an image do not fit in memory at once
        defense.body.rows = 6
    return defense.bank(7, 0) if kind == "bank" else defense


def test_the_table_has_every_attack():
    own = {"pgd-purifier"}  # takes purifiers alone: tests/defenses/test_purify.py
    assert {name for name, _ in CASES} == set(attacks.entries) - own


@pytest.mark.parametrize("kind", ["deterministic", "one", "many", "bank", "crowded"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_the_estimate_is_not_below_and_not_far_above(network, name, settings, kind):
    if name.startswith("torchattacks-"):
        pytest.importorskip("torchattacks")
    if kind == "crowded" and name not in CROWDED:
        pytest.skip("slow there, and of parts that others cover")
    defense, attack = _defense(network, kind), attacks.load(name)(**settings)
    said = attack.passes(defense)
    before = defense.passes.forwards, defense.passes.backwards
    attack.recorded(defense, IMAGES, LABELS, Threat("linf", 1e-3), Stream(0, "attack"))
    counted = (defense.passes.forwards - before[0]) / 2, (defense.passes.backwards - before[1]) / 2
    for guess, count in zip(said, counted, strict=True):
        assert 0.9 * count <= guess <= 1.5 * count
    assert (counted[0] > 0) == (name != "clean")


def test_an_attack_of_ones_own_need_not_say(network):
    assert all(math.isnan(rows) for rows in Attack().passes(Deterministic(network, shape=SHAPE)))
