"""Bounds and radii against scipy's binomial test, 60-digit arithmetic and closed forms."""

from decimal import Decimal, getcontext

import numpy as np
import pytest
from scipy import stats

from rush_bench.certify.bounds import best_bound, certificate, lower_bound, needed_count, upper_bound
from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Laplace, Noise, Uniform

D = 3072


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("count", "n"), [(0, 100), (1, 100), (57, 100), (99, 100), (100, 100), (50_321, 100_000)])
def test_bounds_are_those_of_the_exact_binomial_test(count: int, n: int, alpha: float) -> None:
    exact = stats.binomtest(count, n).proportion_ci(1 - 2 * alpha, method="exact")
    assert lower_bound(count, n, alpha) == pytest.approx(exact.low, rel=1e-9, abs=1e-12)
    assert upper_bound(count, n, alpha) == pytest.approx(exact.high, rel=1e-9, abs=1e-12)


def test_bounds_take_arrays() -> None:
    bounds = lower_bound([[0], [3]], [10, 20], 0.01)
    assert bounds.shape == (2, 2)
    assert bounds[1, 1] == lower_bound(3, 20, 0.01)


@pytest.mark.parametrize("n", [10, 257, 10_000])
@pytest.mark.parametrize("p", [0.5, 0.84, 0.999, 0.9999999])
def test_needed_count_is_the_first_whose_bound_suffices(p: float, n: int) -> None:
    bounds = lower_bound(np.arange(n + 1), n, 0.001)
    assert needed_count(p, n, 0.001) == np.searchsorted(bounds, p)


def test_the_largest_gaussian_radius_is_the_published_one() -> None:
    assert certificate(Gaussian(1.0), None, D).largest(100_000, 0.001) == pytest.approx(3.8115, abs=5e-5)
    assert certificate(Gaussian(0.25), "l2", D).largest(100_000, 0.001) == pytest.approx(0.25 * 3.8115, abs=2e-5)


def test_best_bound_is_the_bound_where_all_agree() -> None:
    assert best_bound(1000, 0.01) == pytest.approx(float(lower_bound(1000, 1000, 0.01)), rel=1e-12)


@pytest.mark.parametrize("p", [0.5 + 1e-12, 0.51, 0.75, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("dimension", [1, 64, D, 150_528])
def test_uniform_linf_keeps_its_digits_in_many_dimensions(p: float, dimension: int) -> None:
    getcontext().prec = 60
    root = (Decimal(3) / 2 - Decimal(p)) ** (Decimal(1) / dimension)
    exact = float(2 * Decimal("0.3") * (1 - root))
    theorem = certificate(Uniform(0.3), "linf", dimension)
    assert theorem.radius(p) == pytest.approx(exact, rel=1e-12)
    assert theorem.probability(exact) == pytest.approx(p, rel=1e-14)


def test_uniform_l1_reaches_lambda_and_the_worst_linf_radius_of_the_protocol() -> None:
    theorem = certificate(Uniform(0.3), None, D)
    assert theorem.radius([0.5, 0.75, 1.0]) == pytest.approx([0, 0.15, 0.3])
    assert theorem.radius(1.0) / D == pytest.approx(0.025 / 255, rel=0.01)  # sources S6.4: .025/255 for RUSH


@pytest.mark.parametrize(
    ("law", "norm"),
    [(Gaussian(0.25), "l2"), (Uniform(0.3), "l1"), (Uniform(0.3), "linf"), (Laplace(0.2), "l1")],
    ids=lambda v: str(v),
)
def test_at_the_radius_one_half_is_left(law: Noise, norm: str) -> None:
    theorem = certificate(law, norm, 48)
    p = np.array([0.5, 0.6, 0.9, 0.999])
    radius = theorem.radius(p)
    assert theorem.probability(radius) == pytest.approx(p)
    assert theorem.moved(p, radius) == pytest.approx(np.full(4, 0.5))
    assert theorem.moved(p, 0.0) == pytest.approx(p)
    assert np.all(theorem.moved(p, 2 * radius[1:].max()) <= 0.5)
    assert theorem.moved(0.6, 1e9) == 0
    assert theorem.radius(0.4) < 0


@pytest.mark.parametrize(
    ("law", "norm", "own"),
    [
        (Gaussian(0.25), "l2", stats.norm(0, 0.25)),
        (Laplace(0.2), "l1", stats.laplace(0, 0.2)),
        (Uniform(0.3), "l1", stats.uniform(-0.3, 0.6)),
    ],
    ids=lambda v: str(v)[:12],
)
def test_a_half_space_across_one_pixel_is_certified_up_to_its_border(law: Noise, norm: str, own) -> None:
    """1[x_1 < t] has the class with probability F(t) and loses it at distance t: the certificate is tight there, and at
    every distance before and beyond what is left is F(t - distance)."""
    theorem, t = certificate(law, norm, D), np.array([0.01, 0.1, 0.2, 0.28])
    assert theorem.radius(own.cdf(t)) == pytest.approx(t, rel=1e-9)
    assert theorem.probability(t) == pytest.approx(own.cdf(t), rel=1e-12)
    for distance in (0.0, 0.05, 0.2, 0.4):
        assert theorem.moved(own.cdf(t), distance) == pytest.approx(own.cdf(t - distance), rel=1e-9, abs=1e-15)


def test_laplace_certifies_what_no_other_set_loses_sooner() -> None:
    """By brute force on a grid of two pixels: of sets ordered by the likelihood ratio of a shift (Neyman and Pearson), whatever
    its direction in l1, none keeps less than `moved` says, and the shift along one pixel keeps just that."""
    law = Laplace(1.0)
    grid = np.linspace(-14, 14, 1401)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    density = np.exp(-np.abs(x) - np.abs(y))
    density /= density.sum()
    for distance in (0.5, 1.5):
        for share in (1.0, 0.75, 0.5):
            one, two = share * distance, (1 - share) * distance
            shifted = np.exp(-np.abs(x - one) - np.abs(y - two))
            shifted /= shifted.sum()
            order = np.argsort((shifted / density).ravel())  # the class keeps what the shift favours least
            before, after = density.ravel()[order].cumsum(), shifted.ravel()[order].cumsum()
            for p in (0.7, 0.9, 0.99):
                kept, bound = np.interp(p, before, after), float(law.moved(p, distance, "l1", 2))
                assert kept >= bound - 2e-2 * bound
                assert share != 1.0 or kept == pytest.approx(bound, rel=2e-2)


def test_uniform_noise_certifies_nothing_beyond_its_width() -> None:
    assert certificate(Uniform(0.3), "linf", D).probability(0.7) > 1
    assert certificate(Uniform(0.3), "l1", D).probability(0.31) > 1


@pytest.mark.parametrize(
    ("law", "own", "norm", "factor"),
    [
        (Gaussian(0.5), "l2", "linf", D**0.5),
        (Gaussian(0.5), "l2", "l2", 1),
        (Gaussian(0.5), "l2", "l1", 1),
        (Uniform(0.5), "l1", "linf", D),
        (Uniform(0.5), "l1", "l2", D**0.5),
        (Uniform(0.5), "linf", "l2", 1),
        (Laplace(0.5), "l1", "linf", D),
        (Uniform(0.5), "linf", "l1", 1),
    ],
)
def test_covering_ball_of_another_norm(law: Noise, own: str, norm: str, factor: float) -> None:
    assert certificate(law, own, D).covering(norm, 0.01) == pytest.approx(0.01 * factor)


def test_linf_two_255ths_is_the_l2_radius_of_the_literature() -> None:
    assert certificate(Gaussian(0.25), None, D).covering("linf", 2 / 255) == pytest.approx(0.4347, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lower_bound(5, 4, 0.01), "0 <= count <= n"),
        (lambda: lower_bound(0, 0, 0.01), "n > 0"),
        (lambda: lower_bound(1, 4, 1.5), "between 0 and 1"),
        (lambda: upper_bound(1, 4, 0.0), "between 0 and 1"),
        (lambda: certificate(Gaussian(0.5), "linf", D), "gaussian noise certifies l2"),
        (lambda: certificate(Uniform(0.5), "l2", D), "uniform noise certifies l1 or linf"),
        (lambda: certificate(Laplace(0.5), "l2", D), "laplace noise certifies l1,"),
        (lambda: certificate(Uniform(0.0), "l1", D), "scale above 0"),
        (lambda: certificate(Noise(0.5), None, D), "no certificate for the noise"),
        (lambda: certificate(Gaussian(0.5), None, D).covering("l3", 1), "norm"),
    ],
)
def test_bad_input_names_the_fix(call, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        call()
