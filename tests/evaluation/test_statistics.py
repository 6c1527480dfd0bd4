"""Intervals against exact coverage, scipy and a bootstrap written as loops."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rush_bench.errors import BadInput
from rush_bench.evaluation.statistics import (
    any_of_k,
    clopper_pearson,
    interval,
    paired_difference,
    two_level_bootstrap,
)


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (778, 1000), (9999, 10000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_clopper_pearson_is_scipys(right, n, level):
    exact = stats.binomtest(right, n).proportion_ci(level, "exact")
    assert clopper_pearson(right, n, level) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_clopper_pearson_takes_arrays():
    low, high = clopper_pearson(np.array([0, 3, 10]), 10)
    assert [(a, b) for a, b in zip(low, high, strict=True)] == [clopper_pearson(k, 10) for k in (0, 3, 10)]


@pytest.mark.parametrize("n", [1, 12, 60])
def test_clopper_pearson_covers_whatever_the_rate(n):
    low, high = clopper_pearson(np.arange(n + 1), n)
    for p in np.linspace(0, 1, 101):  # exact coverage: the chance of those counts whose interval holds p
        assert stats.binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() >= 0.95 - 1e-9


def _looped(right, of, samples, rng):
    means = []
    for _ in range(samples):
        rows = rng.integers(len(right), size=len(right))
        means.append(np.mean([rng.binomial(of[i], right[i] / of[i]) / of[i] for i in rows]))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_is_the_bootstrap_in_loops():
    rng = np.random.default_rng(3)
    of = np.where(np.arange(40) % 2, 4, 10)
    right = rng.binomial(of, rng.beta(2, 1, size=40))
    ours = two_level_bootstrap(right, of, samples=20_000, seed=5)
    assert ours == pytest.approx(_looped(right, of, 3000, rng), abs=0.012)  # the loop's own error is 0.003


@pytest.mark.parametrize(
    "a, b, n, repeats",
    [(2, 2, 60, 16), (0.5, 0.2, 60, 1), (8, 1, 200, 100), (0.3, 3, 100, 20), (0.02, 1, 50, 20), (1, 0.02, 50, 20)],
)
def test_bootstrap_covers(a, b, n, repeats):
    rng = np.random.default_rng(11)
    hits = []
    for seed in range(300):
        right = rng.binomial(repeats, rng.beta(a, b, size=n))
        found = interval(right, np.full(n, repeats), deterministic=False, samples=400, seed=seed)
        hits.append(found.low <= a / (a + b) <= found.high)
    assert np.mean(hits) >= 0.91  # 0.95 less three standard errors of 300 trials


def test_bootstrap_counts_draws_as_well_as_images():
    images_only = two_level_bootstrap([50] * 100, [100] * 100)  # all images alike: only the draws spread
    assert images_only[1] - images_only[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(100 * 100), rel=0.1)


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    assert two_level_bootstrap([1, 2, 3, 4], [4] * 4, seed=1) == two_level_bootstrap([1, 2, 3, 4], [4] * 4, seed=1)
    assert two_level_bootstrap([1, 2, 3, 4], [4] * 4, seed=1) != two_level_bootstrap([0, 2, 2, 4], [4] * 4, seed=1)
    assert np.array_equal(before, np.random.get_state()[1])


def test_interval_picks_by_kind_of_defence():
    right = np.array([1] * 70 + [0] * 30)
    assert interval(right, np.ones(100, int), deterministic=True) == (0.7, *clopper_pearson(70, 100))
    assert interval(right * 5, np.full(100, 5), deterministic=True) == (0.7, *clopper_pearson(70, 100))
    assert interval(right, np.ones(100, int), deterministic=False)[1:] == two_level_bootstrap(right, np.ones(100, int))
    with pytest.raises(BadInput, match="mark it randomised"):
        interval([3], [5], deterministic=True)


@pytest.mark.parametrize("right", [0, 16])
def test_interval_has_a_width_where_every_prediction_agrees(right):
    found = interval([right] * 50, [16] * 50, deterministic=False)
    assert found[1:] == clopper_pearson(50 * (right > 0), 50)


def test_paired_difference_is_narrower_than_unpaired_and_covers():
    rng = np.random.default_rng(2)
    hits, widths, unpaired = [], [], []
    for seed in range(200):
        q = rng.beta(1, 1, size=80)  # b is right 0.8 times as often on every image
        a, b, of = rng.binomial(20, q), rng.binomial(20, 0.8 * q), np.full(80, 20)
        found = paired_difference(a, of, b, of, samples=300, seed=seed)
        assert found.value == pytest.approx((a.mean() - b.mean()) / 20)
        hits.append(found.low <= 0.1 <= found.high)
        widths.append(found.high - found.low)
        each = [two_level_bootstrap(x, of, samples=300, seed=seed) for x in (a, b)]
        unpaired.append(math.hypot(*(high - low for low, high in each)))
    assert np.mean(hits) >= 0.9
    assert np.mean(widths) < 0.6 * np.mean(unpaired)


def test_paired_difference_by_enumeration():
    # two images, one draw each: (a, b) right on (1, 0) and (1, 1); the resampled mean difference is 0, 1/2 or 1
    found = paired_difference([1, 1], [1, 1], [0, 1], [1, 1], samples=4000)
    assert found == (0.5, 0.0, 1.0)  # each end has probability 1/4


@pytest.mark.parametrize("a, b, value", [(1, 1, 0.0), (1, 0, 1.0), (0, 1, -1.0)])
def test_paired_difference_without_spread_bounds_the_unseen(a, b, value):
    one = np.ones(30, int)
    unseen = (1 - 0.025 ** (1 / 30)) * (1 + abs(value))
    found = paired_difference(a * one, one, b * one, one)
    assert found == pytest.approx((value, max(-1, value - unseen), min(1, value + unseen)))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_any_of_k_by_enumeration(k):
    for right in range(7):
        draws = [1] * right + [0] * (6 - right)
        choices = list(itertools.combinations(draws, k))
        assert any_of_k([right], [6], k)[0] == pytest.approx(sum(0 in c for c in choices) / len(choices))


def test_any_of_k_is_unbiased():
    q, repeats, k = 0.7, 12, 5
    counts = np.arange(repeats + 1)
    expected = stats.binom.pmf(counts, repeats, q) @ any_of_k(counts, np.full(repeats + 1, repeats), k)
    assert expected == pytest.approx(1 - q**k, abs=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: clopper_pearson(3, 2), "0 <= right <= n"),
        (lambda: clopper_pearson(0, 0), "n > 0"),
        (lambda: interval([], [], True), "at least one image"),
        (lambda: interval([0.5], [1], False), "whole numbers"),
        (lambda: interval([1, 5], [4, 4], False), "image 1: 5 right of 4"),
        (lambda: two_level_bootstrap([1], [2], level=95), "between 0 and 1"),
        (lambda: paired_difference([1], [1], [1, 0], [1, 1]), "same images"),
        (lambda: any_of_k([1], [4], 10), "at least 10 predictions"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(BadInput, match=message):
        call()
