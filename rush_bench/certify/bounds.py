"""Bounds of certificates: one-sided Clopper-Pearson, and the theorem of a law of noise in a norm (`rush_bench.noise`).

Everything is vectorised over numpy arrays, in float64. `p` is a lower bound on the probability that one noisy copy of an
image gets the class, wrong with probability at most alpha; where it holds, no x' within the radius has another top class.
A radius is in pixel units, in the norm of the law's theorem; `dimension` is the number of pixels times channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rush_bench.errors import BadInput, unknown_name
from rush_bench.noise import LAWS, Floats, Noise


def lower_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided lower bound on a proportion, `count` of `n`: above the truth with probability at most `alpha`."""
    k, of, level = _checked(count, n, alpha)
    # beta.ppf has no value where its first parameter is 0; at count = n the quantile is alpha^(1/n)
    return np.where(k == 0, 0.0, stats.beta.ppf(level, np.maximum(k, 1), of - k + 1))


def upper_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided upper bound on a proportion: below the truth with probability at most `alpha`."""
    k, of, level = _checked(count, n, alpha)
    return 1 - lower_bound(of - k, of, level)


def needed_count(p: ArrayLike, n: int, alpha: float) -> NDArray[np.int64]:
    """The smallest count of `n` whose lower bound is at least p; n + 1 where none is.

    lower_bound(k) >= p if and only if P(Binomial(n, p) >= k) <= alpha (the test that the bound inverts).
    """
    _checked(0, n, alpha)
    return np.asarray(stats.binom.isf(alpha, n, p)).astype(np.int64) + 1


def best_bound(n: int, alpha: float) -> float:
    """The lower bound where all of `n` draws agree: alpha^(1/n), the largest there is."""
    _checked(0, n, alpha)
    return float(np.exp(np.log(alpha) / n))


@dataclass(frozen=True)
class Certificate:
    """A law of noise, a norm and a dimension: what turns a bound p into a radius and back."""

    law: Noise
    norm: str
    dimension: int

    def radius(self, p: ArrayLike) -> Floats:
        """Radius of a bound p; below 0 where p < 1/2, which certifies nothing."""
        return self.law.radius(p, self.norm, self.dimension)

    def probability(self, radius: ArrayLike) -> Floats:
        """The bound p that certifies a radius: the inverse of `radius`. Above 1 where no bound does."""
        return self.law.probability(radius, self.norm, self.dimension)

    def moved(self, p: ArrayLike, distance: ArrayLike) -> Floats:
        """What is left of a bound p at an x' so far away: the class has at least this probability there."""
        return self.law.moved(p, distance, self.norm, self.dimension)

    def largest(self, n: int, alpha: float) -> float:
        """The largest radius that `n` draws can certify: 3.8115 sigma at n = 100,000 and alpha = 0.001."""
        return float(self.radius(best_bound(n, alpha)))

    def covering(self, norm: str, eps: float) -> float:
        """The least radius, in this certificate's norm, of a ball that holds the ball of another norm and radius eps."""
        root = {"l1": 1.0, "l2": 0.5, "linf": 0.0}
        if norm not in root:
            raise unknown_name("norm", norm, root)
        return eps * float(self.dimension) ** max(0.0, root[self.norm] - root[norm])


def certificate(law: Noise, norm: str | None, dimension: int) -> Certificate:
    """The theorem for a law and a norm; None is the law's first (l2 for Gaussian, l1 for uniform and Laplace noise)."""
    if not law.norms or law.scale <= 0:
        known = " or ".join(name for name, kind in LAWS.items() if kind.norms)
        raise BadInput(f"there is no certificate for the noise {law}; it takes {known} noise of a scale above 0")
    if norm is None:
        norm = law.norms[0]
    if norm not in law.norms:
        name = type(law).__name__.lower()
        raise BadInput(f"{name} noise certifies {' or '.join(law.norms)}, not {norm!r}; leave out --norm, or give one of these")
    return Certificate(law, norm, dimension)


def _checked(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Any, Any, Any]:
    count, n, alpha = np.asarray(count), np.asarray(n), np.asarray(alpha, np.float64)
    if not (np.all(n > 0) and np.all((count >= 0) & (count <= n))):
        raise BadInput(f"a bound needs 0 <= count <= n and n > 0, not {count} of {n}")
    if not np.all((alpha > 0) & (alpha < 1)):
        raise BadInput(f"alpha = {alpha} must lie between 0 and 1; 0.001 is usual")
    return count, n, alpha
