"""mCE by hand, intervals that cover, and the files of the table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rush_bench.errors import BadInput
from rush_bench.records import FORMAT, Cell, CellResult, CellStore
from rush_bench.report.corruptions import ce, lay_out, table, with_earlier, write

SIZE = 40


def _cells(folder: Path, name: str, right: dict[str, tuple[int, ...]], votes: int = 0, leave_out: int = 0) -> list[CellResult]:
    """Finished cells of a defence that gets the first `right[corruption][severity - 1]` images right, whatever the draw."""
    store, found = CellStore(folder / "corruptions"), []
    repeats = 4 if votes else 1
    for corruption, counts in right.items():
        for severity, count in enumerate(counts, 1):
            identity = {"format": FORMAT, "weights": name, "defense": {"votes": votes}, "threat": None, "images": "x"}
            identity |= {"attack": {"name": "corruption", "corruption": corruption, "severity": severity}}
            labels = {"defense": name, "dataset": "cifar10", "attack": "corruption", "suite": "corruptions", "n": SIZE}
            labels |= {"corruption": corruption, "severity": severity, "deterministic": votes == 0}
            cell = Cell(identity | {"seed": 0, "repeats": repeats, "chunk": SIZE}, labels)
            store.open(cell)
            if severity > 5 - leave_out:
                found.append(store.result(cell))
                continue
            correct = repeats * (np.arange(SIZE) < count)
            arrays = {key: np.zeros(SIZE) for key in ("margin", "distance", "forwards", "backwards", "seconds")}
            arrays |= {"index": np.arange(SIZE)[::-1] if severity == 2 else np.arange(SIZE), "label": np.zeros(SIZE, int)}
            correct = correct[arrays["index"]]
            arrays |= {"correct": correct, "repeats": np.full(SIZE, repeats)}
            store.write(cell, 0, arrays | {"counts": np.stack([correct, repeats - correct], axis=1)})
            found.append(store.result(cell))
    return found


def test_mce_is_the_mean_of_ratios_of_summed_errors(tmp_path: Path) -> None:
    cells = _cells(tmp_path, "mine", {"fog": (40, 36, 32, 28, 24), "snow": (20, 20, 20, 20, 20)}, votes=64)
    cells += _cells(tmp_path, "base", {"fog": (36, 32, 24, 16, 12), "snow": (30, 30, 20, 20, 0)})
    frame = table(cells, "base").set_index(["defense", "corruption"])
    fog, snow = 40 / 80, 100 / 100  # errors over the severities: (0+4+8+12+16) of (4+8+16+24+28), (5*20) of (10+10+20+20+40)
    assert frame.loc[("mine", "fog"), "ce"] == pytest.approx(100 * fog)
    assert frame.loc[("mine", "snow"), "ce"] == pytest.approx(100 * snow)
    assert frame.loc[("mine", "mean"), "ce"] == pytest.approx(100 * (fog + snow) / 2)
    assert frame.loc["base"][["ce", "ce_low", "ce_high"]].to_numpy() == pytest.approx(100)  # of itself, whatever is drawn
    assert frame.loc[("mine", "fog"), "accuracy"] == pytest.approx(80)
    assert frame.loc[("mine", "mean"), "accuracy"] == pytest.approx(65)
    assert frame.loc[("mine", "fog"), [f"severity_{s}" for s in range(1, 6)]].tolist() == pytest.approx([100, 90, 80, 70, 60])
    assert frame.loc[("mine", "mean"), "severity_1"] == pytest.approx(75)
    low, high = frame.loc[("mine", "mean"), ["ce_low", "ce_high"]]
    assert low < 75 < high
    assert (frame["accuracy_low"] < frame["accuracy"]).all() and (frame["accuracy"] < frame["accuracy_high"]).all()
    assert frame["K"].tolist() == [4] * 3 + [1] * 3 and set(frame["n"]) == {SIZE}


def test_without_a_reference_mce_is_a_dash(tmp_path: Path) -> None:
    frame = table(_cells(tmp_path, "mine", {"fog": (40, 36, 32, 28, 24)}))
    assert frame["ce"].isna().all()
    header, body = lay_out(frame)
    assert header == ["corruption", "mine"] and [row[0] for row in body] == ["fog", "mean", "mCE"]
    assert body[-1] == ["mCE", "–"] and body[0][1].startswith("80.0 [")


def test_unfinished_severities_leave_their_corruption_and_the_mean_out(tmp_path: Path) -> None:
    cells = _cells(tmp_path, "mine", {"fog": (40,) * 5}) + _cells(tmp_path, "mine", {"snow": (20,) * 5}, leave_out=1)
    frame = table(cells).set_index("corruption")
    assert frame.loc["fog", "accuracy"] == 100 and np.isnan(frame.loc["snow", "accuracy"])
    assert np.isnan(frame.loc["mean", "accuracy"])
    both = table(cells + _cells(tmp_path, "base", {"fog": (20,) * 5, "snow": (10,) * 5}), "base").set_index("corruption")
    assert both["ce"].isna().tolist() == [False, True, True, False, False, False]


def test_a_reference_without_errors_gives_no_mce(tmp_path: Path) -> None:
    cells = _cells(tmp_path, "mine", {"fog": (20,) * 5}) + _cells(tmp_path, "base", {"fog": (40,) * 5})
    assert table(cells, "base")["ce"].isna().all()
    with pytest.raises(BadInput, match="'other' was not measured; there is mine, base"):
        table(cells, "other")


def test_the_interval_of_mce_covers() -> None:
    """Errors of known chances, paired by a shared difficulty: 95 % of intervals hold the true ratio."""
    rng, truth, held = np.random.default_rng(0), (0.2 / 0.4 + 0.3 / 0.6) / 2, 0
    for trial in range(100):
        shared = rng.random((200, 1, 1))
        mine = (shared < np.array([[0.2], [0.3]])).mean(2) * np.ones((200, 2))
        other = (shared < np.array([[0.4], [0.6]])).mean(2) * np.ones((200, 2))
        found = ce(mine, other, samples=300, seed=trial)[-1]
        held += found.low <= truth <= found.high
    assert 88 <= held <= 99  # 95 +- 3 standard deviations of 2.2


def test_ce_of_other_images_is_refused() -> None:
    with pytest.raises(BadInput, match=r"not \(4, 2\) and \(5, 2\)"):
        ce(np.ones((4, 2)), np.ones((5, 2)))


def test_a_later_run_keeps_what_others_left(tmp_path: Path) -> None:
    five = (20,) * 5
    earlier = _cells(tmp_path, "before", {"fog": (40,) * 5, "snow": five, "rain": five})
    other_images = [replace(cell, identity={**cell.identity, "images": "y"}) for cell in earlier]
    other_images = [replace(cell, labels={**cell.labels, "defense": "elsewhere"}) for cell in other_images]
    unfinished = _cells(tmp_path, "half", {"fog": five, "snow": five}, leave_out=1)
    without_snow = _cells(tmp_path, "fog alone", {"fog": five})
    run = _cells(tmp_path, "now", {"fog": (30,) * 5, "snow": five})
    more_draws = _cells(tmp_path, "now", {"fog": (10,) * 5, "snow": five}, votes=64)
    frame = table(with_earlier(run, [*other_images, *earlier, *unfinished, *without_snow, *run, *more_draws]), "now")
    assert list(dict.fromkeys(frame["defense"])) == ["now", "before", "now (now, K=4, seed 0)"]
    assert frame[frame["corruption"] == "fog"]["accuracy"].tolist() == [75, 100, 25]
    assert frame[frame["corruption"] == "fog"]["ce"].tolist() == pytest.approx([100, 0, 300])
    assert set(frame["corruption"]) == {"fog", "snow", "mean"}


def test_files(tmp_path: Path) -> None:
    cells = _cells(tmp_path, "mine", {"fog": (40, 36, 32, 28, 24)}) + _cells(tmp_path, "base", {"fog": (20,) * 5})
    frame = table(cells, "base")
    csv, markdown = write(frame, tmp_path / "out" / "cifar10-set15")
    assert pd.read_csv(csv)["accuracy"].tolist() == [80.0, 80.0, 50.0, 50.0]
    lines = markdown.read_text().splitlines()
    assert lines[0] == "| corruption | mine | base |" and lines[4].startswith("| mCE | 40.0 [")
    assert "relative to base" in lines[-1] and "40 images" in lines[-1]
