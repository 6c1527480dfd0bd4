"""A defence that is another for the judge than for the attack, or another later, shows; honest ones do not."""

import pytest
import torch

from rush_bench.defenses import Deterministic, Randomised, Smoothed
from rush_bench.defenses.consistency import drift, modes_apart
from rush_bench.noise import Stream

SHAPE = (1, 4, 4)
STREAM = Stream(0, "test")


class Hidden(Smoothed):
    """Sharper when it is asked for a gradient, and dead after so many calls: neither shows when it is made."""

    factor, lives, calls = 1.0, 10**9, 0

    def _forward(self, stream, batch):
        forward, draws = super()._forward(stream, batch)
        self.calls += 1
        alive = 0.0 if self.calls > self.lives else 1.0

        def other(*given):
            return (alive * (self.factor if torch.is_grad_enabled() else 1.0) * forward(*given)).log_softmax(-1)

        return other, draws


@pytest.fixture
def images():
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(2))


class Drawing(torch.nn.Module):
    def __init__(self, network, shared):
        super().__init__()
        self.network, self.shared = network, shared

    def forward(self, x):
        return self.network(x + 0.1 * (torch.randn(()) if self.shared else torch.randn_like(x)))


@pytest.mark.parametrize("average", ["vote", "logits"])
@pytest.mark.parametrize("kind", ["plain", "smoothed", "rows", "calls"])
def test_honest_defences_are_one(linear, images, kind, average):
    labels = torch.arange(4)
    if kind == "plain":
        defense = Deterministic(linear, shape=SHAPE)
    elif kind == "smoothed":
        defense = Smoothed(linear, noise="uniform:0.1", votes=5, shape=SHAPE)
    else:
        network = Drawing(linear, kind == "calls").eval()
        defense = Randomised(network, votes=5, average=average, shape=SHAPE)
        assert defense.shared == (kind == "calls")
    assert modes_apart(defense, images, labels, STREAM).max() < 1e-4
    assert drift(defense, images, labels, STREAM).max() < 1e-5
    assert (defense.passes.forwards, defense.passes.backwards) == (0, 0)


def test_what_changes_shows(linear, images):
    defense, labels = Hidden(linear, noise="uniform:0.1", votes=5, shape=SHAPE), torch.arange(4)
    defense.factor = 0.01
    assert modes_apart(defense, images, labels, STREAM).max() > 0.05
    defense.factor, defense.lives = 1.0, 40
    assert drift(defense, images, labels, STREAM).max() > 0.05
