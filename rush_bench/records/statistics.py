"""Intervals for accuracies (protocol 1, 2). numpy and scipy only; rates are fractions in [0, 1].

An image i of a randomised defence has a probability q_i of being classified rightly; `correct[i]` of `repeats[i]`
independent predictions were right. The accuracy is the mean of the q_i; a deterministic defence has q_i in {0, 1}.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rush_bench.errors import BadInput


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
    # Beta has no quantiles where one of its parameters is 0; there the bound is 0 or 1 exactly.
    low = np.where(right == 0, 0.0, _beta(tail, np.where(right == 0, 1, right), n - right + 1))
    high = np.where(right == n, 1.0, _beta(1 - tail, right + 1, np.where(right == n, 1, n - right)))
    return (float(low), float(high)) if low.ndim == 0 else (low, high)


def interval(correct: ArrayLike, repeats: ArrayLike, deterministic: bool, level: float = 0.95) -> Estimate:
    """Accuracy and interval: Clopper-Pearson for a deterministic defence, by the spread of the rates for a randomised one.

    The rates of n images spread by images and draws together, as if there were more images that are right or wrong as a whole
    (as many as n K where only draws make a difference): Jeffreys' interval at that effective number. Below three images' worth
    of right or of wrong predictions the spread says nothing of the images that count, and it is Clopper-Pearson's of n images.
    Coverages: benchmarks/intervals.py.
    """
    right, of = _counts(correct, repeats)
    n, rates = len(right), right / of
    value = float(np.mean(rates))
    if deterministic:
        if np.any((right != 0) & (right != of)):
            raise BadInput(
                "a deterministic defence was right in some repeats and wrong in others on one image; mark it randomised"
            )
        return Estimate(value, *clopper_pearson(int(np.sum(right == of)), n, level))
    if n * min(value, 1 - value) < 3:
        return Estimate(value, *clopper_pearson(float(np.sum(rates)), n, level))
    most = value * (1 - value)  # the variance of rates that are all 0 or 1; no rates vary less than their draws
    size = n * max(1.0, most / max(_variance(rates), float(np.mean(most / of))))
    low, high = _beta([_tail(level), 1 - _tail(level)], value * size + 0.5, (1 - value) * size + 0.5)
    return Estimate(value, float(low), float(high))


def paired_difference(
    correct_a: ArrayLike, repeats_a: ArrayLike, correct_b: ArrayLike, repeats_b: ArrayLike, level: float = 0.95
) -> Estimate:
    """Accuracy of a less that of b on the same images, in the same order; Student's interval of the images' differences
    (protocol 2).

    Where all images differ by the same amount, but for rounding, the interval is the exact bound on what was not seen:
    a kind of image that none of n was has a share of at most 1 - tail^(1/n).
    """
    right_a, of_a = _counts(correct_a, repeats_a)
    right_b, of_b = _counts(correct_b, repeats_b)
    n = len(right_a)
    if n != len(right_b):
        raise BadInput(f"a paired difference needs the same images, not {n} and {len(right_b)} of them")
    differences = right_a / of_a - right_b / of_b
    value, tail = float(np.mean(differences)), _tail(level)
    half = (1 - tail ** (1 / n)) * (1 + abs(value))
    if np.ptp(differences) > ROUNDING:
        from scipy import stats

        half = float(stats.t.ppf(1 - tail, n - 1) * np.sqrt(_variance(differences) / n))
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half))


ROUNDING = 1e-9  # of differences: 0.8 - 0.6 is not more than 0.2
UNLIKELY = 1e-4  # of a clean accuracy so far below chance, in any of thousands of rows


def below_chance(labels: ArrayLike, counts: ArrayLike) -> float:
    """How likely so few right images are if predictions (n, classes) had nothing to do with labels (n,): exact, one-sided.

    An image is right whose label no other class has more predictions than. The chance of that is 1/classes, or less where
    labels and predictions favour other classes: one who always says what is nowhere among the labels is never right.
    Classifiers are not far below chance; what is, has labels in another order.
    """
    labels, counts = np.asarray(labels), np.asarray(counts)
    most = counts == counts.max(1, keepdims=True)
    right = int(most[np.arange(len(labels)), labels].sum())
    said = (most / most.sum(1, keepdims=True)).mean(0)
    chance = min(1 / counts.shape[1], float(said @ np.bincount(labels, minlength=counts.shape[1]) / len(labels)))
    if right >= len(labels) * chance:
        return 1.0
    from scipy.special import bdtr  # takes longer to load than a table that is remembered takes to write

    return float(bdtr(right, len(labels), chance))


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
        raise BadInput(f"counts must be one row per image, at least one image; got shape {right.shape}")
    if right.dtype.kind not in "iub" or of.dtype.kind not in "iu":
        raise BadInput(f"counts must be whole numbers, not {right.dtype} of {of.dtype}")
    right, of = right.astype(np.int64), of.astype(np.int64)
    wrong = np.flatnonzero((of < 1) | (right < 0) | (right > of))
    if len(wrong):
        raise BadInput(f"image {wrong[0]}: {right[wrong[0]]} right of {of[wrong[0]]} predictions is not a count")
    return right, of


def _variance(values: NDArray[np.float64]) -> float:
    """Sample variance (n,) and an allowance: as if two more values lay as far from the mean as those that make the variance.

    Few images make most of it where most of them agree; without the allowance, 5 losses among 100 images are covered by 92 %.
    """
    away = np.abs(values - values.mean())
    squares = float(np.sum(away**2))
    if not squares:
        return 0.0
    far = float(np.sum(away**3)) / squares
    return squares / (len(values) - 1) + 2 * far**2 / len(values)


def _beta(share: Any, a: Any, b: Any) -> Any:
    """Quantiles of Beta(a, b): what scipy.stats.beta.ppf gives, bit for bit, at a hundredth of its time."""
    from scipy.special import betaincinv  # takes longer to load than a table that is remembered takes to write

    return betaincinv(a, b, share)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise BadInput(f"level {level} must lie between 0 and 1")
    return (1 - level) / 2
