"""Intervals for accuracies (protocol 1, 2). numpy and scipy only; rates are fractions in [0, 1].

An image i of a randomised defence has a probability q_i of being classified rightly; `correct[i]` of `repeats[i]`
independent predictions were right. The accuracy is the mean of the q_i; a deterministic defence has q_i in {0, 1}.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rush_bench.errors import BadInput

_CELLS_AT_ONCE = 4_000_000  # bootstrap samples times groups held at once: 32 MB an array


class Estimate(NamedTuple):
    """A number and its two-sided interval."""

    value: float
    low: float
    high: float


def clopper_pearson(right: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """Exact interval for a proportion, `right` of `n` (Clopper and Pearson 1934); scalars or arrays that broadcast."""
    right, n = np.asarray(right), np.asarray(n)
    if not (0 < level < 1 and np.all(n > 0) and np.all((right >= 0) & (right <= n))):
        raise BadInput(f"clopper_pearson needs 0 <= right <= n, n > 0 and 0 < level < 1, not {right} of {n} at {level}")
    tail = (1 - level) / 2
    # beta.ppf has no value where one of its parameters is 0; there the bound is 0 or 1 exactly.
    low = np.where(right == 0, 0.0, stats.beta.ppf(tail, np.where(right == 0, 1, right), n - right + 1))
    high = np.where(right == n, 1.0, stats.beta.ppf(1 - tail, right + 1, np.where(right == n, 1, n - right)))
    return (float(low), float(high)) if low.ndim == 0 else (low, high)


def two_level_bootstrap(
    correct: ArrayLike, repeats: ArrayLike, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the accuracy: images are resampled, then each one's draws at its own rate (A3, 7.2).

    `correct` and `repeats` are (n,) counts. Images with equal counts form a group: its size among the resampled images
    is multinomial and the sum of its redrawn counts binomial, which is the same distribution at a fraction of the work.
    """
    right, of = _counts(correct, repeats)
    means = _bootstrap_means([(right, of)], samples, seed)[0]
    return _percentiles(means, level)


def interval(
    correct: ArrayLike, repeats: ArrayLike, deterministic: bool, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Estimate:
    """Accuracy and interval: Clopper-Pearson for a deterministic defence, two-level bootstrap otherwise (protocol 2).

    Within five images of 0 or 1 the bootstrap hardly sees the images that count (none: it has no width). One prediction an
    image is a Bernoulli trial with the accuracy as its probability, so there the interval is widened to Clopper-Pearson's.
    """
    right, of = _counts(correct, repeats)
    value = float(np.mean(right / of))
    if deterministic:
        if np.any((right != 0) & (right != of)):
            raise BadInput(
                "a deterministic defence was right in some repeats and wrong in others on one image; mark it randomised"
            )
        return Estimate(value, *clopper_pearson(int(np.sum(right == of)), len(right), level))
    low, high = two_level_bootstrap(right, of, level, samples, seed)
    if len(right) * min(value, 1 - value) < 5:
        exact = clopper_pearson(float(np.sum(right / of)), len(right), level)
        low, high = min(low, exact[0]), max(high, exact[1])
    return Estimate(value, low, high)


def paired_difference(
    correct_a: ArrayLike,
    repeats_a: ArrayLike,
    correct_b: ArrayLike,
    repeats_b: ArrayLike,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Accuracy of a less that of b on the same images, in the same order; bootstrap paired by image (protocol 2).

    Where all images differ by the same amount without any spread, the interval is the exact bound on what was not seen:
    a kind of image that none of n was has a share of at most 1 - tail^(1/n).
    """
    right_a, of_a = _counts(correct_a, repeats_a)
    right_b, of_b = _counts(correct_b, repeats_b)
    if len(right_a) != len(right_b):
        raise BadInput(f"a paired difference needs the same images, not {len(right_a)} and {len(right_b)} of them")
    value = float(np.mean(right_a / of_a) - np.mean(right_b / of_b))
    means_a, means_b = _bootstrap_means([(right_a, of_a), (right_b, of_b)], samples, seed)
    low, high = _percentiles(means_a - means_b, level)
    if low == high:
        unseen = (1 - ((1 - level) / 2) ** (1 / len(right_a))) * (1 + abs(value))
        low, high = max(-1.0, value - unseen), min(1.0, value + unseen)
    return Estimate(value, low, high)


def any_of_k(correct: ArrayLike, repeats: ArrayLike, k: int) -> NDArray[np.float64]:
    """Per image, the chance that at least one of k predictions is wrong (protocol 1), (n,), unbiased.

    k of the image's predictions are all right in C(correct, k) of C(repeats, k) choices without replacement, whose
    ratio has the expectation q^k; the plug-in (correct / repeats)^k has not.
    """
    right, of = _counts(correct, repeats)
    if not 1 <= k <= of.min():
        raise BadInput(f"any-of-{k} needs at least {k} predictions of every image, not {of.min()}; raise --repeats")
    j = np.arange(k)[:, None]
    return 1 - np.prod(np.maximum(right - j, 0) / (of - j), axis=0)


def _counts(correct: ArrayLike, repeats: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    right = np.asarray(correct)
    of = np.broadcast_to(np.asarray(repeats), right.shape)
    if right.ndim != 1 or len(right) == 0:
        raise BadInput(f"counts must be one row an image, at least one image; got shape {right.shape}")
    if right.dtype.kind not in "iub" or of.dtype.kind not in "iu":
        raise BadInput(f"counts must be whole numbers, not {right.dtype} of {of.dtype}")
    right, of = right.astype(np.int64), of.astype(np.int64)
    wrong = np.flatnonzero((of < 1) | (right < 0) | (right > of))
    if len(wrong):
        raise BadInput(f"image {wrong[0]}: {right[wrong[0]]} right of {of[wrong[0]]} predictions is not a count")
    return right, of


def _bootstrap_means(
    systems: list[tuple[NDArray[np.int64], NDArray[np.int64]]], samples: int, seed: int
) -> NDArray[np.float64]:
    """Means of resampled images and draws, (systems, samples); all systems see the same resampled images."""
    rng = np.random.default_rng(seed)
    n = len(systems[0][0])
    groups, sizes = np.unique(np.stack([part for pair in systems for part in pair]), axis=1, return_counts=True)
    means = np.empty((len(systems), samples))
    step = max(1, _CELLS_AT_ONCE // len(sizes))
    for start in range(0, samples, step):
        drawn = rng.multinomial(n, sizes / n, size=min(step, samples - start))
        for s in range(len(systems)):
            right, of = groups[2 * s], groups[2 * s + 1]
            means[s, start : start + step] = (rng.binomial(drawn * of, right / of) / of).sum(axis=1) / n
    return means


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise BadInput(f"level {level} must lie between 0 and 1")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
