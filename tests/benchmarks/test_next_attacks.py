"""The study of next attacks: `present` is our attack, and no variant is granted more than it."""

import dataclasses

import pytest
import torch

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.datasets import load_dataset
from rush_bench.defenses import Smoothed
from rush_bench.noise import Stream
from rush_bench.threats import Threat

STEPS, DRAWS, THREAT = 8, 8, Threat("linf", 0.1)


@pytest.fixture(scope="module")
def study(script):
    script("strength")  # where its networks come from
    return script("next_attacks")


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", "test", 6, size=8)


def smoothed(sure: bool) -> Smoothed:
    """A linear classifier of 8x8 digits; where it is `sure`, of the class 0, whatever the image."""
    linear = torch.nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) / 4)
        linear.bias.zero_()[0] = 40.0 if sure else 0.0
    return Smoothed(torch.nn.Sequential(torch.nn.Flatten(), linear).eval(), noise="uniform:0.3", votes=1, shape=(1, 8, 8))


def test_present_is_eot_apgd(study, data):
    stream, defense = Stream(3, "attack", data.index), smoothed(sure=False)
    ours = EOTAPGD(steps=STEPS, draws=DRAWS, back=True).run(defense, data.floats(), data.labels, THREAT, stream)
    found = study.VARIANTS[study.PRESENT].run(defense, data, THREAT, stream, STEPS, DRAWS)
    assert torch.equal(found, ours)


def test_every_variant_may_spend_what_the_present_attack_may(study, data, monkeypatch):
    """Where no image ever breaks, on the base neither, all that is granted is spent."""
    monkeypatch.setattr(study, "JUDGED", 32)  # fewer, as the steps are: what looks cost stays a small part
    defense, spent = smoothed(sure=True), {}
    data = dataclasses.replace(data, labels=torch.zeros_like(data.labels))
    for name, variant in study.VARIANTS.items():
        before = defense.passes.backwards
        variant.run(defense, data, THREAT, Stream(0, "attack", data.index), STEPS, DRAWS)
        spent[name] = (defense.passes.backwards - before) / len(data)
    granted = 2 * STEPS * DRAWS
    begun = {name: sum(DRAWS * phase.draws for phase in variant.phases) for name, variant in study.VARIANTS.items()}
    too_much = {name: rows for name, rows in spent.items() if rows > granted + begun[name] + 2 * (STEPS + 1)}
    too_little = {name: rows for name, rows in spent.items() if rows < 0.8 * granted}
    assert not too_much and not too_little


def test_what_is_kept_is_not_computed_again(study, data, tmp_path):
    variant, defense = study.VARIANTS[study.PRESENT], smoothed(sure=False)
    first = study.kept_in(tmp_path, "a, b", lambda: study.measure(variant, lambda: (defense, data), THREAT, 0, 2, DRAWS))
    again = study.kept_in(tmp_path, "a, b", lambda: pytest.fail("computed twice"))
    assert (again.correct == first.correct).all() and (again.repeats == first.repeats).all()
    assert (again.fe, again.seconds) == (first.fe, first.seconds)
