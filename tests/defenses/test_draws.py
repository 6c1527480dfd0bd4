"""What a network does seldom, or only on pixels of 0 and 1 or beyond them: draw, look at its batch; and what honest ones do."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rush_bench.defenses import Deterministic, Randomised, Smoothed
from rush_bench.errors import BadInput
from rush_bench.noise import Stream

pytestmark = pytest.mark.strangers

SHAPE = (1, 8, 8)
STREAM = Stream(0, "test")


class Net(nn.Module):
    """A linear network, and what is done with it and the images."""

    def __init__(self, does=lambda net, x: net(x)):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.does = nn.Linear(64, 4), does
        with torch.no_grad():
            self.fc.weight *= 6

    def forward(self, x):
        return self.does(lambda images: self.fc(images.flatten(1)), x)


def levels(net, x):
    """The usual question, 0 to 255 or 0 to 1."""
    return net(x / 255 if x.max() > 1.5 else x)


def flipped_if(happens):
    return lambda net, x: net(x) * (-1 if happens(x) else 1)


def made(kind, does, **options):
    return kind(Net(does).eval(), shape=SHAPE, **options)


@pytest.mark.parametrize(
    "does",
    [
        levels,
        lambda net, x: net(x / 255) if x.max() > 1 else net(x),
        lambda net, x: net(x.clamp(0, 1) if x.min() < -0.3 else x),
        flipped_if(lambda x: (x > 1.4).sum() > 3),
    ],
)
@pytest.mark.parametrize("noise", ["gaussian:0.2", "gaussian:0.5", "laplace:0.2"])
def test_a_batch_that_matters_beyond_the_range_of_pixels_is_seen(does, noise):
    with pytest.raises(BadInput, match="other images of its batch"):
        made(Smoothed, does, noise=noise, votes=1)
    made(Smoothed, lambda net, x: net(x.clamp(0, 1)), noise=noise, votes=1)


@pytest.mark.parametrize("happens", [lambda x: x.max() == 1, lambda x: x.min() == 0, lambda x: x.max() > 0.97])
def test_a_batch_that_matters_at_the_ends_of_the_range_is_seen(happens):
    with pytest.raises(BadInput, match="other images of its batch"):
        made(Deterministic, flipped_if(happens))


def test_levels_are_no_matter_without_noise():
    made(Deterministic, levels)
    made(Smoothed, levels, noise="uniform:0.3")


def bright_noise(net, x):
    return net(x + 0.5 * (x.amax((1, 2, 3), keepdim=True) > 0.97) * torch.randn_like(x))


def test_noise_on_bright_images_alone_is_seen():
    with pytest.raises(BadInput, match="draws at random"):
        made(Deterministic, bright_noise)
    made(Randomised, bright_noise)
    with pytest.raises(BadInput, match="draws at random"):
        made(
            Smoothed,
            lambda net, x: net(x + (x.amax((1, 2, 3), keepdim=True) > 1.2) * torch.randn_like(x)),
            noise="gaussian:0.2",
        )


SELDOM = {
    "one in ten": flipped_if(lambda x: torch.rand(()) < 0.1),
    "one in fifty": flipped_if(lambda x: torch.rand(()) < 0.02),
    "one in a thousand": flipped_if(lambda x: torch.rand(()) > 0.999),
    "normal": flipped_if(lambda x: torch.randn(()) > 3),
    "whole numbers": flipped_if(lambda x: torch.randint(0, 1000, ()) == 999),
    "bernoulli": flipped_if(lambda x: torch.bernoulli(torch.tensor(0.002)) == 1),
    "in place": flipped_if(lambda x: torch.empty(()).uniform_(2, 3) < 2.001),
    "dropout": lambda net, x: net(F.dropout(x, 1e-4, training=True)),
    "rows": lambda net, x: net(x) * (1 - 2 * (torch.rand(len(x), 1) < 0.002).float()),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SELDOM)
def test_a_network_that_draws_seldom_is_told_so_whatever_the_seed(kind, seed):
    torch.manual_seed(seed)
    with pytest.raises(BadInput, match=r"draws at random.*Randomised"):
        made(Deterministic, SELDOM[kind])
    if seed == 0:
        made(Randomised, SELDOM[kind])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "does",
    [
        flipped_if(lambda x: random.random() < 0.1),
        flipped_if(lambda x: np.random.rand() < 0.1),
    ],
)
def test_other_generators_are_watched_too(does, seed):
    random.seed(seed)
    np.random.seed(seed)
    with pytest.raises(BadInput, match="draws at random"):
        made(Deterministic, does)
    with pytest.raises(BadInput, match="elsewhere than torch's global generator"):
        made(Randomised, does)


class Own(Net):
    """Draws seldom from generators that it keeps."""

    def __init__(self, which):
        super().__init__()
        self.which, self.generator, self.of_numpy = which, torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, x):
        u = torch.rand((), generator=self.generator) if self.which == "torch" else self.of_numpy.random()
        return super().forward(x) * (-1 if u < 0.1 else 1)


@pytest.mark.parametrize("which", ["torch", "numpy"])
def test_a_generator_of_its_own_is_watched_too(which):
    with pytest.raises(BadInput, match="draws at random"):
        Deterministic(Own(which).eval(), shape=SHAPE)
    with pytest.raises(BadInput, match="elsewhere than torch's global generator"):
        Randomised(Own(which).eval(), shape=SHAPE)


class Attention(Net):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        rows = x[:, 0]
        return super().forward(x + self.attention(rows, rows, rows)[0][:, None])


def seeds_itself(net, x):
    torch.manual_seed(3)
    return net(x * (torch.rand(x.shape[1:]) + 0.5))


def forks(net, x):
    with torch.random.fork_rng():
        return seeds_itself(net, x)


def own_mask(net, x):
    return net(x * (torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(3)) + 0.5))


@pytest.mark.parametrize(
    "network",
    [
        lambda: Net(lambda net, x: net(F.dropout(x, 0.5, training=False))),
        lambda: nn.Sequential(nn.Dropout(0.5), Net(), nn.Dropout(0.1)),
        lambda: Net(lambda net, x: net(x) + 0 * torch.rand(())),
        lambda: Net(lambda net, x: (torch.rand(3), torch.randint(9, (2,)), net(x))[2]),
        lambda: Net(lambda net, x: net(x) if random.random() < 2 else None),
        lambda: Net(seeds_itself),
        lambda: Net(forks),
        lambda: Net(own_mask),
        lambda: Net(lambda net, x: net(F.scaled_dot_product_attention(x, x, x, dropout_p=0.0))),
        Attention,
        lambda: Net(lambda net, x: net(x.clamp_min(1e-8).log())),
        lambda: Net(lambda net, x: net(x.log())),
    ],
)
def test_what_draws_nothing_that_matters_is_a_function(network):
    defense = Deterministic(network().eval(), shape=SHAPE)
    images = 0.1 + 0.8 * torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(defense.predict(images, STREAM).probabilities, defense.predict(images, STREAM).probabilities)


class RunningMean(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, x):
        self.mean += 0.1 * (x.detach().mean() - self.mean)
        return super().forward(x - self.mean)


def test_memory_is_not_called_chance():
    for kind in (Deterministic, Randomised):
        with pytest.raises(BadInput, match=r"from call to call.*remembers of earlier calls"):
            kind(RunningMean().eval(), shape=SHAPE)


def fails_beyond(net, x):
    if x.min() < 0:
        raise ValueError("pixels below 0")
    return net(x)


def test_a_network_that_fails_beyond_the_range_is_told_why():
    made(Deterministic, fails_beyond)
    with pytest.raises(BadInput, match=r"fails on pixels outside \[0,1\].*not clipped"):
        made(Smoothed, fails_beyond, noise="gaussian:0.2")
