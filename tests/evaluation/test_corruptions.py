"""Corruptions: cells that resume and share, and numbers that are known in closed form."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rush_bench.datasets.corruptions import CorruptedImages, load_corrupted
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation.corruptions import evaluate
from rush_bench.noise import Uniform
from rush_bench.records import load_results
from rush_bench.report.corruptions import table

# right[corruption][severity - 1] of 20 images: what `Reads` gets right
RIGHT = {"fog": (20, 18, 16, 14, 12), "snow": (10, 10, 5, 5, 0), "frost": (20, 20, 20, 20, 20)}


class Reads(nn.Module):
    """Ten classes; the answer stands in the red of the first pixel, as 20 times the class."""

    def forward(self, images: Tensor) -> Tensor:
        return -((images[:, :1, 0, 0] * 255 - 20 * torch.arange(10.0)) ** 2)


@pytest.fixture
def corrupted(tmp_path: Path) -> CorruptedImages:
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    labels = np.arange(20) % 10
    for corruption, rights in RIGHT.items():
        pixels = np.zeros((5, 20, 32, 32, 3), np.uint8)
        for severity, right in enumerate(rights):
            answers = np.where(np.arange(20) < right, labels, (labels + 1) % 10)
            pixels[severity, :, 0, 0, 0] = 20 * answers
            pixels[severity, :, 5, 5, 1] = severity
        np.save(folder / f"{corruption}.npy", pixels.reshape(100, 32, 32, 3))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return load_corrupted("cifar10", tuple(RIGHT), data_dir=tmp_path / "data")


@pytest.fixture
def reads() -> Deterministic:
    return Deterministic(Reads().eval(), name="reads", shape=(3, 32, 32))


@pytest.fixture
def noisy() -> Callable[[int], Smoothed]:
    return lambda votes: Smoothed(Reads().eval(), noise=Uniform(0.1), votes=votes, name=f"noisy@{votes}")


def test_a_cell_a_corruption_and_severity_counts_what_is_right(tmp_path: Path, corrupted, reads) -> None:
    run = evaluate([reads], corrupted, out=tmp_path / "results", chunk=7, quiet=True)
    assert run.complete and run.done and not run.failed
    assert {(r.labels["corruption"], r.labels["severity"]): int(r.frame["correct"].sum()) for r in run.results} == {
        (corruption, k + 1): right for corruption, rights in RIGHT.items() for k, right in enumerate(rights)
    }
    assert all(r.chunks == 3 and set(r.frame["repeats"]) == {1} and set(r.frame["forwards"]) == {1.0} for r in run.results)
    assert load_results(tmp_path / "results") == []  # no rows of the table of attacks
    assert len(load_results(tmp_path / "results" / "corruptions")) == 15
    frame = table(run.results).set_index("corruption")
    assert frame.loc["fog", "accuracy"] == pytest.approx(80) and frame.loc["snow", "severity_3"] == pytest.approx(25)
    assert frame.loc["mean", "accuracy"] == pytest.approx(100 * (80 + 30 + 100) / 300)


def test_repeats_follow_the_votes(corrupted, reads, noisy) -> None:
    run = evaluate([reads, noisy(1), noisy(64)], corrupted, max_minutes=0, quiet=True)
    assert not run.done and not run.complete and all(r.chunks_done == 0 for r in run.results)
    assert {r.labels["defense"]: r.identity["repeats"] for r in run.results} == {"reads": 1, "noisy@1": 20, "noisy@64": 4}
    assert table(run.results)["accuracy"].isna().all()


def test_shards_and_a_second_call_make_the_same_records(tmp_path: Path, corrupted, noisy) -> None:
    def content(folder: Path) -> list[tuple[str, list[int]]]:
        return [(r.folder.name, r.frame["correct"].tolist()) for r in load_results(folder / "corruptions")]

    defense = noisy(3)
    whole = evaluate([defense], corrupted, out=tmp_path / "whole", chunk=8, repeats=5, quiet=True)
    for k in (2, 1):
        part = evaluate([noisy(3)], corrupted, out=tmp_path / "parts", chunk=8, repeats=5, shard=(k, 2), quiet=True)
        assert part.done and part.complete == (k == 1)
    assert content(tmp_path / "whole") == content(tmp_path / "parts") and len(content(tmp_path / "whole")) == 15
    spread = [r.frame["correct"].tolist() for r in whole.results if r.labels["corruption"] == "frost"]
    assert len({tuple(row) for row in spread}) == 5  # the severities differ in one pixel that nobody reads: draws are fresh
    before = defense.passes.forwards
    assert before == 15 * 20 * 3 * 5
    again = evaluate([defense], corrupted, out=tmp_path / "whole", chunk=8, repeats=5, quiet=True)
    assert again.complete and defense.passes.forwards == before  # nothing is done twice


def test_a_prediction_that_is_not_finite_fails_its_cell_only(tmp_path: Path, corrupted, reads) -> None:
    class Breaks(Reads):
        def forward(self, images: Tensor) -> Tensor:
            fourth = (images[:, 1:2, 5, 5] * 255 - 3).abs() < 0.1
            return torch.where(fourth, torch.nan, super().forward(images))

    run = evaluate([Deterministic(Breaks().eval(), name="breaks", shape=(3, 32, 32)), reads], corrupted, quiet=True)
    assert sorted(run.failed) == ["breaks fog 4", "breaks frost 4", "breaks snow 4"]
    assert "finite" in run.failed["breaks fog 4"] and not run.complete
    frame = table(run.results, "reads").set_index(["defense", "corruption"])
    assert frame.loc["breaks"]["accuracy"].isna().all() and frame.loc["breaks"]["ce"].isna().all()
    assert frame.loc["reads"]["accuracy"].notna().all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 32, 32)])
def test_a_defence_for_other_images_is_refused(tmp_path: Path, corrupted, shape) -> None:
    defense = Deterministic(nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 10)).eval(), name="x", shape=shape)
    with pytest.raises(BadInput, match="takes images"):
        evaluate([defense], corrupted, out=tmp_path / "results", quiet=True)
    assert not (tmp_path / "results").exists()


def test_bad_calls(corrupted, reads) -> None:
    with pytest.raises(BadInput, match="share a name"):
        evaluate([reads, reads], corrupted, quiet=True)
    with pytest.raises(BadInput, match="shard 3/2"):
        evaluate([reads], corrupted, shard=(3, 2), quiet=True)
