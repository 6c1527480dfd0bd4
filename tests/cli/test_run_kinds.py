"""`run` on what is not a training or an attack, and on several seeds of one system."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from rush_bench.audits import run as room
from rush_bench.audits.experiments import BUDGETS
from rush_bench.audits.finding import Finding
from tests.cli.test_audit import SMALL

MEASURED = """
out = "results"

[[certify]]
models = "*-mine"
dataset = "mine.npz"
norm = "linf"
draws = 200
n0 = 10
n = 4

[[settle]]
models = "rush@1"
dataset = "mine.npz"
budget = "quick"
only = ["T0", "T1"]
n = 4

[[corruptions]]
models = ["plain", "rush"]

[[import]]
file = "none.pt"
name = "other"
dataset = "cifar10"
"""


def states(result) -> dict[str, str]:
    return {job["name"]: job["state"] for job in json.loads(result.stdout)["jobs"]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that takes a moment, and probes made by hand."""
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **SMALL))
    for kind in ("flags", "truth", "indicators", "binarization"):
        found = Finding(kind, "made by hand", 0.0, 0.0, "<=", "nothing", "pass")
        monkeypatch.setattr(room, kind, lambda *arguments, found=found: [found])


@pytest.mark.usefixtures("small", "store", "mine")
def test_models_of_the_store_are_certified_and_settled(rush_bench) -> None:
    Path("measured.toml").write_text(MEASURED)
    impossible = {"corruptions plain-mine,rush-mine": "impossible", "import other": "impossible"}
    before = rush_bench("run", "measured.toml", "--plan", "--json")
    assert before.exit_code == 0, before.output
    # of the models, what has noise; its draws are 10 and 200 an image, whatever is left undecided
    assert states(before) == {"certify rush-mine": "missing", "settle rush-mine@1": "missing", **impossible}
    jobs = {job["name"]: job for job in json.loads(before.stdout)["jobs"]}
    assert jobs["certify rush-mine"]["passes"] == 4 * 210 and jobs["settle rush-mine@1"]["passes"] > 0
    assert "no file none.pt" in jobs["import other"]["why"]

    result = rush_bench("run", "measured.toml", "--json")
    assert result.exit_code == 1 and set(json.loads(result.stdout)["failed"]) == set(impossible)
    assert list(Path("results/certificates").rglob("certificate.tsv")) and list(Path("results/settle").glob("*.md"))
    assert list(Path("results/settle").glob("*.png"))
    again = rush_bench("run", "measured.toml", "--plan", "--json")
    assert states(again) == {"certify rush-mine": "done", "settle rush-mine@1": "done", **impossible}


@pytest.mark.usefixtures("small", "store", "mine", "undrawn")
def test_an_audit_ends_in_a_verdict_and_is_done_then(rush_bench) -> None:
    Path("claim.toml").write_text(
        'out = "results"\n[[audit]]\nmodels = "plain"\ndataset = "mine.npz"\nbudget = "quick"\nn = 4\nclaim = 90\n'
    )
    assert states(rush_bench("run", "claim.toml", "--plan", "--json")) == {"audit plain-mine": "missing"}
    assert rush_bench("run", "claim.toml").exit_code == 0
    (path,) = Path("results/audit").glob("*.json")
    assert json.loads(path.read_text())["verdict"]["claim"]["value"] == 0.9
    assert states(rush_bench("run", "claim.toml", "--plan", "--json")) == {"audit plain-mine": "done"}

    other = json.loads(path.read_text())  # the verdict on fewer images has the same file
    path.write_text(json.dumps(other | {"labels": other["labels"] | {"n": 3}}))
    assert states(rush_bench("run", "claim.toml", "--plan", "--json")) == {"audit plain-mine": "in progress"}


def test_seeds_are_one_row_with_what_training_cost(rush_bench, mine: Path) -> None:
    Path("seeds.toml").write_text("""
        out = "results"
        [[train]]
        recipe = "simclr"
        seed = [0, 1]
        dataset = "mine.npz"
        preset = "smoke"
        set.network = { name = "resnet", blocks = [1], width = 4 }
        set.n_train = 30
        set.pretrain.epochs = 1
        set.finetune.epochs = 1
        [[attack]]
        suite = "linf8-quick"
        attacks = "clean"
        dataset = "mine.npz"
        n = 10
        """)
    result = rush_bench("run", "seeds.toml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("models").iterdir()) == ["encoders", "simclr-mine", "simclr-mine-s1"]
    table = pd.read_csv("results/table.csv", dtype={"training_seeds": str}).set_index("training_seeds")
    assert list(table.index) == ["0,1", "0", "1"] and list(table["in_mean"]) == [False, True, True]
    assert table.loc["0,1", "clean"] == pytest.approx(table.loc[["0", "1"], "clean"].mean())
    assert (table["training_passes"] == 30 * 7).all() and (table["training_images"] == 60).all()
    assert (table["training_seconds"] >= 0).all() and "simclr-mine-s1" not in result.stdout
    with_itself = rush_bench("compare", "simclr-mine", "simclr-mine-s1", "--seeds")  # found by the cards of the store
    assert with_itself.exit_code == 2 and "trainings of one system" in with_itself.stderr
