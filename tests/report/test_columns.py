"""Columns: one row each, and one for an attack that nobody foresaw."""

import pytest

from rush_bench.report.columns import COLUMNS, header_of
from rush_bench.report.filters import ordered
from rush_bench.report.table import of_frame
from rush_bench.report.tables import table


def test_an_attack_that_no_row_names_has_a_column_in_both_styles(lab) -> None:
    lab.cell("acl-cifar10", "clean", [1] * 9 + [0])
    lab.cell("acl-cifar10", "pgd", [1] * 6 + [0] * 4)
    lab.cell("acl-cifar10", "my_fgsm", [1] * 7 + [0] * 3, bank=[1] * 5 + [0] * 5)
    plain, paper = table(lab.results()), table(lab.results(), "paper")
    assert plain["my_fgsm"].tolist() == [70.0] and plain["my_fgsm_bank"].tolist() == [50.0]
    names = list(plain)
    assert names.index("square") < names.index("my_fgsm") < names.index("worst")
    assert paper["measured_my_fgsm"].dropna().tolist() == [70.0]
    for frame in (plain, paper):
        text = of_frame(frame).to_markdown()
        assert " my\\_fgsm |" in text and "70.0 [" in text and "my\\_fgsm on bank" in text


def test_a_doubtful_attack_bounds_all_its_columns_and_no_other(lab, monkeypatch) -> None:
    monkeypatch.setattr("rush_bench.report.rows.gradient_caveat", lambda cell: "broken" * (cell.labels["attack"] == "my_fgsm"))
    lab.cell("acl-cifar10", "pgd", [1] * 6 + [0] * 4)
    lab.cell("acl-cifar10", "my_fgsm", [1] * 7 + [0] * 3, bank=[1] * 5 + [0] * 5)
    assert table(lab.results())["upper_bounds"].tolist() == ["my_fgsm,my_fgsm_bank"]


def test_without_such_an_attack_there_is_no_such_column(lab) -> None:
    lab.cell("acl-cifar10", "pgd", [1] * 6 + [0] * 4)
    frame = table(lab.results())
    shown = [name for name in frame if f"{name}_low" in frame]
    assert shown == [column.name for column in COLUMNS if column.plain]


def test_the_paper_style_is_sorted_within_its_blocks(lab) -> None:
    for name, right in (("acl-cifar10", 4), ("own", 6), ("better", 9)):
        lab.cell(name, "pgd", [1] * right + [0] * (10 - right))
    frame = table(lab.results(), "paper")
    by = ordered(frame, "-measured_pgd")
    assert by["block"].tolist() == frame["block"].tolist() and len(by) == len(frame)
    assert by["measured_as"].dropna().tolist() == ["better", "own", "acl-cifar10"]
    assert len(of_frame(by).whole.blocks) == frame["block"].nunique()


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("clean", "Clean"),
        ("measured_standard", "Standard"),
        ("measured_aa_fresh", "AA on fresh draws"),
        ("x_bank", "x on bank"),
    ],
)
def test_headers(name: str, header: str) -> None:
    assert header_of(name) == header
