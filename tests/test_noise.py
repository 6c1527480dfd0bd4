import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

import rush_bench.noise
from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Laplace, Stream, Uniform, check_seed, is_noise, noise_from

SHAPE = (3, 8, 8)


def test_draws_depend_on_image_and_draw_alone():
    stream = Stream(3, "test")
    whole = stream.uniform(6, 10, SHAPE)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(stream.at(order).uniform(3, 10, SHAPE), whole[order])
    assert torch.equal(stream.skip(4).uniform(6, 3, SHAPE), whole[:, 4:7])
    assert torch.equal(stream.at(torch.tensor([2])).uniform(4, 2, SHAPE), whole[2:3, :2].expand(4, 2, *SHAPE))


@pytest.mark.parametrize("images", [None, torch.tensor([2**31 + 5]), torch.tensor([7, 0, 2**33, -1])])
@pytest.mark.parametrize("shape", [(1, 1, 1), SHAPE, (3, 160, 160)])
def test_every_device_makes_the_same_numbers(images, shape, monkeypatch):
    stream = Stream(3, "test", images, 2**31 - 1)
    by_numpy = stream.uniform(4, 3, shape)
    monkeypatch.setattr(rush_bench.noise, "_hashed", rush_bench.noise._hashed_by_torch)
    assert torch.equal(stream.uniform(4, 3, shape), by_numpy)


def test_the_numbers_of_a_stream_are_those_of_committed_records():
    """The formula in whole numbers: two keys of the image and the draw; the pixel, hashed with one and then with the other."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ x >> shift) * factor % 2**32
        return x

    digest = hashlib.sha256(b"3\0test").digest()
    salts = [int.from_bytes(digest[4 * k : 4 * k + 4], "little") for k in range(4)]
    golden = 0x9E3779B9
    image, draw, pixel = 11, 5, 100
    a, b = (mix((mix(image ^ salts[2 * k]) + mix((draw * golden + salts[2 * k + 1]) % 2**32)) % 2**32) for k in (0, 1))
    expected = ((mix((mix(pixel * golden % 2**32 ^ a) + b) % 2**32) >> 9) + 0.5) * 2.0**-23
    found = Stream(3, "test", torch.tensor([11]), 5).uniform(1, 1, SHAPE)
    assert float(found.flatten()[pixel]) == expected


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
        ("gaussian:64", "64/255 = 0.251"),
        ("uniform:76", "divide one of grey levels by 255"),
        ("laplace:5.5", "beyond 5"),
        ({"law": "gaussian"}, "no scale; write gaussian:0.25"),
        ({"scale": 0.25}, "no law"),
        ({"law": "gaussian", "scale": None}, r"Gaussian\(0.25\)"),
    ],
)
def test_wrong_noise(text, says):
    with pytest.raises(BadInput, match=says):
        noise_from(text)


@pytest.mark.parametrize("scale", ["0.25", True, None, [0.25], float("nan"), -1])
@pytest.mark.parametrize("law", [Uniform, Gaussian, Laplace])
def test_a_scale_is_a_number(law, scale):
    with pytest.raises(BadInput, match="must be a finite number >= 0"):
        law(scale)


def test_numbers_of_numpy_are_numbers():
    law = Gaussian(np.float64(0.25))
    assert law == Gaussian(0.25) and type(law.scale) is float
    assert [is_noise(each) for each in (None, "none", "uniform:0", Uniform(0.0), law, "laplace:5")] == [False] * 4 + [True] * 2
    seed = check_seed(np.int64(3))
    assert seed == 3 and type(seed) is int
    for wrong in (True, np.bool_(True), 1.0, np.float64(3), "3", -1, 2**63, None):
        with pytest.raises(BadInput, match="whole number"):
            check_seed(wrong)
