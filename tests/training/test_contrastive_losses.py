"""The multi-view losses of AdvCL and RoCL, and the cosine of BYOL and DeACL, against loops in float64."""

import math

import pytest
import torch

from rush_bench.training.losses import cosine, multi_view, nt_xent


def views(count: int, batch: int = 4, dim: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [3 * torch.randn(batch, dim, generator=generator, dtype=torch.float64) for _ in range(count)]


def unit(x) -> list[float]:
    length = math.sqrt(sum(float(t) ** 2 for t in x))
    return [float(t) / length for t in x]


def dot(u, v) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def log_p(z, i: int, j: int, temperature: float) -> float:
    """The log-probability that anchor i picks j among all others."""
    mass = sum(math.exp(dot(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
    return dot(z[i], z[j]) / temperature - math.log(mass)


def supcon(parts, temperature: float) -> float:
    """Khosla et al. eq. 2 with images as classes: the mean log-probability of positives, mean over anchors."""
    z, batch = [unit(x) for part in parts for x in part], len(parts[0])
    total = 0.0
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and j % batch == i % batch]
        total -= sum(log_p(z, i, j, temperature) for j in positives) / len(positives)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_equals_the_loop(count, temperature):
    parts = views(count)
    assert float(multi_view(parts, temperature)) == pytest.approx(supcon(parts, temperature), abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: multi_view(x, temperature), [part.requires_grad_() for part in parts])


def test_two_views_are_nt_xent():
    parts = views(2, 7)
    torch.testing.assert_close(multi_view(parts, 0.5), nt_xent(*parts, 0.5))


def test_rocl_is_six_ordered_pairs():
    """S2.5: six ordered positive pairs, each -log softmax over the 3N - 1 others, summed, over 3N."""
    parts, temperature = views(3), 0.5
    z, n, total = [unit(x) for part in parts for x in part], len(parts[0]), 0.0
    for first in range(3):
        for second in range(3):
            if first != second:
                total -= sum(log_p(z, first * n + i, second * n + i, temperature) for i in range(n))
    assert 2 * float(multi_view(parts, temperature, True)) == pytest.approx(total / (3 * n), abs=1e-12)


def test_detached_keys_pass_no_gradient():
    """The gradient is that of the loss with the second factor of each cosine held fixed, by finite differences."""
    parts, temperature, step = views(2, 2, 3), 0.5, 1e-6
    leaves = [part.clone().requires_grad_() for part in parts]
    got = torch.autograd.grad(multi_view(leaves, temperature, True), leaves)
    keys = [unit(x) for part in parts for x in part]

    def with_fixed_keys(moved) -> float:
        z, total = [unit(x) for part in moved for x in part], 0.0
        for i in range(4):
            mass = sum(math.exp(dot(z[i], keys[k]) / temperature) for k in range(4) if k != i)
            total += math.log(mass) - dot(z[i], keys[(i + 2) % 4]) / temperature
        return total / 4

    for part in range(2):
        for place in range(parts[part].numel()):
            up, down = ([x.clone() for x in parts] for _ in range(2))
            up[part].view(-1)[place] += step
            down[part].view(-1)[place] -= step
            slope = (with_fixed_keys(up) - with_fixed_keys(down)) / (2 * step)
            assert float(got[part].view(-1)[place]) == pytest.approx(slope, abs=1e-7)
    full = torch.autograd.grad(multi_view(leaves, temperature), leaves)
    assert not torch.allclose(full[0], got[0], atol=1e-3)


def test_cosine():
    u, v = views(2)
    expected = sum(dot(unit(a), unit(b)) for a, b in zip(u, v, strict=True)) / len(u)
    assert float(cosine(u, v)) == pytest.approx(expected, abs=1e-12)
    assert cosine(u.bfloat16(), v.bfloat16()).dtype == torch.float32
