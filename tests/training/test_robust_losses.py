"""KL, soft cross-entropy and TRADES against loops in float64."""

import math

import pytest
import torch

from rush_bench.training.losses import cross_entropy_to, kl, trades


def probabilities(row) -> list[float]:
    top = max(float(v) for v in row)
    powers = [math.exp(float(v) - top) for v in row]
    return [p / sum(powers) for p in powers]


def kl_loop(p_logits, q_logits) -> list[float]:
    pairs = [(probabilities(p), probabilities(q)) for p, q in zip(p_logits, q_logits, strict=True)]
    return [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs]


def logits(seed: int, dtype=torch.float64) -> torch.Tensor:
    return 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_kl_equals_the_loop_and_is_not_symmetric():
    p, q = logits(0), logits(1)
    assert kl(p, q).tolist() == pytest.approx(kl_loop(p, q), abs=1e-12)
    assert kl(p, p).tolist() == pytest.approx([0] * 7, abs=1e-12)
    assert float((kl(p, q) - kl(q, p)).abs().max()) > 0.1


def test_kl_in_closed_form():
    certain, even = torch.tensor([[50.0, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert float(kl(certain, even)) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("soft", [False, True])
def test_trades_equals_the_loop(beta, soft):
    clean, attacked, labels = logits(0), logits(1), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    targets = torch.nn.functional.one_hot(labels, 5).double()
    if soft:
        targets = 0.7 * targets + 0.3 * targets.roll(1, 0)
    total = 0.0
    for row, goal, divergence in zip(clean, targets, kl_loop(clean, attacked), strict=True):
        total += sum(-float(t) * math.log(p) for t, p in zip(goal, probabilities(row), strict=True)) + beta * divergence
    assert float(trades(clean, attacked, targets if soft else labels, beta)) == pytest.approx(total / 7, abs=1e-12)
    if soft:
        assert float(cross_entropy_to(clean, targets).mean() + beta * kl(clean, attacked).mean()) == pytest.approx(total / 7)


def test_trades_has_gradients_through_both():
    clean, attacked = logits(0).requires_grad_(), logits(1).requires_grad_()
    labels = torch.arange(7) % 5
    assert torch.autograd.gradcheck(lambda a, b: trades(a, b, labels, 6.0), (clean, attacked))


@pytest.mark.parametrize("loss", [kl, cross_entropy_to])
def test_half_precision_logits_are_judged_in_float32(loss):
    p, q = logits(0).bfloat16(), logits(1).bfloat16()
    first = p if loss is kl else q
    second = q if loss is kl else p.double().softmax(1).float()
    expected = loss(first.double(), second.double())
    assert loss(first, second).dtype == torch.float32
    torch.testing.assert_close(loss(first, second).double(), expected, atol=1e-5, rtol=1e-5)
