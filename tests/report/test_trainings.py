"""Several trainings of one system: the row of their mean by hand, every seed in the CSV, and what is never pooled."""

import numpy as np
import pandas as pd
import pytest

from rush_bench.records.statistics import any_of_k, clopper_pearson, interval
from rush_bench.report.tables import table
from rush_bench.report.trainings import Training
from rush_bench.report.writers import to_csv, to_markdown

SEEDS = {0: np.arange(20) % 17, 1: np.arange(20) % 13, 2: np.arange(20) % 5}  # right of 16, an entry an image


def measure(lab, which: int, votes: int = 64, **more) -> None:
    name = "rush-c10" + (f"-s{which}" if which else "")
    how = {"votes": votes, "weights": name, "sha256": name, "recipe": "rush", "repeats": 16 if votes else 1} | more
    right = SEEDS[which] if votes else SEEDS[which] > 5
    lab.cell(f"{name}@{votes}" if votes else name, "clean", np.full(20, how["repeats"]), **how)
    first = lab.cell(f"{name}@{votes}" if votes else name, "pgd", right.astype(int), **how)
    lab.cell(f"{name}@{votes}" if votes else name, "worst", right.astype(int), of=[first], **how)


def trainings(system: str = "a system") -> dict[str, Training]:
    names = {seed: "rush-c10" + (f"-s{seed}" if seed else "") for seed in SEEDS}
    return {name: Training(system, seed, 4.6e6, 45_000.0, 60.0 + seed) for seed, name in names.items()}


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
    text = to_markdown(frame)
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
    assert "in_mean" not in table(lab.results(), trainings=known | {"rush-c10-s1": Training("another", 1)})
    assert "in_mean" not in table(lab.results(), trainings=known | {"rush-c10-s1": Training("a system", 0)})
    assert "training_passes" not in table(lab.results())


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
