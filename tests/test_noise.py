import math

import pytest
import torch
from scipy import stats

from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Laplace, Stream, Uniform, noise_from

SHAPE = (3, 8, 8)


def test_draws_depend_on_image_and_draw_alone():
    stream = Stream(3, "test")
    whole = stream.uniform(6, 10, SHAPE)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(stream.at(order).uniform(3, 10, SHAPE), whole[order])
    assert torch.equal(stream.skip(4).uniform(6, 3, SHAPE), whole[:, 4:7])
    assert torch.equal(stream.at(torch.tensor([2])).uniform(4, 2, SHAPE), whole[2:3, :2].expand(4, 2, *SHAPE))


@pytest.mark.parametrize(
    "other", [Stream(4, "test"), Stream(3, "tesu"), Stream(3, "test").named("x"), Stream(3, "test").skip(1)]
)
def test_streams_are_independent(other):
    a, b = (s.uniform(20, 5, SHAPE).flatten() - 0.5 for s in (Stream(3, "test"), other))
    assert abs((a * b).mean() * 12) < 4.5 / math.sqrt(len(a))


def test_uniform_numbers_pass_kolmogorov_smirnov_and_are_uncorrelated():
    u = Stream(0, "law").uniform(50, 40, SHAPE)
    assert stats.kstest(u[::7].flatten().numpy()[::5], "uniform").pvalue > 1e-3
    centred = (u - 0.5) * math.sqrt(12)
    limit = 4.5 / math.sqrt(centred.numel())
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])):
        assert abs((a * b).mean()) < limit
    # every one of the 23 bits is fair
    bits = (u.flatten() * 2**23).long()
    for bit in range(23):
        assert abs((bits >> bit & 1).double().mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(bits))


def test_no_two_image_draw_pairs_share_their_noise():
    u = Stream(0, "pairs").uniform(300, 200, (2,)).reshape(-1, 2)
    assert len(torch.unique(u, dim=0)) == len(u)


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        (Uniform(0.3), stats.uniform(-0.3, 0.6).cdf),
        (Gaussian(0.25), stats.norm(0, 0.25).cdf),
        (Laplace(0.2), stats.laplace(0, 0.2).cdf),
    ],
)
def test_laws(law, cdf):
    hashed = Stream(1, "laws").noise(law, 20, 10, SHAPE, "cpu")
    generated = law.sample((200, *SHAPE), torch.Generator().manual_seed(0))
    for noise in (hashed, generated):
        assert noise.isfinite().all()
        assert stats.kstest(noise.flatten().numpy()[::3], cdf).pvalue > 1e-3


def test_generator_is_left_alone():
    before = torch.get_rng_state()
    Stream(0, "x").noise(Gaussian(1.0), 2, 2, SHAPE, "cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("text", "law"),
    [("uniform:0.3", Uniform(0.3)), ("gaussian:1/4", Gaussian(0.25)), ("laplace:0.2", Laplace(0.2)), ("none", None)],
)
def test_noise_from_text(text, law):
    assert noise_from(text) == law
    assert noise_from(law.to_dict() if law else None) == law


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("uniform", "no scale"),
        ("unifrom:1", "did you mean 'uniform'"),
        ("uniform:-1", ">= 0"),
        ("gaussian:x", "number"),
    ],
)
def test_wrong_noise(text, says):
    with pytest.raises(BadInput, match=says):
        noise_from(text)
