"""Intervals against exact coverage, scipy and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rush_bench.errors import BadInput
from rush_bench.records.statistics import (
    any_of_k,
    below_chance,
    clopper_pearson,
    interval,
    paired_difference,
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


@pytest.mark.parametrize(
    "a, b, n, repeats",
    [(2, 2, 60, 16), (0.5, 0.2, 60, 1), (8, 1, 200, 100), (0.3, 3, 100, 20), (25, 25, 100, 20), (90, 10, 100, 100)],
)
def test_intervals_cover_and_no_more(a, b, n, repeats):
    rng = np.random.default_rng(11)
    hits = []
    for _ in range(600):
        right = rng.binomial(repeats, rng.beta(a, b, size=n))
        found = interval(right, np.full(n, repeats), deterministic=False)
        hits.append(found.low <= a / (a + b) <= found.high)
    assert 0.925 <= np.mean(hits) <= 0.985  # 0.94 and 0.98 with the error of 600 trials


@pytest.mark.parametrize("lost, won, n", [(0.05, 0.0, 100), (0.1, 0.02, 100), (0.3, 0.1, 50)])
def test_differences_of_deterministic_defences_cover_and_no_more(lost, won, n):
    rng = np.random.default_rng(12)
    hits, one = [], np.ones(n, int)
    for _ in range(600):
        u = rng.random(n)
        before, after = (u < 0.6).astype(int), ((u >= lost) & (u < 0.6) | (u > 1 - won)).astype(int)
        found = paired_difference(before, one, after, one)
        hits.append(found.low <= lost - won <= found.high)
    assert 0.925 <= np.mean(hits) <= 0.985


def test_draws_are_counted_once():
    """All images alike: only the draws spread, and the width is that of n K predictions."""
    rng = np.random.default_rng(0)
    found = interval(rng.binomial(100, 0.5, 400), 100, False)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400 * 100), rel=0.1)
    equal = interval([50] * 100, 100, False)  # less spread than draws can have is luck
    assert equal.high - equal.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(100 * 100), rel=0.02)


def test_one_draw_of_a_randomised_defence_is_a_deterministic_one_but_for_the_kind():
    right = np.array([1] * 70 + [0] * 30)
    jeffreys = stats.beta.ppf([0.025, 0.975], 70.5, 30.5)
    assert interval(right, 1, deterministic=False)[1:] == pytest.approx(jeffreys, abs=1e-12)
    assert interval(right, 1, deterministic=True)[1:] == clopper_pearson(70, 100)


def test_interval_picks_by_kind_of_defence():
    right = np.array([1] * 70 + [0] * 30)
    assert interval(right, np.ones(100, int), deterministic=True) == (0.7, *clopper_pearson(70, 100))
    assert interval(right * 5, np.full(100, 5), deterministic=True) == (0.7, *clopper_pearson(70, 100))
    with pytest.raises(BadInput, match="mark it randomised"):
        interval([3], [5], deterministic=True)


@pytest.mark.parametrize("right", [0, 16])
def test_interval_has_a_width_where_every_prediction_agrees(right):
    found = interval([right] * 50, [16] * 50, deterministic=False)
    assert found[1:] == clopper_pearson(50 * (right > 0), 50)


def test_paired_difference_is_narrower_than_unpaired_and_covers():
    rng = np.random.default_rng(2)
    hits, widths, unpaired = [], [], []
    for _ in range(200):
        q = rng.beta(1, 1, size=80)  # b is right 0.8 times as often on every image
        a, b, of = rng.binomial(20, q), rng.binomial(20, 0.8 * q), np.full(80, 20)
        found = paired_difference(a, of, b, of)
        assert found.value == pytest.approx((a.mean() - b.mean()) / 20)
        hits.append(found.low <= 0.1 <= found.high)
        widths.append(found.high - found.low)
        each = [interval(x, of, False) for x in (a, b)]
        unpaired.append(math.hypot(*(one.high - one.low for one in each)))
    assert np.mean(hits) >= 0.9
    assert np.mean(widths) < 0.6 * np.mean(unpaired)


def test_paired_difference_is_students_but_for_its_allowance():
    a, b = np.array([1, 1, 1, 0, 1, 1, 1, 0] * 20), np.array([0, 1, 1, 1, 1, 0, 1, 0] * 20)
    found, d = paired_difference(a, 1, b, 1), a - b
    away = np.abs(d - d.mean())
    variance = d.var(ddof=1) + 2 * ((away**3).sum() / (away**2).sum()) ** 2 / len(d)
    expected = stats.t.interval(0.95, len(d) - 1, d.mean(), math.sqrt(variance / len(d)))
    assert found[1:] == pytest.approx(expected) and found.value == d.mean()
    plain = stats.t.interval(0.95, len(d) - 1, d.mean(), d.std(ddof=1) / math.sqrt(len(d)))
    assert 1 < (found.high - found.low) / (plain[1] - plain[0]) < 1.05


@pytest.mark.parametrize("a, b, value", [(1, 1, 0.0), (1, 0, 1.0), (0, 1, -1.0)])
def test_paired_difference_without_spread_bounds_the_unseen(a, b, value):
    one = np.ones(30, int)
    unseen = (1 - 0.025 ** (1 / 30)) * (1 + abs(value))
    found = paired_difference(a * one, one, b * one, one)
    assert found == pytest.approx((value, max(-1, value - unseen), min(1, value + unseen)))


def test_paired_difference_takes_no_rounding_for_spread():
    """0.9 - 0.6 is not 0.3 - 0.0 in floating point."""
    half = (1 - 0.025 ** (1 / 3)) * 1.3
    found = paired_difference([9, 3, 3], [10, 10, 10], [6, 0, 0], [10, 10, 10])
    assert found == pytest.approx((0.3, 0.3 - half, min(1, 0.3 + half)))


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
        (lambda: paired_difference([1, 0], 1, [1, 1], 1, level=95), "between 0 and 1"),
        (lambda: paired_difference([1], [1], [1, 0], [1, 1]), "same images"),
        (lambda: any_of_k([1], [4], 10), "at least 10 predictions"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(BadInput, match=message):
        call()


def _said(labels, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=int)[labels]


@pytest.mark.parametrize(("n", "right", "classes"), [(100, 0, 10), (100, 3, 10), (40, 5, 2), (500, 0, 100), (30, 2, 3)])
def test_below_chance_is_the_binomial_tail(n, right, classes) -> None:
    labels = np.arange(n) % classes
    predicted = np.where(np.arange(n) < right, labels, (labels + 1) % classes)
    share = sum(np.mean(labels == k) * np.mean(predicted == k) for k in range(classes))
    assert below_chance(labels, _said(predicted, classes)) == pytest.approx(
        stats.binom.cdf(right, n, min(share, 1 / classes)), rel=1e-9
    )


def test_what_has_nothing_to_do_with_the_labels_is_not_below_chance() -> None:
    """A class that is nowhere among the labels, always; a guess an image; ten votes that guess, of which none has most."""
    draw, labels = np.random.default_rng(0), np.arange(1000) % 9
    assert below_chance(labels, _said(np.full(1000, 9), 10)) == 1
    assert below_chance(labels, _said(labels, 10)) == 1
    assert below_chance(labels, np.ones((1000, 10), int)) == 1
    least = [below_chance(labels, _said(draw.integers(10, size=1000), 10)) for _ in range(200)]
    assert min(least) > 1e-4 and np.mean(np.array(least) < 0.05) < 0.1
    least = [below_chance(labels, draw.multinomial(10, np.full(10, 0.1), size=1000)) for _ in range(200)]
    assert min(least) > 1e-4


def test_few_images_are_never_below_chance() -> None:
    """Ten classes take 88 images, as 0.9^87 is above 0.0001; a hundred take 917."""
    for classes, enough in ((10, 88), (100, 917), (2, 14)):
        for n in (enough - 1, enough):
            labels = np.arange(n) % classes
            found = below_chance(labels, _said((labels + 1) % classes, classes))
            assert found == pytest.approx((1 - 1 / classes) ** n, rel=0.3)
            assert found > 1e-4 or n == enough
