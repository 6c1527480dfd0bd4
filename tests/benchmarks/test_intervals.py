"""The simulation of coverages in small."""

import pytest


@pytest.fixture(scope="module")
def intervals(script):
    return script("intervals")


@pytest.mark.parametrize("kind", ["accuracy", "difference"])
@pytest.mark.parametrize("draws", [0, 1, 100])
def test_coverage_of_cells_with_images_enough(intervals, kind, draws):
    cells = [cell for cell in intervals.cells() if (cell.kind, cell.draws, cell.images) == (kind, draws, 100)]
    cells = [cell for cell in cells if cell.count >= intervals.FEW]
    coverages = [cell.coverage(100, seed) for seed, cell in enumerate(cells)]
    assert 0.92 <= sum(coverages) / len(coverages) <= 0.99  # 100 trials per cell leave 2 points, of their mean 1
