"""Reading and writing of certificates, what they add up to, and the comparison with a table of reference."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from rush_bench.certificates.tsv import COLUMNS, read_folder, read_tsv, six_columns
from rush_bench.errors import BadInput
from rush_bench.report import certificates as report

HEAD = "\t".join(COLUMNS)
# In the form of Cohen's logs, made up: 0.25 is certified at exactly 0.25 because radii are rounded.
SMALL = [(0, 3, 3, 0.25, 1), (20, 8, 8, 0.1, 1), (40, 8, 1, 0.3, 0), (60, 0, -1, 0.0, 0), (80, 6, 6, 0.951, 1)]
LARGE = [(0, 3, 3, 0.48, 1), (20, 8, -1, 0.0, 0), (40, 8, 8, 0.62, 1), (60, 0, -1, 0.0, 0), (80, 6, 6, 1.91, 1)]


def text(rows) -> str:
    return "\n".join([HEAD, *("\t".join(map(str, (*row, "0:00:14.114881"))) for row in rows)]) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sigma_0.25.tsv").write_text(text(SMALL))
    (tmp_path / "sigma_0.50.tsv").write_text(text(LARGE))
    return tmp_path


def test_numbers_of_one_file(folder: Path) -> None:
    frame = read_tsv(folder / "sigma_0.25.tsv")
    assert report.certified_accuracy(frame, [0, 0.1, 0.25, 0.2501, 1]).tolist() == [0.6, 0.6, 0.4, 0.2, 0]
    assert report.average_radius(frame) == pytest.approx((0.25 + 0.1 + 0.951) / 5)
    found = report.summary(frame, [0.25])
    assert (found["n"], found["abstained"]) == (5, 1)
    assert found["certified"][0]["low"] < 0.4 < found["certified"][0]["high"]


@pytest.mark.parametrize("mode", ["fixed", "staged", "target"])
def test_only_a_mode_that_settles_every_radius_has_an_acr(folder: Path, mode: str) -> None:
    frame = read_tsv(folder / "sigma_0.25.tsv").assign(mode=mode)
    found = report.table({"set": frame}, [0.25])
    row = dict(zip(found.whole.columns, found.whole.cells[0], strict=True))
    assert (row["ACR"] == "–") == row["r=0.25"].startswith("≥") == (mode != "fixed")
    assert any("lower bound" in note for _, note in found.whole.notes) == (mode != "fixed")
    assert (report.summary(frame, [0.25])["acr"] is None) == (mode != "fixed")


def test_a_table_of_best_models_is_reproduced_and_a_difference_told(folder: Path) -> None:
    reference = folder.parent / "reference.tsv"
    lines = ["radius\tbest_cert_accuracy\tbest_model", "0.000\t0.6\ta/noise_0.25", "0.250\t0.6\ta/noise_0.50"]
    reference.write_text("\n".join([*lines, "1.000\t0.2\ta/noise_0.50"]))
    assert report.compare(read_folder([folder]), reference)["same"].tolist() == [True, True, True]
    reference.write_text("\n".join([*lines, "1.000\t0.3\ta/noise_0.50"]))
    assert report.compare(read_folder([folder]), reference)["same"].tolist() == [True, True, False]
    reference.write_text("\n".join([*lines, "1.000\t0.2\ta/noise_0.25"]))
    assert report.compare(read_folder([folder]), reference)["same"].tolist() == [True, True, False]
    reference.write_text("a\tb\n1\t2\n")
    with pytest.raises(BadInput, match="no column radius, best_cert_accuracy, best_model"):
        report.compare(read_folder([folder]), reference)


def test_six_columns_round_as_cohens_and_read_back(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "idx": [0, 1, 2],
            "label": [3, 8, 8],
            "predict": [3, -1, 1],
            "radius": [1.9057282, 0.0, 0.0012345],
            "correct": [1, 0, 0],
            "time": ["0:00:14.114881"] * 3,
            "bound": [0.9, 0.1, 0.6],
        }
    )
    written = six_columns(frame)
    assert written.splitlines()[0] == HEAD
    assert [line.split("\t")[3] for line in written.splitlines()[1:]] == ["1.91", "0.0", "0.00123"]
    (tmp_path / "x.tsv").write_text(written)
    read = read_tsv(tmp_path / "x.tsv")
    assert six_columns(read) == written
    assert read["radius"][0] > frame["radius"][0]  # why our own numbers do not come from these columns


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("idx\tlabel\tpredict\tbasePredict\tcorrect\ttime\n0\t3\t3\t3\t1\t0:0\n", "predictions, not certificates"),
        (HEAD + "\n", "holds no images"),
        (text([(0, 3, 3, "wide", 1)]), "line 2: a value is missing"),
        (text([SMALL[0], (20, 8, 8, float("nan"), 1)]), "line 3: a value is missing"),
        (text([SMALL[0], SMALL[0]]), "line 3: the image is there twice"),
        (text([(0, 3, 3, -0.1, 1)]), "radius is below 0"),
        (text([(0, 3, 4, 0.1, 1)]), "correct is not"),
        (text([(0, 3, -1, 0.1, 0)]), "an abstention has a radius"),
        (text([(0, 3, -2, 0.1, 0)]), "predict is below -1"),
        (text([(0.5, 3, 3, 0.1, 1)]), "not whole"),
        ("", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "wrong.tsv").write_text(content)
    with pytest.raises(BadInput, match=says) as error:
        read_tsv(tmp_path / "wrong.tsv")
    assert "wrong.tsv" in str(error.value)


def test_a_place_without_certificates_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no \.tsv file"):
        read_folder([tmp_path])
    with pytest.raises(BadInput, match="cannot be read"):
        read_folder([tmp_path / "missing.tsv"])


def test_table_and_curve(folder: Path) -> None:
    sets = read_folder([folder])
    assert list(sets) == ["sigma_0.25.tsv", "sigma_0.50.tsv"]
    table = report.table(sets, [0, 0.25])
    exact = binomtest(2, 5).proportion_ci(0.95)
    assert table.frame["abstained"].tolist() == [1, 2] and table.frame["r=0.25"].tolist() == [40, 60]
    assert table.frame.loc[0, ["r=0.25_low", "r=0.25_high"]].tolist() == pytest.approx([100 * exact.low, 100 * exact.high])
    assert [line[-1] for line in table.whole.cells] == ["40.0 [5.3, 85.3]", "60.0 [14.7, 94.7]"]
    path = report.figure({**sets, "none": sets["sigma_0.25.tsv"].assign(correct=0)}, folder / "curve.png", "l2")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("radii", "columns"),
    [
        ((0, 0.25, 0.5, 0.25), ["r=0", "r=0.25", "r=0.5"]),
        ((0.1, 0.10004), ["r=0.1", "r=0.10004"]),
        ((0.25, 0.25 + 1e-9), ["r=0.25", "r=0.250000001"]),
        ((0.25, np.nextafter(0.25, 1)), ["r=0.25", "r=0.2500000000000001"]),
    ],
)
def test_each_radius_has_a_column(folder: Path, radii: tuple[float, ...], columns: list[str]) -> None:
    sets = read_folder([folder / "sigma_0.25.tsv"])
    shown = report.table(sets, radii)
    assert [column for column in shown.whole.columns if column.startswith("r=")] == columns
    expected = {
        column: 100 * report.certified_accuracy(sets["sigma_0.25.tsv"], radius)[0]
        for column, radius in zip(columns, radii, strict=False)
    }
    assert shown.frame[columns].iloc[0].to_dict() == expected


def test_the_curve_is_the_certified_accuracy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[np.ndarray] = []
    holds: list[str] = []
    monkeypatch.setattr(Axes, "step", lambda self, x, y, where, **_: drawn.append(np.array([x, y])) or holds.append(where))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    sets = read_folder([folder / "sigma_0.50.tsv"])
    report.figure(sets, folder / "curve.png")
    x, y = drawn[0]
    assert holds == ["post"]
    for radius in (0.0, 0.3, 0.5, 0.62, 0.7, 1.9, 2.0):
        at = max(np.searchsorted(x, radius, side="left") - 1, 0)  # where="post": a value holds from its x on
        assert y[at] == pytest.approx(100 * report.certified_accuracy(sets["sigma_0.50.tsv"], radius)[0]), radius
