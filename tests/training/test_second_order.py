"""The cheap second derivatives against finite differences, and against torch's own on whole networks."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rush_bench.networks import build
from rush_bench.training.second_order import FastSecondDerivatives

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 8, "channels": 3, "size": 8}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ours(y: torch.Tensor) -> bool:
    """Whether y comes of this module (torch's own nodes have a number at the end)."""
    return type(y.grad_fn).__name__ in ("ConvolutionBackward", "BatchNormBackward")


def image_gradient(function, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The first derivative of sum(g * function(x)) in x, to be differentiated again."""
    with FastSecondDerivatives():
        y = function(x)
    assert ours(y)
    return torch.autograd.grad((y * g).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (1, 1), (1, 1), 1), ((2, 2), (1, 1), (1, 1), 1), ((2, 2), (0, 0), (1, 1), 2), ((2, 1), (0, 2), (1, 2), 1)],
)
def test_convolutions_by_finite_differences(stride, padding, dilation, groups):
    x, w = normal(2, 2 * groups, 5, 6), normal(2 * groups, 2, 3, 3, seed=1)
    shape = F.conv2d(x, w, None, stride, padding, dilation, groups).shape
    inputs = [t.requires_grad_() for t in (x, w, normal(*shape, seed=2))]

    def second(x, w, g):
        return image_gradient(lambda v: F.conv2d(v, w, None, stride, padding, dilation, groups), x, g)

    assert torch.autograd.gradcheck(second, inputs)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (5, 3), (2, 2, 4)])
@pytest.mark.parametrize("zero", [False, True])
def test_batchnorm_by_finite_differences(shape, zero):
    weight = normal(shape[1], seed=1)
    if zero:
        weight[0] = 0.0
    inputs = [t.requires_grad_() for t in (normal(*shape), weight, normal(*shape, seed=2))]

    def second(x, w, g):
        return image_gradient(lambda v: F.batch_norm(v, None, None, w, torch.zeros_like(w), True, 0.1, 0.1), x, g)

    assert torch.autograd.gradcheck(second, inputs)


def derivatives(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of a loss plus a function of its own gradient in x: in x and in every weight; then BatchNorm's statistics."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(network(x), torch.arange(len(x)))
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + F.normalize(first.flatten(1)).prod(0).sum() * 1e3 + 1e2 * first.square().sum()
    return [first.detach(), *torch.autograd.grad(total, [x, *network.parameters()]), *network.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet", "preact-resnet"])
def test_a_network_against_torch(name, training):
    extra = {"stem_width": 4} if name == "preact-resnet" else {}
    own = build({**SPEC, **extra, "name": name}, 1).double().train(training)
    other, x = copy.deepcopy(own), normal(6, 3, 8, 8).sigmoid()
    with FastSecondDerivatives():
        found = derivatives(own, x)
    expected = derivatives(other, x)
    assert len(found) == len(expected) and max(float(part.abs().max()) for part in expected[1:3]) > 1e-3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_first_order_is_bit_for_bit_the_same(bfloat16):
    own = build(SPEC, 1).train().to(memory_format=torch.channels_last)
    other, x, results = copy.deepcopy(own), normal(6, 3, 8, 8, dtype=torch.float32).sigmoid(), []
    for network, mode in ((own, FastSecondDerivatives()), (other, nullcontext())):
        v = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), mode:
            scores = network(v)
        results.append([scores, *torch.autograd.grad(scores.float().square().sum(), [v, *network.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_refuses_a_single_value():
    with FastSecondDerivatives(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


def test_what_is_not_covered_is_torch_s():
    x = torch.ones(2, 3, 5, 5, requires_grad=True)
    with FastSecondDerivatives():
        outs = [nn.Conv2d(3, 2, 3)(x), nn.Conv2d(3, 2, 3, padding="same", bias=False)(x), nn.BatchNorm2d(3, affine=False)(x)]
        outs += [nn.BatchNorm2d(3).eval()(x)]
    assert all(out.requires_grad and not ours(out) for out in outs)
