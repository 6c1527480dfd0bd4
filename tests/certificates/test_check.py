"""Certificate above attack: never on honest records, always on a record that cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rush_bench.attacks.suites import parse_suite
from rush_bench.certificates import Sampling, check
from rush_bench.certificates.tsv import frame_of
from rush_bench.datasets import as_images
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation import attack, certify
from rush_bench.packs import opened
from rush_bench.records import Cell, CellStore, load_results

SHAPE = (1, 4, 4)
SIGMA = 0.1


@pytest.fixture
def smoothed(linear):
    return lambda votes: Smoothed(linear, noise=f"gaussian:{SIGMA}", name=f"lin@{votes}", votes=votes, shape=SHAPE)


@pytest.fixture
def certificates(smoothed, grey, tmp_path: Path):
    return certify([smoothed(8)], grey, Sampling(draws=2000), out=tmp_path, quiet=True).results


@pytest.mark.parametrize("suite", ["l2-0.05", "linf3", "linf20"])
def test_no_attack_goes_below_a_certificate(suite: str, smoothed, grey, certificates, tmp_path: Path) -> None:
    columns = parse_suite(f"{suite}-quick", only=("clean", "pgd"))
    defenses = [smoothed(1), smoothed(9), Deterministic(smoothed(1).body.network, name="base", shape=SHAPE)]
    run = attack(defenses, columns, grey.take(slice(5, 40)), out=tmp_path, repeats=20, quiet=True)
    found = check.comparisons(certificates, load_results(tmp_path))
    assert len(found) == 6  # clean, pgd and worst of the two smoothed ones; the base has no certificate
    assert {(c.votes, c.attack) for c in found} == {(m, a) for m in (1, 9) for a in ("clean", "pgd", "worst")}
    assert all(c.n == 35 and not c.contradiction for c in found)
    for c in found:  # an interval on each side would be needed for one: the floor is a bound in expectation
        assert c.floor <= c.certified + 1e-12
        assert c.attacked >= c.floor - c.allowed
    eps = next(c.eps for c in found if c.attack == "pgd") * (4 if suite.startswith("linf") else 1)
    own = frame_of(certificates[0]).iloc[5:]
    pgd = next(c for c in found if c.attack == "pgd" and c.votes == 9)
    assert pgd.certified == pytest.approx(((own.radius >= eps + 5e-6) & (own.correct == 1)).mean())
    assert (pgd.certified > 0) == (suite != "linf20")
    assert run.complete


def test_the_floor_is_the_binomial_majority_at_what_is_left(smoothed, grey, certificates, tmp_path: Path) -> None:
    attack([smoothed(9)], parse_suite("l2-0.05-quick", only=("pgd",)), grey, out=tmp_path, repeats=5, quiet=True)
    (found,) = check.comparisons(certificates, load_results(tmp_path))
    own = frame_of(certificates[0])
    p = stats.norm.cdf(stats.norm.ppf(own.bound) - 0.05 / SIGMA)
    floor = np.where((own.correct == 1) & (own.radius >= 0.05), stats.binom.sf(4, 9, p), 0).mean()
    assert found.floor == pytest.approx(floor, abs=1e-4)
    assert "l2 0.05" in str(found)


def test_an_attack_record_that_cannot_be_is_found(smoothed, grey, certificates, tmp_path: Path) -> None:
    run = attack([smoothed(9)], parse_suite("l2-0.05-quick", only=("pgd",)), grey, out=tmp_path, repeats=20, quiet=True)
    assert check.contradictions(certificates, run.results) == []
    store, (result,) = CellStore(tmp_path / "forged"), run.results
    cell = Cell(result.identity, result.labels)
    arrays = CellStore(tmp_path).read(cell, 0)
    lost = np.roll(np.eye(5, dtype=np.int64)[grey.labels.numpy()], 1, axis=1) * 20
    store.open(cell)
    store.write(cell, 0, arrays | {"correct": np.zeros(40, np.int64), "counts": lost})
    (found,) = check.contradictions(certificates, load_results(tmp_path / "forged"))
    assert found.attacked == 0 < found.floor - found.allowed


def test_other_images_of_the_same_name_are_no_contradiction(smoothed, grey, tmp_path: Path) -> None:
    """Two sets of tensors are both called "mine", and their positions 0, 1, ..."""
    other = as_images((1 - grey.floats()).numpy(), grey.labels, classes=grey.classes, name=grey.name, split=grey.split)
    certified = certify([smoothed(8)], grey, Sampling(draws=2000), out=tmp_path, quiet=True).results
    attacked = attack([smoothed(9)], parse_suite("l2-0.05-quick", only=("clean",)), other, out=tmp_path, repeats=20, quiet=True)
    (found,) = check.comparisons(certified, attacked.results)
    assert found.attacked < found.floor - found.allowed and not found.same_images and not found.contradiction
    assert check.clashes(attacked.results, tmp_path) == []


def test_another_network_noise_or_data_set_is_not_compared(linear, grey, certificates, tmp_path: Path) -> None:
    pgd = parse_suite("l2-0.05-quick", only=("clean",))
    other = torch.nn.Sequential(linear, torch.nn.Identity()).eval()
    for k, (network, noise, name) in enumerate(
        [(other, f"gaussian:{SIGMA}", "grey"), (linear, "gaussian:0.2", "grey"), (linear, f"gaussian:{SIGMA}", "sky")]
    ):
        data = grey.take(slice(None))
        object.__setattr__(data, "name", name)
        defense = Smoothed(network, noise=noise, name=f"d{k}@4", votes=4, shape=SHAPE)
        attack([defense], pgd, data, out=tmp_path / "others", repeats=2, quiet=True)
    results = load_results(tmp_path / "others")
    assert len(results) == 3 and check.comparisons(certificates, results) == []


def test_chance_is_allowed_for_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    floors = np.concatenate([rng.uniform(0.5, 1, 60), np.zeros(20)])
    repeats = np.full(80, 16)
    allowed = check._allowed(floors, repeats, 0.001, 0.05)
    right = rng.binomial(16, floors, (4000, 80)) / 16
    assert (right.mean(1) < floors.mean() - allowed).mean() <= 0.05
    assert allowed < 0.1  # not so wide that nothing could ever be found


THREE_QUARTERS = SIGMA * stats.norm.ppf(0.75)


@pytest.mark.parametrize(
    ("mode", "change", "says"),
    [
        ("fixed", lambda a: {"radius": 10 * a["radius"]}, "radius is not that of its bound"),
        ("staged", lambda a: {"radius": 10 * a["radius"]}, "radius is not that of its bound"),
        ("fixed", lambda a: {"predict": a["predict"] + 1}, "class is not the selected one"),
        ("staged", lambda a: {"predict": np.where(a["predict"] < 0, a["selected"], -1)}, "class is not the selected one"),
        (
            "fixed",
            lambda a: {"bound": 0 * a["bound"] + 0.75, "radius": 0 * a["radius"] + THREE_QUARTERS, "predict": a["selected"]},
            "bound is not that of its draws",
        ),
    ],
)
def test_a_certificate_that_does_not_follow_from_its_draws_is_refused(
    smoothed, grey, tmp_path: Path, mode, change, says
) -> None:
    (result,) = certify([smoothed(8)], grey, Sampling(mode, draws=2000), out=tmp_path, quiet=True).results
    cell, store = Cell(result.identity, result.labels), CellStore(tmp_path / check.FOLDER)
    arrays = store.read(cell, 0)
    store.write(cell, 0, arrays | change(arrays))
    with pytest.raises(BadInput, match=says):
        frame_of(store.result(cell))
    with pytest.raises(BadInput, match=says):
        check.clashes([], tmp_path)


@pytest.mark.parametrize("name", ["digits", "table1-cpu"])
def test_what_is_committed_follows_from_its_draws(name: str) -> None:
    folder = opened(Path(__file__).parents[2] / f"results/{name}.zip").folder
    found = load_results(folder / check.FOLDER, folder / "settle" / check.FOLDER)
    assert found
    for result in found:
        check.check_record(result)
