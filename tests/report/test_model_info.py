"""RobustBench's model_info: what we write of a row, and what we take a claim from."""

import json

import pytest
from click.testing import CliRunner

from rush_bench.cli import main
from rush_bench.errors import BadInput
from rush_bench.report.model_info import model_info, read_model_info, write_model_info
from rush_bench.report.rows import rows

# the keys of RobustBench/robustbench's files, all of which are texts, but for three
THEIRS = {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps"}
THEIRS |= {"clean_acc", "reported", "autoattack_acc"}


def measure(lab, suite: str = "linf8", **more: object) -> list:
    for attack, right in (
        ("clean", [1] * 10),
        ("aa", [1] * 6 + [0] * 4),
        ("pgd", [1] * 7 + [0] * 3),
        ("worst", [1] * 5 + [0] * 5),
    ):
        lab.cell("pgd_at-cifar10", attack, right, suite=suite, **more)
    return rows(lab.results())


def test_a_row_as_robustbench_has_it(lab) -> None:
    (row,) = measure(lab)
    info = json.loads(json.dumps(model_info(row)))
    assert info.keys() == THEIRS | {"rush_bench"}
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("100.00", "60.00", "8/255")
    own = info["rush_bench"]
    assert (own["worst_acc"], own["n"], own["suite"]) == ("50.00", 10, "linf8")
    worst = row.estimates["worst"]
    assert own["accuracies"]["worst"] == {"acc": "50.00", "low": f"{100 * worst.low:.2f}", "high": f"{100 * worst.high:.2f}"}
    assert info["additional_data"] is False and info["number_forward_passes"] == 1


def test_quick_suites_have_no_autoattack(lab) -> None:
    (row,) = measure(lab, suite="linf8-quick")
    info = model_info(row)
    assert info["autoattack_acc"] is None and info["rush_bench"]["worst_acc"] == "50.00"


def test_files_lie_where_robustbench_has_them(lab, tmp_path_factory) -> None:
    measure(lab)
    out = tmp_path_factory.mktemp("out")
    result = CliRunner().invoke(main, ["table", "--results", str(lab.folder), "--out", str(out), "--format", "csv,robustbench"])
    assert result.exit_code == 0, result.output
    (path,) = (out / "model_info").rglob("*.json")
    assert path.relative_to(out).as_posix() == "model_info/cifar10/Linf/pgd_at-cifar10-linf8-10.json"
    assert json.loads(path.read_text()) == model_info(rows(lab.results())[0])
    with pytest.raises(BadInput, match="no row has a worst case"):
        write_model_info([], out)


@pytest.mark.parametrize(
    ("differs", "suffixes"),
    [
        ([{"seed": 0}, {"seed": 1}], ["-seed0", "-seed1"]),
        ([{"repeats": 1}, {"repeats": 4}], ["-K1", "-K4"]),
        ([{"settings": {"steps": 2}}, {"settings": {"steps": 9}}, {"seed": 1}], None),
    ],
)
def test_rows_of_one_name_have_a_file_each(lab, tmp_path, differs, suffixes) -> None:
    for right, more in enumerate(differs, start=3):
        more = {"settings": {}} | more
        pgd = lab.cell("rush@64", "pgd", [1] * 9 + [0], votes=64, **more)
        lab.cell("rush@64", "worst", [1] * right + [0] * (10 - right), votes=64, of=(pgd,), **more)
    lab.cell("other@64", "worst", [1] * 10, votes=64)
    found = rows(lab.results())
    paths = write_model_info(found, tmp_path / "out")
    assert len({*paths}) == len(paths) == len(found) == len(differs) + 1
    assert sorted(map(json.dumps, map(model_info, found))) == sorted(json.dumps(json.loads(p.read_text())) for p in paths)
    names = sorted(path.name.removeprefix("rush@64-linf8-10").removesuffix(".json") for path in paths)
    records = sorted(f"-{row.cells['worst'].folder.name[:6]}" for row in found if row.labels["defense"] == "rush@64")
    assert names == sorted(["other@64-linf8-10", *(suffixes or records)])  # what is alone keeps its name


def test_a_claim_is_the_higher_of_the_two(tmp_path) -> None:
    info = {"name": "a", "dataset": "cifar10", "eps": "8/255", "reported": "54.8", "autoattack_acc": "54.43"}
    (tmp_path / "a.json").write_text(json.dumps(info))
    found = read_model_info(tmp_path / "a.json")
    assert (found.accuracy, found.kind, found.dataset, found.eps) == (pytest.approx(0.548), "reported", "cifar10", 8 / 255)
    (tmp_path / "a.json").write_text(json.dumps(info | {"reported": None}))
    assert read_model_info(tmp_path / "a.json").accuracy == pytest.approx(0.5443)


CLAIM = '{"name": "a", "dataset": "b", "eps": "8/255", "reported": %s}'


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "a"}', *(CLAIM % said for said in ('"high"', '"nan"', "NaN", '"9999"', '"-5"', '"0.6"', "0"))]
)
def test_a_file_that_claims_nothing_is_refused(text, tmp_path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadInput, match=r"a\.json"):
        read_model_info(tmp_path / "a.json")
