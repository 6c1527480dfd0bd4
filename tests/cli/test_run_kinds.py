"""`run` on what is not a training or an attack, and on several seeds of one system."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rush_bench.audits import run as room
from rush_bench.audits.experiments import BUDGETS
from rush_bench.audits.finding import Finding
from rush_bench.bench import file as files
from rush_bench.bench.jobs import Loaded, Place, expand
from rush_bench.datasets.corruptions import USUAL
from rush_bench.networks import build
from rush_bench.store import read_card, read_weights, save_model
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


IMPORTED = """
out = "results"

[[import]]
file = "theirs.pt"
name = "theirs"
dataset = "mine.npz"
recipe = "standard"
normalise = "none"
network = "size=8"

[[attack]]
models = "theirs"
suite = "linf8-quick"
attacks = "clean"
dataset = "mine.npz"
n = 4
"""


def save_theirs(seed: int) -> None:
    net = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8}, seed)
    state = {key.replace("encoder.", "").replace("head.", "fc."): value for key, value in net.state_dict().items()}
    torch.save({key: value + 0.1 if "running" in key else value for key, value in state.items()}, "theirs.pt")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("change", "state", "says"),
    [
        (lambda: None, "done", ""),
        (lambda: edit('normalise = "none"', 'normalise = "0.5/0.25"'), "impossible", "another model or encoder named 'theirs'"),
        (lambda: edit('normalise = "none"', 'normalise = "none"\nnoise = "uniform:0.3"'), "impossible", "another model"),
        (lambda: save_theirs(1), "impossible", "another model"),
        (lambda: edit('"theirs.pt"', '"gone.pt"'), "impossible", "there is no file gone.pt, so that nobody can say whether"),
        (lambda: as_if_trained(), "impossible", "another model"),
        (lambda: edit('recipe = "standard"', 'recipe = "standard"\nextra-data = "500k"'), "missing", ""),
    ],
    ids=["same", "normalise", "noise", "file", "no file", "trained", "said otherwise"],
)
def test_an_import_is_done_where_the_store_has_that_very_model(rush_bench, change, state: str, says: str) -> None:
    save_theirs(0)
    Path("import.toml").write_text(IMPORTED)
    assert rush_bench("run", "import.toml").exit_code == 0
    change()
    result = rush_bench("run", "import.toml", "--plan", "--json")
    jobs = {job["kind"]: job for job in json.loads(result.stdout)["jobs"]}
    assert jobs["import"]["state"] == state and says in jobs["import"].get("why", "")
    # what lies there under that name is no answer to an attack on the file's model
    assert jobs["attack"]["state"] == ("impossible" if state == "impossible" else "done")
    assert rush_bench("run", "import.toml").exit_code == (state == "impossible")
    if state == "missing":
        assert json.loads(Path("models/theirs/card.json").read_text())["extra_data"] == "500k"
        assert "done" in states(rush_bench("run", "import.toml", "--plan", "--json")).values()


def edit(old: str, new: str, file: str = "import.toml") -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def as_if_trained() -> None:
    card = {key: value for key, value in read_card(Path("models"), "theirs").items() if key != "source"}
    weights = read_weights(Path("models"), "theirs")
    shutil.rmtree("models/theirs")
    save_model(Path("models/theirs"), card, weights)


@pytest.mark.usefixtures("small", "store", "mine", "undrawn")
def test_a_changed_claim_is_judged_again_on_the_same_cells(rush_bench) -> None:
    Path("claim.toml").write_text(
        'out = "results"\n[[audit]]\nmodels = "plain"\ndataset = "mine.npz"\nbudget = "quick"\nn = 4\nclaim = 90\n'
    )
    assert rush_bench("run", "claim.toml").exit_code == 0
    cells = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*.npz")}
    edit("claim = 90", "claim = 60", "claim.toml")
    (job,) = json.loads(rush_bench("run", "claim.toml", "--plan", "--json").stdout)["jobs"]
    assert (job["state"], job["passes"], job["seconds"]) == ("anew", 0, 0)
    assert rush_bench("run", "claim.toml").exit_code == 0
    (path,) = Path("results/audit").glob("*.json")
    assert json.loads(path.read_text())["verdict"]["claim"]["value"] == 0.6
    assert {path: path.stat().st_mtime_ns for path in Path("results").rglob("*.npz")} == cells
    assert states(rush_bench("run", "claim.toml", "--plan", "--json")) == {"audit plain-mine": "done"}


@pytest.mark.usefixtures("small", "store", "mine", "undrawn")
def test_a_settled_table_follows_what_is_asked_for(rush_bench) -> None:
    """Back at four images, all cells are there, and the table is still of three."""
    line = ("run", "settle.toml")
    Path("settle.toml").write_text(
        'out = "results"\n[[settle]]\nmodels = "rush@1"\ndataset = "mine.npz"\nbudget = "quick"\nonly = "T1"\nn = 4\n'
    )
    assert rush_bench(*line).exit_code == 0
    (table,) = (path for path in Path("results/settle").glob("*.csv") if "waterfall" not in path.name)
    first = table.read_text()
    edit("n = 4", "n = 3", "settle.toml")
    assert rush_bench(*line).exit_code == 0 and table.read_text() != first
    edit("n = 3", "n = 4", "settle.toml")
    assert states(rush_bench(*line, "--plan", "--json")) == {"settle rush-mine@1": "anew"}
    assert rush_bench(*line).exit_code == 0 and table.read_text() == first
    assert states(rush_bench(*line, "--plan", "--json")) == {"settle rush-mine@1": "done"}


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(("old", "new"), [('"yours"', '"ours"'), ('"protocol=AFF"', '"protocol=ALF"')])
def test_another_name_or_label_of_a_network_reaches_the_table(rush_bench, monkeypatch, old: str, new: str) -> None:
    Path("theirs_net.py").write_text(
        "import torch\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "theirs_net", raising=False)
    Path("label.toml").write_text("""
        out = "results"
        [[attack]]
        model = "theirs_net:build"
        dataset = "mine.npz"
        suite = "linf8-quick"
        attacks = "clean"
        n = 4
        name = "yours"
        label = ["protocol=AFF"]
        """)
    assert rush_bench("run", "label.toml").exit_code == 0
    attack = {"done", "anew"}  # the attack, and its table
    assert set(states(rush_bench("run", "label.toml", "--plan", "--json")).values()) == attack
    edit(old, new, "label.toml")
    assert set(states(rush_bench("run", "label.toml", "--plan", "--json")).values()) == {"anew"}
    assert rush_bench("run", "label.toml").exit_code == 0
    assert new.strip('"').split("=")[-1] in Path("results/table.csv").read_text()
    assert set(states(rush_bench("run", "label.toml", "--plan", "--json")).values()) == attack


def test_corruptions_follow_their_reference_also_one_that_the_file_trains(rush_bench, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for k, corruption in enumerate(USUAL):
        pixels = np.random.RandomState(k).randint(0, 256, (100, 32, 32, 3)).astype(np.uint8)
        np.save(folder / f"{corruption}.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5))
    for k, name in enumerate("ab"):
        net = build({"name": "resnet", "blocks": [1], "width": 2, "classes": 10, "channels": 3, "size": 32}, k)
        card = {"name": name, "recipe": "standard", "dataset": "cifar10", "network": net.spec, "noise": None, "votes": [0]}
        save_model(tmp_path / "models" / name, card, net.state_dict())
    Path("corrupt.toml").write_text('out = "results"\n[[corruptions]]\nmodels = ["a", "b"]\nn = 5\nreference = "b"\n')
    line = ("run", "corrupt.toml", "--data-dir", "data")
    assert rush_bench(*line).exit_code == 0
    edit('reference = "b"', 'reference = "a"', "corrupt.toml")
    (job,) = json.loads(rush_bench(*line, "--plan", "--json").stdout)["jobs"]
    assert (job["state"], job["passes"]) == ("anew", 0)
    assert rush_bench(*line).exit_code == 0
    table = pd.read_csv("results/corruptions/cifar10-set15.csv").set_index(["defense", "corruption"])
    assert table.loc[("a", "mean"), "ce"] == pytest.approx(100) and set(table["reference"]) == {"a"}

    training = '[[train]]\nrecipe = "pgd_at"\ndataset = "mine.npz"\nname = "c"\n'
    edit("[[corruptions]]", training + "[[corruptions]]", "corrupt.toml")
    edit('reference = "a"', 'reference = "pgd_at"', "corrupt.toml")
    bench = files.read(Path("corrupt.toml"))
    (job,) = (job for job in expand(bench, Place(Path("results"), Path("models")), Loaded()) if job.kind == "corruptions")
    assert job.needs == ("c",) and "--reference c" in job.line


@pytest.mark.usefixtures("store", "mine")
def test_nothing_is_measured_of_a_model_that_is_another_run(rush_bench) -> None:
    Path("other.toml").write_text("""
        out = "results"
        [[train]]
        recipe = "standard"
        dataset = "mine.npz"
        name = "plain-mine"
        [[attack]]
        suite = "linf8-quick"
        attacks = "clean"
        dataset = "mine.npz"
        n = 4
        """)
    result = rush_bench("run", "other.toml", "--plan", "--json")
    assert result.exit_code == 0, result.output
    planned = states(result)
    assert [state for name, state in planned.items() if name != "table"] == ["impossible", "impossible"]
