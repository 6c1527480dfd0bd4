"""Coverage of the 95 % intervals by simulation: how often they hold the accuracy that the images and draws came from.

    python benchmarks/intervals.py [--trials 2000]

Rates q of images are Beta with a mean and a concentration (a + b; small: q near 0 and 1), K draws each; a deterministic defence
has q of 0 or 1. The mean moves by 10 % from trial to trial, so that the steps of discrete counts average out. A cell is one n,
K, mean and concentration; it is "few" where less than five images' worth of right or of wrong predictions (for a difference:
of images that differ) are expected. Target: 94 to 98 % where it is not.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rush_bench.records.statistics import Estimate, interval, paired_difference

IMAGES, DRAWS, MEANS, CONCENTRATIONS = (30, 100, 1000), (1, 10, 100), (0.05, 0.2, 0.5), (0.2, 2.0, 50.0)
CHANGES = ((0.05, 0.0), (0.1, 0.05), (0.3, 0.0), (0.2, 0.2))  # shares of images lost and won by a deterministic defence
FEW = 5


class Cell(NamedTuple):
    """A kind of interval, n, K (0: deterministic), how many images count, and a trial: its estimate and the truth."""

    kind: str
    images: int
    draws: int
    count: float
    trial: Callable[[np.random.Generator], tuple[Estimate, float]]

    def coverage(self, trials: int, seed: int) -> float:
        """The share of trials whose interval holds the truth."""
        rng = np.random.default_rng(seed)
        found = (self.trial(rng) for _ in range(trials))
        return sum(estimate.low <= truth <= estimate.high for estimate, truth in found) / trials


def cells() -> Iterator[Cell]:
    """Every cell of the grid."""
    for n, mean in itertools.product(IMAGES, MEANS):
        yield Cell("accuracy", n, 0, n * min(mean, 1 - mean), _deterministic(n, mean))
        for draws, concentration in itertools.product(DRAWS, CONCENTRATIONS):
            yield Cell("accuracy", n, draws, n * min(mean, 1 - mean), _randomised(n, draws, mean, concentration))
            yield Cell("difference", n, draws, 0.2 * n * mean, _pair(n, draws, mean, concentration))
    for n, (lost, won) in itertools.product(IMAGES, CHANGES):
        yield Cell("difference", n, 0, n * (lost + won), _changed(n, lost, won))


def _near(rng: np.random.Generator, mean: float) -> float:
    return mean + 0.1 * min(mean, 1 - mean) * rng.uniform(-1, 1)


def _deterministic(n: int, mean: float) -> Callable[[np.random.Generator], tuple[Estimate, float]]:
    def trial(rng: np.random.Generator) -> tuple[Estimate, float]:
        truth = _near(rng, mean)
        return interval((rng.random(n) < truth).astype(int), 1, True), truth

    return trial


def _rates(rng: np.random.Generator, n: int, mean: float, concentration: float) -> np.ndarray:
    return rng.beta(mean * concentration, (1 - mean) * concentration, n)


def _randomised(n: int, draws: int, mean: float, concentration: float) -> Callable[..., tuple[Estimate, float]]:
    def trial(rng: np.random.Generator) -> tuple[Estimate, float]:
        truth = _near(rng, mean)
        return interval(rng.binomial(draws, _rates(rng, n, truth, concentration)), draws, False), truth

    return trial


def _pair(n: int, draws: int, mean: float, concentration: float) -> Callable[..., tuple[Estimate, float]]:
    """The second defence is right 0.8 times as often on every image."""

    def trial(rng: np.random.Generator) -> tuple[Estimate, float]:
        truth = _near(rng, mean)
        q = _rates(rng, n, truth, concentration)
        return paired_difference(rng.binomial(draws, q), draws, rng.binomial(draws, 0.8 * q), draws), 0.2 * truth

    return trial


def _changed(n: int, lost: float, won: float) -> Callable[[np.random.Generator], tuple[Estimate, float]]:
    def trial(rng: np.random.Generator) -> tuple[Estimate, float]:
        down, up, u = _near(rng, lost), _near(rng, won), rng.random(n)
        before, after = u < 0.5 + down / 2, (u >= down) & (u < 0.5 + down / 2) | (u > 1 - up)
        return paired_difference(before.astype(int), 1, after.astype(int), 1), down - up

    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args()
    found: dict[tuple[str, int, int], list[tuple[bool, float]]] = {}
    for seed, cell in enumerate(cells()):
        row = found.setdefault((cell.kind, cell.images, cell.draws), [])
        row.append((cell.count < FEW, 100 * cell.coverage(args.trials, seed)))
    print(f"coverage of 95 % intervals in percent, {args.trials} trials a cell: lowest to highest (mean) of the cells")
    print(f"{'kind':<12}{'n':>6}{'K':>6}  {'five images and more':<32}few")
    for (kind, images, draws), row in sorted(found.items()):
        texts = []
        for few in (False, True):
            part = [coverage for is_few, coverage in row if is_few == few]
            texts.append(f"{min(part):.1f} to {max(part):.1f} ({np.mean(part):.1f}), {len(part)} cells" if part else "")
        print(f"{kind:<12}{images:>6}{draws or '-':>6}  {texts[0]:<32}{texts[1]}".rstrip())
    for few, name in ((False, "five images and more"), (True, "few")):
        every = np.array([coverage for row in found.values() for is_few, coverage in row if is_few == few])
        inside = np.mean((every >= 94) & (every <= 98))
        figures = f"{every.min():.1f} to {every.max():.1f}, mean {every.mean():.2f}"
        print(f"{name}: {figures}, {inside:.0%} of {len(every)} cells in 94 to 98")


if __name__ == "__main__":
    main()
