"""Learning rates that fall in steps, and warm-ups that do not start from 0."""

import pytest

from rush_bench.training.optimisers import learning_rate
from rush_bench.training.options import Optimisation


def test_steps_fall_at_their_milestones_and_only_there():
    settings = Optimisation(epochs=8, lr=1.0, schedule="steps", milestones=(2, 4.5), decay=0.1)
    rates = [learning_rate(settings, step, 10) for step in range(80)]
    assert rates == pytest.approx([1.0] * 20 + [0.1] * 25 + [0.01] * 35)


def test_no_milestones_is_a_constant_rate():
    settings = Optimisation(epochs=2, lr=0.3, schedule="steps")
    assert {learning_rate(settings, step, 5) for step in range(10)} == {0.3}


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_warm_up_from_a_rate_over_part_of_an_epoch(schedule):
    settings = Optimisation(epochs=4, lr=0.1, schedule=schedule, warmup_epochs=0.5, warmup_from=0.01)
    rates = [learning_rate(settings, step, 20) for step in range(80)]
    assert rates[:10] == pytest.approx([0.01 + 0.009 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert (rates[79] < 1e-3) == (schedule == "cosine")
