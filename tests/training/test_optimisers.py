"""Learning rates in closed form; LARS against a loop; neither stops the device."""

import itertools
import math

import pytest
import torch

from rush_bench.training.optimisers import LARS, learning_rate, make_optimiser
from rush_bench.training.options import Optimisation


def test_cosine_from_lr_to_lr_min():
    settings = Optimisation(epochs=10, lr=0.5, lr_min=0.001)
    rates = [learning_rate(settings, step, 4) for step in range(41)]
    assert rates[0] == 0.5 and rates[40] == pytest.approx(0.001)
    assert rates[20] == pytest.approx((0.5 + 0.001) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_warm_up_is_linear_and_ends_at_lr():
    settings = Optimisation(epochs=10, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(settings, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0 and rates[49] == pytest.approx((1 + math.cos(math.pi * 39 / 40)) / 2)


def test_sgd_is_torchs_with_every_key():
    settings = Optimisation(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(2))
    one = make_optimiser(settings, [ours])
    other = torch.optim.SGD([theirs], lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    for _ in range(3):
        for weight, optimiser in ((ours, one), (theirs, other)):
            optimiser.zero_grad()
            weight.square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exclude_1d", [True, False])
def test_lars_equals_a_loop(exclude_1d):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (4,), (2, 2))]
    start[2].zero_()  # a zero tensor moves by the plain gradient
    weights = [torch.nn.Parameter(x.clone()) for x in start]
    optimiser = LARS(weights, lr=2.0, momentum=0.9, weight_decay=0.1, trust=0.01, exclude_1d=exclude_1d)
    expected, buffers = [x.clone() for x in start], [torch.zeros_like(x) for x in start]
    for _ in range(4):
        for k, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            gradient, w = weight.grad, expected[k]
            if w.ndim > 1 or not exclude_1d:
                size, norm = float(gradient.square().sum().sqrt()), float(w.square().sum().sqrt())
                ratio = 0.01 * norm / (size + 0.1 * norm) if norm > 0 and size > 0 else 1.0
                gradient = (gradient + 0.1 * w) * ratio
            buffers[k] = 0.9 * buffers[k] + gradient
            expected[k] = w - 2.0 * buffers[k]
        optimiser.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value)


def test_settings_choose_lars():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = make_optimiser(Optimisation(optimiser="lars", lr=5.0, lars_exclude_1d=False), [weight])
    assert isinstance(optimiser, LARS) and not optimiser.exclude_1d
