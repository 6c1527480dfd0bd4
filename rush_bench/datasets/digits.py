"""scikit-learn's digits, built in: 1,797 scans, 8x8, of UCI's "Optical Recognition of Handwritten Digits"."""

from functools import cache
from pathlib import Path

import numpy as np

from rush_bench.datasets.source import Part, Source
from rush_bench.datasets.splits import ranked

NAMES = {"digits": "scikit-learn's handwritten digits, 1 x 16 x 16 (8x8 scans upsampled), 1297 train and 500 test; built in"}
TEST_IMAGES = 500


def make(name: str) -> Source:
    """The digits as a `Source`; 16x16 by bilinear interpolation by default (size 8 keeps the scans)."""
    return Source(name, _read, size=16)


@cache
def _read(part: str, folder: Path) -> Part | None:
    if part == "unlabelled":
        return None
    pixels, labels = _scans()
    # scikit-learn has no split of its own. This one is stratified and fixed.
    order = ranked(labels, len(labels), seed=0)
    positions = np.sort(order[:TEST_IMAGES] if part == "test" else order[TEST_IMAGES:])
    return Part(pixels[positions], labels[positions], tuple("0123456789"), "scikit-learn's digits")


@cache  # scikit-learn parses text, a third of a second each time
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) uint8 and labels (1797,) int64; to be copied, not changed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the scans count 0 to 16 dots per cell
    return pixels, digits.target.astype(np.int64)
