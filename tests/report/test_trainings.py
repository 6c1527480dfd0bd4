"""Several trainings of one system: the row of their mean by hand, every seed in the CSV, and what is never pooled."""

import numpy as np
import pandas as pd
import pytest

import rush_bench as rb
from rush_bench.errors import BadInput
from rush_bench.records.statistics import any_of_k, clopper_pearson, interval, paired_difference
from rush_bench.report.table import of_frame
from rush_bench.report.tables import table
from rush_bench.report.trainings import Training
from rush_bench.report.writers import to_csv

SEEDS = {0: np.arange(20) % 17, 1: np.arange(20) % 13, 2: np.arange(20) % 5}  # right of 16, an entry an image


def measure(lab, which: int, votes: int = 64, **more) -> None:
    name = "rush-c10" + (f"-s{which}" if which else "")
    how = {"votes": votes, "weights": name, "sha256": name, "recipe": "rush", "repeats": 16 if votes else 1} | more
    right = SEEDS[which] if votes else SEEDS[which] > 5
    lab.cell(f"{name}@{votes}" if votes else name, "clean", np.full(20, how["repeats"]), **how)
    first = lab.cell(f"{name}@{votes}" if votes else name, "pgd", right.astype(int), **how)
    lab.cell(f"{name}@{votes}" if votes else name, "worst", right.astype(int), of=[first], **how)


def trainings(system: str = "a system") -> dict[tuple[str, str], Training]:
    names = {seed: "rush-c10" + (f"-s{seed}" if seed else "") for seed in SEEDS}
    return {(name, "rush"): Training(system, seed, 4.6e6, 45_000.0, 60.0 + seed) for seed, name in names.items()}


@pytest.mark.parametrize("style", ["plain", "paper"])
def test_the_mean_is_a_row_and_every_seed_is_kept(lab, style, tmp_path):
    for seed in SEEDS:
        measure(lab, seed)
    frame = table(lab.results(), style, trainings())
    shown, prefix = frame[frame["in_mean"].ne(True) & frame["n"].notna()], "" if style == "plain" else "measured_"
    (mean,), each = shown.to_dict("records"), frame[frame["in_mean"].eq(True)]
    right = sum(SEEDS.values())
    expected = interval(right, np.full(20, 48), deterministic=False)
    assert [mean[f"{prefix}pgd{end}"] for end in ("", "_low", "_high")] == pytest.approx([100 * x for x in expected])
    rates = [100 * one.mean() / 16 for one in SEEDS.values()]
    assert mean[f"{prefix}pgd"] == pytest.approx(np.mean(rates)) and mean[f"{prefix}pgd_sd"] == pytest.approx(
        np.std(rates, ddof=1)
    )
    assert mean["training_seeds"] == "0,1,2" and mean["training_passes"] == 4.6e6 and mean["training_seconds"] == 61
    assert sorted(each[f"{prefix}pgd"]) == pytest.approx(sorted(rates)) and set(each["training_seeds"]) == {"0", "1", "2"}
    if style == "plain":
        rate = 1 - np.mean([any_of_k(one, np.full(20, 16), 10) for one in SEEDS.values()], axis=0)
        assert mean["worst_any10"] == pytest.approx(100 * rate.mean())
        assert mean["worst_any10_low"] == pytest.approx(100 * clopper_pearson(rate.sum(), 20)[0])
    text = of_frame(frame).to_markdown()
    assert f"± {mean[f'{prefix}pgd_sd']:.1f} [" in text and "4.6 M" in text and "standard deviation over trainings" in text
    assert "rush-c10-s1" not in text
    to_csv(frame, tmp_path / "table.csv")
    kept = pd.read_csv(tmp_path / "table.csv")
    assert kept[f"{prefix}pgd"].notna().sum() == 4


def test_deterministic_trainings_are_images_of_several_tries(lab):
    for seed in (0, 1):
        measure(lab, seed, votes=0)
    frame = table(lab.results(), trainings=trainings())
    (mean,) = frame[~frame["in_mean"]].to_dict("records")
    right = (SEEDS[0] > 5).astype(int) + (SEEDS[1] > 5)
    assert mean["pgd"] == pytest.approx(100 * right.mean() / 2)
    assert mean["pgd_low"] == pytest.approx(100 * interval(right, np.full(20, 2), deterministic=False)[1])


@pytest.mark.parametrize(
    "other", [{"settings": {"steps": 3}}, {"suite": "linf4"}, {"seed": 5}, {"votes": 1}, {"eps": 4 / 255}], ids=str
)
def test_what_was_measured_otherwise_is_never_pooled(lab, other):
    measure(lab, 0)
    measure(lab, 1, **other)
    frame = table(lab.results(), trainings=trainings())
    assert "in_mean" not in frame and not frame["training_seeds"].str.contains(",").any()


def test_other_systems_or_one_seed_twice_are_never_pooled(lab):
    for seed in (0, 1):
        measure(lab, seed)
    known = trainings()
    assert "in_mean" not in table(lab.results(), trainings=known | {("rush-c10-s1", "rush"): Training("another", 1)})
    assert "in_mean" not in table(lab.results(), trainings=known | {("rush-c10-s1", "rush"): Training("a system", 0)})
    assert "training_passes" not in table(lab.results())


def test_the_same_weights_of_another_recipe_are_another_training(lab):
    """A purifier stands before the network of standard training, say: what the network cost is not what it cost."""
    lab.cell("bare", "clean", np.full(20, 16), weights="w", sha256="w", recipe="standard", votes=64, repeats=16)
    lab.cell("purified", "clean", np.full(20, 16), weights="w", sha256="w", recipe="purify", votes=64, repeats=16)
    frame = table(lab.results(), trainings={("w", "standard"): Training("a system", 0, 7.0)}).set_index("defense")
    assert frame.loc["bare", "training_passes"] == 7.0 and np.isnan(frame.loc["purified", "training_passes"])


def test_unfinished_columns_of_one_seed_are_no_mean(lab):
    measure(lab, 0)
    name = {"votes": 64, "weights": "rush-c10-s1", "sha256": "rush-c10-s1", "recipe": "rush", "repeats": 16}
    lab.cell("rush-c10-s1@64", "clean", np.full(20, 16), **name)
    first = lab.cell("rush-c10-s1@64", "pgd", SEEDS[1], chunks_done=1, **name)
    lab.cell("rush-c10-s1@64", "worst", SEEDS[1], of=[first], **name)
    frame = table(lab.results(), trainings=trainings())
    (mean,) = frame[~frame["in_mean"]].to_dict("records")
    assert np.isnan(mean["pgd"]) and np.isnan(mean["pgd_sd"]) and not np.isnan(mean["worst"])
    assert "pgd: 1 of 2 chunks" in mean["notes"]


@pytest.fixture
def known(monkeypatch):
    """Cards say what `trainings` says, and that `plain` and `plain-s1` are two seeds of another system."""
    cards = trainings() | {(name, "plain"): Training("plain", seed) for seed, name in enumerate(("plain", "plain-s1"))}
    monkeypatch.setattr("rush_bench.api.compare.trainings_of", lambda *_: cards)
    return cards


def beside(lab, name: str, right, **more):
    how = {"votes": 64, "weights": name, "sha256": name, "recipe": "plain", "repeats": 8} | more
    lab.cell(f"{name}@64", "pgd", right, **how)


def test_means_over_seeds_are_compared_by_image(lab, known):
    for seed in SEEDS:
        measure(lab, seed)
    others = [np.arange(20) % 7, np.arange(20) % 9]
    beside(lab, "plain", others[0])
    beside(lab, "plain-s1", others[1])
    shown = rb.compare("rush-c10@64", "plain@64", lab.results(), seeds=True)
    (row,) = shown.frame.to_dict("records")
    rates = [np.stack(list(SEEDS.values())) / 16, np.stack(others) / 8]  # (trainings, images)
    difference = 100 * (rates[0].mean(0) - rates[1].mean(0))
    assert row["difference"] == pytest.approx(difference.mean())
    expected = paired_difference(sum(SEEDS.values()), 48, sum(others), 16)
    assert [row[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx([100 * x for x in expected])
    spreads = [100 * rate.mean(1).std(ddof=1) for rate in rates]
    assert [row["first_sd"], row["second_sd"], row["difference_sd"]] == pytest.approx([*spreads, np.hypot(*spreads)])
    assert (row["first"], row["second"]) == pytest.approx([100 * rate.mean() for rate in rates])
    assert (row["first_trainings"], row["second_trainings"], row["n"]) == (3, 2, 20)
    text = shown.to_markdown()
    assert f"{row['second']:.1f} ± {spreads[1]:.1f} |" in text and "| 3, 2 |" in text and "for these trainings" in text
    alone = rb.compare("rush-c10@64", "plain@64", lab.results())
    assert "first_sd" not in alone.frame and "±" not in alone.to_markdown()
    assert alone.frame.loc[0, "first"] == pytest.approx(100 * rates[0][0].mean())
    backwards = rb.compare("plain-s1@64", "rush-c10-s2@64", lab.results(), seeds=True)  # whichever names them
    assert backwards.frame.loc[0, "difference"] == pytest.approx(-difference.mean())


@pytest.mark.parametrize(
    "other", [{"settings": {"steps": 3}}, {"suite": "linf4"}, {"seed": 5}, {"votes": 1}, {"repeats": 4}, {"n": 10}], ids=str
)
def test_a_seed_measured_otherwise_is_not_compared(lab, known, other):
    measure(lab, 0)
    beside(lab, "plain", np.arange(20) % 7)
    beside(lab, "plain-s1", np.arange(other.get("n", 20)) % 4, **{key: value for key, value in other.items() if key != "n"})
    with pytest.raises(BadInput, match=r"no other seed of rush-c10@64 or plain@64 was measured alike.*leave seeds out"):
        rb.compare("rush-c10@64", "plain@64", lab.results(), seeds=True)


def test_more_predictions_of_one_training_do_not_take_the_place_of_several(lab, known):
    measure(lab, 0)
    beside(lab, "plain", np.arange(20) % 7)
    beside(lab, "plain-s1", np.arange(20) % 9)
    beside(lab, "plain", np.arange(20) % 17, repeats=16)
    (row,) = rb.compare("rush-c10@64", "plain@64", lab.results(), seeds=True).frame.to_dict("records")
    both = (np.arange(20) % 7 + np.arange(20) % 9).mean() / 16
    assert (row["second_trainings"], row["second"]) == (2, pytest.approx(100 * both))
    (alone,) = rb.compare("rush-c10@64", "plain@64", lab.results()).frame.to_dict("records")
    assert alone["second"] == pytest.approx(100 * (np.arange(20) % 17).mean() / 16)


def test_comparisons_over_seeds_that_mean_nothing_are_refused(lab, known):
    for seed in (0, 1):
        measure(lab, seed)
    beside(lab, "plain", np.arange(20) % 7)
    with pytest.raises(BadInput, match="trainings of one system"):
        rb.compare("rush-c10@64", "rush-c10-s1@64", lab.results(), seeds=True)
    with pytest.raises(BadInput, match="store would have no effect"):
        rb.compare("rush-c10@64", "plain@64", lab.results(), store="models")
    known["rush-c10-s1", "rush"] = known["rush-c10", "rush"]
    with pytest.raises(BadInput, match="rush-c10-s1@64, rush-c10@64: a seed was trained twice"):
        rb.compare("rush-c10@64", "plain@64", lab.results(), seeds=True)
    assert rb.compare("plain@64", "plain@64", lab.results()).frame["difference"].tolist() == [0]
