"""Tables of settle: every number is the record's, differences are paired, and what is not finished says so."""

import numpy as np
import pandas as pd
import pytest

from rush_bench.records.published import published
from rush_bench.records.statistics import Estimate, any_of_k, interval, paired_difference
from rush_bench.report import settle

RNG = np.random.default_rng(0)
RIGHT = {name: RNG.integers(0, 5, 20) for name in "abcdef"}  # of 4 predictions
FOUR = np.full(20, 4)
WATERFALL = (
    ("T15", "torchattacks' own PGDRS", "pgd", RIGHT["f"], {}),
    ("T15", "AA as published", "aa-published", RIGHT["a"], {}),
    ("T15", "never the clean image back", "aa-published", RIGHT["b"], {}),
    ("T15", "PGD as published", "pgd-published", RIGHT["c"], {}),
    ("T15", "fresh noise at every step", "pgd-published", RIGHT["d"], {}),
    ("T15", "worst case over all", "worst", RIGHT["e"], {}),
)


def test_a_row_a_trial_with_its_interval(evidence):
    made = evidence(
        ("T10", "8 eps", "eot", RIGHT["b"], {"scale": 8.0}),
        ("T10", "0", "clean", RIGHT["a"], {}),
        ("T6", "bank of 16", "aa", RIGHT["c"], {"bank": [1, 0] * 10}),
        ("T1", "m=1", "eot", RIGHT["d"], {"chunks_done": 1}),
    )
    frame = settle.frame(made).set_index("trial")
    assert list(frame.index) == ["m=1", "bank of 16", "8 eps", "0"]
    assert frame.loc["8 eps", ["accuracy", "low", "high"]].tolist() == list(interval(RIGHT["b"], FOUR, False))
    assert frame.loc["8 eps", "eps"] == pytest.approx(64 / 255) and frame.loc["0", "eps"] == 0
    assert frame.loc["bank of 16", "bank"] == 0.5 and np.isnan(frame.loc["8 eps", "bank"])
    assert frame.loc["m=1", ["accuracy", "low", "high", "seconds"]].isna().all()
    assert frame["k"].tolist() == [4] * 4 and frame["n"].tolist() == [20] * 4


def test_differences_are_paired_and_begin_anew_at_each_replay(evidence):
    frame = settle.waterfall_frame(evidence(*WATERFALL))
    assert frame["bar"].tolist() == [trial[1] for trial in WATERFALL[1:]]  # the package's own runs are no correction
    assert frame["as_published"].tolist() == [True, False, True, False, False]
    assert frame["difference"].isna().tolist() == [True, False, True, False, False]
    for row, pair in ((1, "ba"), (3, "dc"), (4, "ed")):
        wanted = paired_difference(RIGHT[pair[0]], FOUR, RIGHT[pair[1]], FOUR)
        found = frame.loc[row, ["difference", "difference_low", "difference_high"]].tolist()
        assert found == list(wanted)
        assert found[0] == pytest.approx(frame.loc[row, "accuracy"] - frame.loc[row - 1, "accuracy"])


def test_an_unfinished_bar_has_no_difference_and_neither_has_the_next(evidence):
    trials = list(WATERFALL[3:])
    trials[1] = (*trials[1][:4], {"chunks_done": 1})
    made = evidence(*trials)
    frame = settle.waterfall_frame(made)
    assert frame["accuracy"].isna().tolist() == [False, True, False]
    assert frame["difference"].isna().all()
    text = settle.document(made)
    assert "| fresh noise at every step | 1 of 2 chunks | – |" in text and "not finished" in text
    assert "not finished" not in settle.document(evidence(*WATERFALL[3:], subject="other@64"))


def test_terminal_rows_name_every_experiment_with_its_reading(evidence):
    made = evidence(("T1", "m=1", "eot", RIGHT["a"], {}), ("T1", "m=4", "eot", RIGHT["b"], {"chunks_done": 0}), *WATERFALL)
    header, rows = settle.lay_out(made)
    assert {len(row) for row in rows} == {len(header)}
    names = [row[0] for row in rows]
    assert names[:3] == ["T1 draws of a gradient", "  m=1", "  m=4"] and names[3].startswith("T15 ")
    assert "that m is too small" in rows[0][2] and rows[2][1] == "0 of 2 chunks"
    assert rows[1][1] == settle.percent(interval(RIGHT["a"], FOUR, False))


def test_markdown_has_every_trial_once_and_the_change(evidence):
    made = evidence(("T7", "one | two", "square", RIGHT["a"], {}), *WATERFALL)
    text = settle.document(made)
    assert [text.count(f"| {trial[1]} |") for trial in WATERFALL] == [1] * len(WATERFALL)
    assert "one \\| two" in text
    step = settle.percent(paired_difference(RIGHT["b"], FOUR, RIGHT["a"], FOUR), signed=True)
    assert f"| {step} |" in next(line for line in text.splitlines() if line.startswith("| never"))
    assert text.count("Budget quick") == 1
    assert "Budget quick" not in settle.document(evidence(*WATERFALL, subject="other@64", budget="standard"))


@pytest.mark.parametrize(
    "about, beside",
    [
        ({}, True),
        ({"eps": 4 / 255}, False),
        ({"norm": "l2"}, False),
        ({"votes": 16}, False),
        ({"dataset": "digits"}, False),
        ({"recipe": "noise_sup"}, False),
    ],
)
def test_the_published_number_stands_only_beside_its_own_setting(evidence, about, beside):
    made = evidence(*WATERFALL, **{"votes": 64, "recipe": "rush", **about})
    row = settle.published_row(made)
    assert (row is not None) == beside
    assert ("Published for RUSH" in settle.document(made)) == beside
    if row is not None:
        assert row is published().table1[0] and settle.published_text(row) == "PGD 77.8, AA 79.5"


def test_any_of_k_where_there_are_so_many_predictions(evidence):
    right = RIGHT["a"] * 5
    made = evidence(("T11", "worst case over all", "worst", right, {"repeats": 20}))
    wanted = 1 - any_of_k(right, np.full(20, 20), 10).mean()
    (row,) = settle.frame(made).to_dict("records")
    assert row["any10"] == pytest.approx(wanted) and np.isnan(row["any100"])
    assert f"any of 10 {100 * wanted:.1f} [" in settle.further_scores(made.entries[0])


def test_percent():
    assert settle.percent(Estimate(0.1234, 0.1, 0.2)) == "12.3 [10.0, 20.0]"
    assert settle.percent(Estimate(-0.1234, -0.2, 0.0), signed=True) == "-12.3 [-20.0, +0.0]"
    assert settle.percent(Estimate(-0.0001, -0.0002, 0.0)) == "0.0 [0.0, 0.0]"


def test_files_are_the_same_each_time_and_none_is_made_of_nothing(evidence, tmp_path):
    finished, nothing = evidence(*WATERFALL), evidence(("T0", "random", "eot", RIGHT["a"], {"chunks_done": 0}), subject="a/b@1")
    short = evidence(("T1", "m=1", "eot", RIGHT["a"], {}), subject="cohen@64", norm="l2", eps=0.5)
    paths = settle.write([finished, nothing, short], tmp_path / "tables")
    assert [path.name for path in paths] == [
        "rush-cifar10@64-cifar10-linf8-quick.csv",
        "rush-cifar10@64-cifar10-linf8-quick.md",
        "rush-cifar10@64-cifar10-linf8-quick-waterfall.csv",
        "cohen@64-cifar10-l2-0.5-quick.csv",
        "cohen@64-cifar10-l2-0.5-quick.md",
    ]
    assert settle.stem(nothing) == "a_b@1-cifar10-linf8-quick"
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in settle.write([finished, nothing, short], tmp_path / "tables")] == first
    back = pd.read_csv(paths[2])
    assert np.allclose(back["difference"], settle.waterfall_frame(finished)["difference"], atol=1e-5, equal_nan=True)


def test_plain_is_json_able(evidence):
    import json

    made = settle.plain(evidence(*WATERFALL[:2], ("T1", "m=1", "eot", RIGHT["a"], {"chunks_done": 1})))
    trials = {trial["trial"]: trial for trial in json.loads(json.dumps(made))["trials"]}
    assert trials["m=1"]["accuracy"] is None
    assert trials["AA as published"]["accuracy"] == pytest.approx((RIGHT["a"] / 4).mean())
