"""End to end through Smoothed on a linear network whose radii are known; resuming, sharding, bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rush_bench.certificates import Sampling
from rush_bench.certificates.bounds import lower_bound
from rush_bench.certificates.tsv import frame_of, read_tsv
from rush_bench.datasets import Images, as_images
from rush_bench.defenses import Defense, Deterministic, Network, Passes, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation import certificates as run_module
from rush_bench.evaluation import certify
from rush_bench.noise import Gaussian, Laplace, Noise, Uniform
from rush_bench.report import certificates as report

SHAPE = (1, 4, 4)
QUICK = Sampling(selection=20, draws=500)


class TwoClasses(nn.Module):
    """Class 1 where w.x > w.(1/2); the smoothed radius is the distance to that plane."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([-side, side], 1)


@pytest.fixture
def plane() -> TwoClasses:
    return TwoClasses(torch.randn(16, generator=torch.Generator().manual_seed(1))).eval()


@pytest.fixture
def images(plane: TwoClasses) -> Images:
    """60 random images labelled by the plane."""
    pixels = torch.randint(0, 256, (60, *SHAPE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return as_images(pixels, plane(pixels.float() / 255).argmax(1), classes=["no", "yes"], name="plane")


def smoothed(plane: nn.Module, law=None, **options) -> Smoothed:
    return Smoothed(plane, noise=law or Gaussian(0.25), name="plane@8", votes=8, shape=SHAPE, **options)


def distances(plane: TwoClasses, images: Images) -> np.ndarray:
    """l2 distance of each image to the plane."""
    return ((images.floats().flatten(1).double() - 0.5) @ plane.weight.double()).abs().numpy() / float(plane.weight.norm())


def test_gaussian_radii_are_below_the_true_ones_and_not_by_much(plane, images, tmp_path: Path) -> None:
    run = certify([smoothed(plane)], images, Sampling(draws=5000), out=tmp_path, quiet=True)
    assert run.complete and run.done
    found, true = frame_of(run.results[0]), distances(plane, images)
    assert (found.predict == found.label)[true > 0.12].all()  # nearer, the selection may choose the other class
    right = ((found.predict == found.label) & (found.radius > 0)).to_numpy()
    assert (found.radius.to_numpy()[right] <= true[right]).all()
    middle = right & (true > 0.1) & (true < 0.4)
    assert middle.sum() > 10
    assert (true - found.radius)[middle].max() < 0.05
    assert (found.bound == lower_bound(found["count"], found.draws, 0.001)).all()


@pytest.mark.parametrize(("law", "largest"), [(Uniform(0.3), 0.3), (Laplace(0.1), np.inf)], ids=lambda v: str(v))
def test_l1_radii_on_one_pixel_are_below_the_true_ones(images, tmp_path: Path, law: Noise, largest: float) -> None:
    pixel = TwoClasses(torch.eye(16)[5]).eval()
    run = certify([smoothed(pixel, law)], images, Sampling(draws=3000), out=tmp_path, quiet=True)
    found, true = frame_of(run.results[0]), distances(pixel, images)
    certified = (found.predict >= 0).to_numpy()
    assert run.results[0].labels["norm"] == "l1"
    # a half-space across one pixel: the l1 radius would be the distance, but with uniform noise never above lambda
    assert (found.radius.to_numpy()[certified] <= np.minimum(true, largest)[certified]).all()
    middle = certified & (true > 0.1) & (true < 0.3)
    assert middle.sum() > 5 and (true - found.radius)[middle].max() < 0.05


def test_uniform_linf_is_the_root_of_the_same_bound(plane, images, tmp_path: Path) -> None:
    run = certify([smoothed(plane, Uniform(0.3))], images, QUICK, norm="linf", out=tmp_path, quiet=True)
    found = frame_of(run.results[0])
    found = found[found.predict >= 0]
    assert found.radius.to_numpy() == pytest.approx(0.6 * (1 - (1.5 - found.bound.to_numpy()) ** (1 / 16)), rel=1e-12)


def test_staged_counts_are_a_prefix_of_fixed_ones(plane, images, tmp_path: Path) -> None:
    defense = smoothed(plane)
    fixed = certify([defense], images, Sampling(draws=3000), out=tmp_path, quiet=True).results[0]
    before = defense.passes.forwards
    staged = certify([defense], images, Sampling("staged", draws=3000, radii=(0.1,)), out=tmp_path, quiet=True).results[0]
    assert fixed.identity != staged.identity
    assert defense.passes.forwards - before == staged.frame.forwards.sum() == 60 * 100 + staged.frame.repeats.sum()
    assert staged.frame.repeats.sum() < 0.3 * fixed.frame.repeats.sum()
    whole = staged.frame.repeats == 3000
    assert (staged.frame.count_1[whole] == fixed.frame.count_1[whole]).all()
    assert (staged.frame.selected == fixed.frame.selected).all()
    certified = [(frame_of(r).radius >= 0.1) for r in (fixed, staged)]
    assert (certified[0] != certified[1]).mean() <= 0.05


def test_a_staged_run_bounds_what_it_did_not_settle_and_not_from_above(plane, images, tmp_path: Path) -> None:
    """At a radius between those it settled, and with the draws of a fixed run beside it."""
    shared, radii = {"out": tmp_path, "quiet": True}, (0.0, 0.1, 0.25, 9.0)
    (fixed,) = certify([smoothed(plane)], images, Sampling(draws=3000), **shared).results
    (staged,) = certify([smoothed(plane)], images, Sampling("staged", draws=3000, radii=(0.1,)), **shared).results
    assert (fixed.folder / "cohen.tsv").exists() and not (staged.folder / "cohen.tsv").exists()
    for frame in (frame_of(staged), read_tsv(staged.folder / "certificate.tsv")):
        found, whole = (report.summary(each, radii) for each in (frame, frame_of(fixed)))
        assert [at["high"] == 1 for at in found["certified"]] == [True, False, True, False]  # 9 is beyond what draws certify
        both = zip(found["certified"], whole["certified"], strict=True)
        assert all(at["low"] <= all_draws["accuracy"] <= at["high"] for at, all_draws in both)
        assert found["abstained"] is None and whole["abstained"] == (frame_of(fixed).predict == -1).sum()
        text = report.table({"staged": frame}, radii).to_markdown()
        assert ", 100.0]" in text and "the interval ends at 100" in text
    with_zero = certify([smoothed(plane)], images, Sampling("staged", draws=3000, radii=(0.0, 0.1)), **shared).results[0]
    assert report.summary(frame_of(with_zero), radii)["abstained"] == (frame_of(with_zero).predict == -1).sum()
    text = report.table({"staged": frame_of(with_zero)}, (0.0, 0.1, 9.0)).to_markdown()
    assert "100.0]" not in text and "ends at 100" not in text


def test_selection_and_estimation_use_other_draws_and_images_their_own(plane, images, tmp_path: Path, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    original = Network.predict

    def predict(self, x, stream):
        seen.append(stream.noise(self.noise, len(x), self.draws, SHAPE, "cpu").flatten(2).flatten(0, 1))
        return original(self, x, stream)

    monkeypatch.setattr(Network, "predict", predict)
    certify([smoothed(plane)], images.take(slice(0, 5)), Sampling("staged", 20, 600), out=tmp_path, quiet=True)
    rows = torch.cat(seen)
    assert len(rows) > 5 * 220
    assert len(rows.unique(dim=0)) == len(rows)


def test_resumed_sharded_and_whole_runs_leave_the_same(plane, images, tmp_path: Path) -> None:
    defense, settings = smoothed(plane), Sampling("staged", 20, 1000)
    frames = {}
    certify([defense], images, settings, out=tmp_path / "whole", quiet=True)
    for k in (2, 1, 3):
        certify([defense], images, settings, out=tmp_path / "shards", shard=(k, 3), quiet=True)
    stopped = certify([defense], images, settings, out=tmp_path / "resumed", max_minutes=0, quiet=True)
    assert not stopped.done and not stopped.complete and stopped.results[0].chunks_done == 0
    certify([defense], images, settings, out=tmp_path / "resumed", shard=(2, 4), quiet=True)
    chunk = next((tmp_path / "resumed").rglob("chunk-0001.npz"))
    written = chunk.stat().st_mtime_ns
    certify([defense], images, settings, out=tmp_path / "resumed", quiet=True)
    assert chunk.stat().st_mtime_ns == written  # what is done is not done again
    for name in ("whole", "shards", "resumed"):
        (path,) = (tmp_path / name).rglob("certificate.tsv")
        frames[name] = pd.read_csv(path, sep="\t").drop(columns="time")
    assert frames["whole"].equals(frames["shards"]) and frames["whole"].equals(frames["resumed"])


def test_batches_do_not_change_a_certificate(plane, images, tmp_path: Path) -> None:
    runs = [
        certify([smoothed(plane, memory=memory)], images, QUICK, out=tmp_path / str(chunk), chunk=chunk, quiet=True)
        for chunk, memory in ((7, 2**14), (60, 2**30))
    ]
    few, many = (frame_of(run.results[0]).drop(columns="time") for run in runs)
    assert few.equals(many)


def test_votes_share_one_certificate_and_abstentions_are_counted(plane, images, tmp_path: Path) -> None:
    coin = TwoClasses(plane.weight * 0).eval()  # both classes score 0, and argmax takes the first: never in doubt
    fair = nn.Sequential(plane, nn.Flatten()).eval()
    one, two = (Smoothed(fair, noise="gaussian:5", name=f"f@{m}", votes=m, shape=SHAPE) for m in (1, 64))
    run = certify([one, two], images, QUICK, out=tmp_path, quiet=True)
    assert len(run.results) == 1 and run.results[0].labels["defense"] == "f"
    found = frame_of(run.results[0])
    assert (found.predict == -1).mean() > 0.9  # noise far wider than the images: p is 1/2 everywhere
    assert (found.radius[found.predict == -1] == 0).all()
    sure = frame_of(certify([smoothed(coin)], images, QUICK, out=tmp_path, quiet=True).results[0])
    assert (sure.predict == 0).all() and sure.radius.nunique() == 1


def test_a_damaged_chunk_is_named(plane, images, tmp_path: Path) -> None:
    certify([smoothed(plane)], images, QUICK, out=tmp_path, shard=(1, 2), quiet=True)
    chunk = next(tmp_path.rglob("chunk-0000.npz"))
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"chunk-0000\.npz is damaged"):
        certify([smoothed(plane)], images, QUICK, out=tmp_path, quiet=True)


class NoLaw(Defense):
    def __init__(self) -> None:
        self.name, self.classes, self.shape, self.draws, self.passes = "odd", 2, SHAPE, 4, Passes()


class Stretched(Smoothed):
    def predict(self, images, stream):
        return super().predict((4 * images - 1.5).clamp(0, 1), stream)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda p: Stretched(p, noise=Gaussian(0.25), votes=4, shape=SHAPE), {}, "a Stretched with a predict of its own"),
        (lambda p: Deterministic(p, shape=SHAPE), {}, "is deterministic: a certificate needs Smoothed"),
        (lambda p: smoothed(p).bank(16, 0), {}, "bank16 is deterministic"),
        (lambda p: NoLaw(), {}, "no known noise law"),
        (smoothed, {"norm": "linf"}, "gaussian noise certifies l2"),
        (smoothed, {"shard": (3, 2)}, "shard 3/2"),
        (lambda p: smoothed(p, Uniform(0.0)), {}, "scale above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(plane, images, tmp_path, make, options, says) -> None:
    with pytest.raises(BadInput, match=says):
        certify([make(plane)], images, QUICK, out=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_images_that_do_not_fit_are_refused(plane, images) -> None:
    for data, says in (
        (images.take(slice(0, 0)), "no images to certify"),
        (dataclasses.replace(images, labels=torch.full((60,), -1)), "no labels"),
        (dataclasses.replace(images, pixels=images.pixels[..., :3].contiguous()), "takes images"),
    ):
        with pytest.raises(BadInput, match=says):
            certify([smoothed(plane)], data, QUICK)


def test_the_record_states_law_norm_and_looks(plane, images, tmp_path: Path) -> None:
    run = certify([smoothed(plane)], images, Sampling("target", 20, 1000, radii=(0.1,)), out=tmp_path, quiet=True)
    said = json.loads((run.results[0].folder / "cell.json").read_text())
    assert run.results[0].folder.parent.parent.name == run_module.FOLDER
    assert said["identity"]["threat"] == {"norm": "l2", "eps": None}
    assert said["identity"]["defense"]["noise"] == {"law": "gaussian", "scale": 0.25}
    assert {"mode": "target", "alpha": 0.001, "radii": [0.1], "dimension": 16}.items() <= said["identity"]["attack"].items()
