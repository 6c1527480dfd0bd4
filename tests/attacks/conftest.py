"""A trained network that several files attack."""

import pytest
import torch
from torch import Tensor, nn

from rush_bench.datasets import load_dataset
from rush_bench.networks import build
from rush_bench.noise import Uniform


@pytest.fixture(scope="session")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on noisy digits (8x8) for a second or two, 100 test digits and their labels."""
    train, test = load_dataset("digits", "train", size=8), load_dataset("digits", "test", n=100, size=8)
    network = build({"name": "resnet", "blocks": [1], "width": 8, "classes": 10, "channels": 1, "size": 8}, seed=1)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    generator, images = torch.Generator().manual_seed(2), train.floats()
    for _ in range(8):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            noisy = images[rows] + Uniform(0.3).sample(images[rows].shape, generator)
            loss = nn.functional.cross_entropy(network(noisy), train.labels[rows])
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    return network.eval(), test.floats(), test.labels
