"""The digits verdict: prediction logs of another project become a line, and an audit a row."""

from types import SimpleNamespace

import pytest

from rush_bench.records.statistics import Estimate, clopper_pearson


@pytest.fixture(scope="module")
def digits(script):
    return script("verdict_digits")


def test_logs_become_a_line_in_order_of_draws(digits, tmp_path):
    for draws, right in ((16, 3), (1, 7), (4, 5)):
        rows = [f"{k}\t0\t0\t0\t{int(k < right)}\t0:00:01" for k in range(10)]
        text = "\n".join(["idx\tlabel\tpredict\tbasePredict\tcorrect\ttime", *rows])
        (tmp_path / f"PGD_eps0.750_m{draws}.tsv").write_text(text)
    line = digits.reference(tmp_path)
    assert [at for at, _ in line.points] == [1, 4, 16] and "n=10" in line.name
    assert [tuple(found) for _, found in line.points] == [(k / 10, *clopper_pearson(k, 10)) for k in (7, 5, 3)]


def test_a_folder_without_logs_ends_it(digits, tmp_path):
    with pytest.raises(SystemExit, match=r"has no PGD_eps"):
        digits.reference(tmp_path)


def test_a_row_a_verdict(digits):
    clean = SimpleNamespace(estimate=Estimate(0.9, 0.8, 1.0))
    said = {
        "word": "refuted",
        "claim": {"value": 0.7, "source": "replayed"},
        "rule": 2,
        "decided_by": ["worst case", "random-noise"],
    }
    audit = {"defense": "rush@64", "verdict": said | {"worst": {"value": 0.2, "low": 0.1, "high": 0.3}}}
    (row,) = digits.verdicts([audit], [SimpleNamespace(subject="rush@64", clean=clean)])
    assert row == [
        "rush@64",
        "90.0 [80.0, 100.0]",
        "70.0 (replayed)",
        "20.0 [10.0, 30.0]",
        "refuted",
        "2",
        "worst case, random-noise",
    ]
    with pytest.raises(SystemExit, match="no verdict"):
        digits.verdicts([{"defense": "rush@64", "verdict": None}], [SimpleNamespace(subject="rush@64", clean=clean)])


def test_a_store_of_the_named_alone(digits, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "card.json").write_text(name)
    (tmp_path / "some").mkdir()
    assert [path.name for path in digits.only(tmp_path / "all", ["b"], tmp_path / "some").iterdir()] == ["b"]
