"""The benchmark of training cost: its table of passes against FLOPs counted in real steps, for every recipe."""

import pytest
import torch

from rush_bench import registry

OWN = {name for name, entry in registry.recipes.entries.items() if entry.entry_point is None}
BUILT_IN = sorted(OWN - {"finetune"})  # whose stages are those of the recipes that pre-train
NETWORK = {"name": "resnet", "blocks": [1, 1], "width": 16}
HEADS = ("pretrain", "simclr", "distil")  # stages with a projector, which is no part of the count
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def cost(script):
    return script("training_cost")


@pytest.fixture(scope="module")
def made(cost):
    """Every job, with few steps of attacks, small heads and rows for as many clusters as there are."""
    smaller = dict(cost.SMALLER)
    for stage in HEADS:
        smaller |= {f"{stage}.projector_hidden": 4, f"{stage}.projector_out": 4, f"{stage}.projector_layers": 2}
    smaller |= {f"{group}attack.steps": steps for group, steps in (("", 3), ("trades.", 2), ("finetune_", 1))}
    smaller |= {"train.replays": 3, "diffusion.width": 8}
    return {job.name: job for job in cost.jobs(BUILT_IN, NETWORK, 12, smaller, SHAPE)}


def test_every_stage_of_every_recipe_says_its_passes(made):
    assert {name.split()[0] for name in made} == set(BUILT_IN)
    assert [name for name, job in made.items() if not job.plan.passes > 0] == []


def row(cost, job) -> float:
    """FLOPs of one image through the encoder."""
    encoder = job.stage.network.encoder
    one = encoder.members[0] if hasattr(encoder, "members") else encoder
    with torch.no_grad(), cost.Flops() as counter:
        one(torch.zeros(2, *SHAPE))
    return counter.total / 2


@pytest.mark.parametrize("recipe", BUILT_IN)
def test_passes_are_what_a_step_takes(cost, made, recipe):
    jobs = [job for name, job in made.items() if name.split()[0] == recipe]
    assert jobs
    for job in jobs:
        images = len(job.stage.splits["train"])
        counted = job.flops() / row(cost, job) / images
        assert counted == pytest.approx(job.passes(), rel=0.06)


def test_flops_counts_products(cost):
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with cost.Flops() as counter:
        a @ b
        torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(6, 3, 3, 3), padding=1)
    assert counter.total == 2 * 3 * 4 * 5 + 2 * (2 * 6 * 8 * 8) * (3 * 9)
