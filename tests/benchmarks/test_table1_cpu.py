"""The equal-cost rule of benchmarks/table1_cpu.py: every system near the budget, its schedule where its paper has it."""

import pytest


@pytest.fixture(scope="module")
def table1(script):
    return script("table1_cpu")


def test_rush_sets_the_budget(table1):
    job = table1.plan("rush")
    assert job.passes == table1.BUDGET == 16 * 2 * 3 + 3 * 2
    assert job.sets == {"network.width": 16, "pretrain.epochs": 16, "finetune.epochs": 3}


def test_every_system_is_near_the_budget(table1):
    free = {"random_probe"}  # its encoder is not trained
    for system in set(table1.ORDER) - free:
        assert table1.plan(system).passes == pytest.approx(table1.BUDGET, rel=0.2), system


@pytest.mark.parametrize("fraction", [0.25, 1.0, 4.0])
def test_decays_keep_their_place(table1, fraction):
    sets = table1.plan("noise_sup", fraction=fraction).sets
    assert [m / sets["train.epochs"] for m in sets["train.milestones"]] == pytest.approx([0.5, 0.75], abs=0.01)


def test_names_tell_seeds_and_budgets_apart(table1):
    names = [job.name for job in table1.jobs(list(table1.ORDER))]
    assert len(set(names)) == len(names) == len(table1.ORDER) + 8
