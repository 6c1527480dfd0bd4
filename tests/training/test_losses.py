"""NT-Xent against a loop in float64."""

import math

import pytest
import torch

from rush_bench.training.losses import nt_xent


def reference(u: torch.Tensor, v: torch.Tensor, temperature: float) -> float:
    """Recipes 1.1, word by word: 2B anchors, each against the 2B - 1 other vectors, the paired view is the target."""
    z = [x / math.sqrt(sum(t * t for t in x)) for x in [*u.double(), *v.double()]]
    count, total = len(u), 0.0
    for i in range(2 * count):
        pair = (i + count) % (2 * count)
        mass = sum(math.exp(float(z[i] @ z[j]) / temperature) for j in range(2 * count) if j != i)
        total += math.log(mass) - float(z[i] @ z[pair]) / temperature
    return total / (2 * count)


def pairs(count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_equals_the_double_loop(count, temperature):
    u, v = pairs(count, 5)
    assert float(nt_xent(u, v, temperature)) == pytest.approx(reference(u, v, temperature), abs=1e-12)


def test_gradient_of_the_loop():
    u, v = (x.requires_grad_() for x in pairs(3, 4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (u, v))


def test_two_orthogonal_pairs_in_closed_form():
    u = torch.eye(2, 4, dtype=torch.float64)
    expected = math.log(math.exp(2) + 2) - 2  # cos 1 with the pair, 0 with the two others, temperature 1/2
    assert float(nt_xent(u, 7 * u, 0.5)) == pytest.approx(expected, abs=1e-12)


def test_bfloat16_projections_are_judged_in_float32_even_under_autocast():
    u, v = (x.bfloat16() for x in pairs(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(u, v, 0.5)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(reference(u, v, 0.5), abs=1e-5)
