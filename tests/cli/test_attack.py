"""`attack` and `table`: complete, failed, stopped, shared, one's own network, damaged models and wrong names."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from rush_bench.attacks.autoattack import QuickAPGD
from rush_bench.attacks.pgd import PGD
from rush_bench.errors import MissingPackage
from rush_bench.records import load_results


@pytest.fixture
def attack(rush_bench, but, store: Path, mine: Path, quick: list[str]):
    """`attack` on the two tiny models, or on what is given."""

    def run(*args: object, models: str | None = "all", dataset: object = mine):
        named = {"--models": models, "--dataset": dataset}
        return rush_bench("attack", *but([*quick, *(word for pair in named.items() if pair[1] for word in pair)], args))

    return run


def done(results: str = "results") -> dict[tuple[str, str], bool]:
    return {(r.labels["defense"], r.labels["attack"]): r.complete for r in load_results(Path(results))}


def test_all_models_and_the_table_of_what_was_measured(attack, rush_bench) -> None:
    result = attack("--models", "rush", models="plain")
    assert result.exit_code == 0, result.output
    assert {name for name, _ in done()} == {"plain-mine", "rush-mine@1", "rush-mine@64"}
    assert all(done().values())
    assert all(name in result.stdout for name in ("plain-mine", "rush-mine@1", "rush-mine@64", "Clean"))

    table = rush_bench("table", "--out", "elsewhere", "--json")
    assert table.exit_code == 0, table.output
    rows = {row["defense"]: row for row in json.loads(table.stdout)}
    frame = next(r for r in load_results(Path("results")) if r.labels["attack"] == "pgd" and r.labels["votes"] == 1).frame
    assert rows["rush-mine@1"]["pgd"] == pytest.approx(100 * (frame.correct / frame.repeats).mean())
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["table.csv", "table.md", "table.tex"]


@pytest.mark.parametrize(("models", "said"), [("plain", True), ("rush@1", False), ("plain,rush@1", False)])
def test_settings_of_draws_that_had_no_effect_are_named(attack, models: str, said: bool) -> None:
    result = attack("--set", "pgd.stop=no", models=models)
    idle = "pgd.select_draws, eot.steps, eot.draws, eot.select_draws, apgd.bank, pgd.stop"
    note = f"note: {idle} had no effect: no noise is drawn by plain-mine\n"
    assert result.exit_code == 0 and (note in result.stderr) == said, result.output


def test_any_registered_attacks_run_by_name_and_square_goes_last(rush_bench, store: Path, mine: Path) -> None:
    few = [word for text in ("square.queries=5", "eot-apgd.steps=2", "eot-apgd.restarts=1") for word in ("--set", text)]
    line = ["attack", "--models", "plain", "--dataset", mine, "--n", "10", "--json"]
    result = rush_bench(*line, "--suite", "linf8", "--attacks", "square", "--attacks", "eot-apgd,clean", *few)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [cell["attack"] for cell in said["cells"]] == ["clean", "eot-apgd", "square", "worst"]
    assert all(said["table"][0][name] is not None for name in ("clean", "eot-apgd", "square", "worst"))
    wrong = rush_bench(*line, "--attacks", "clean,eot-apdg")
    assert wrong.exit_code == 2 and "did you mean 'eot-apgd'" in wrong.stderr
    none = rush_bench(*line, "--attacks", "eot")
    assert none.exit_code == 2 and "plain-mine is deterministic" in none.stderr


def test_json_owns_stdout_and_says_all(attack) -> None:
    result = attack("--json", models="plain")
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["failed"] == {}
    assert {cell["attack"] for cell in said["cells"]} == {"clean", "pgd", "apgd", "square", "worst"}
    assert all(cell["chunks_done"] == cell["chunks"] == 1 for cell in said["cells"])
    assert [row["defense"] for row in said["table"]] == ["plain-mine"]


def test_stopped_by_max_minutes_is_3_and_the_same_command_finishes(attack) -> None:
    stopped = attack("--max-minutes", "0", "--json")
    assert stopped.exit_code == 3 and "the same command continues" in stopped.stderr
    assert any(cell["chunks_done"] < cell["chunks"] for cell in json.loads(stopped.stdout)["cells"])
    assert attack().exit_code == 0
    assert all(done().values())


def test_shards_share_the_work(attack) -> None:
    second = attack("--shard", "2/2", models="plain")  # ten images are one chunk, and that is the first shard's
    assert second.exit_code == 0 and "waits for the others" in second.stderr
    assert not any(done().values())
    first = attack("--shard", "1/2", models="plain")
    assert first.exit_code == 0 and "waits" not in first.stderr
    assert all(done().values())


@pytest.mark.parametrize(("others", "code"), [(False, 4), (True, 1)])
def test_a_cell_without_its_package_is_4_unless_others_fail_for_another_reason(attack, monkeypatch, others, code) -> None:
    def lacks(self, *args):
        raise MissingPackage("this attack needs its package: pip install 'rush-bench[torchattacks]'")

    def breaks(self, *args):
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(PGD, "run", lacks)
        if others:
            patched.setattr(QuickAPGD, "run", breaks)
        result = attack("--json", models="plain")
    assert result.exit_code == code
    failed = json.loads(result.stdout)["failed"]
    assert sum("pip install" in reason for reason in failed.values()) == 1
    assert sum("needs plain-mine pgd" in reason for reason in failed.values()) == 2  # so Square and the worst case lack it too
    assert done()["plain-mine", "clean"] and done()["plain-mine", "apgd"] != others
    assert attack(models="plain").exit_code == 0 and all(done().values())  # installed by now


def test_a_cell_that_fails_is_1_and_the_others_go_on(attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PGD, "run", lambda self, defense, images, labels, threat, stream: images + 0.5)
    result = attack("--json", models="plain")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert any("pgd" in cell for cell in said["failed"])
    assert done()["plain-mine", "clean"] and not done()["plain-mine", "pgd"]
    monkeypatch.undo()


NETWORK = """
import torch
from torch import nn
import rush_bench as rb

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()

def train_mode():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def fails():
    raise ValueError("no weights\\n here")

def defense():
    return rb.Deterministic(build(), shape=(1, 8, 8), name="given")

def smoothed():
    return rb.Smoothed(build(), noise="uniform:0.2", votes=3, shape=(1, 8, 8), name="given@3")

def stranger():
    class Stranger(rb.Defense):
        name, classes, shape = "stranger", 5, (1, 8, 8)
    return Stranger()

def probabilities():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(1)).eval()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("nets")
def test_a_network_of_ones_own(attack) -> None:
    import torch

    with torch.random.fork_rng():
        assert attack("--model", "own_nets:build", models=None).exit_code == 0
        result = attack("--model", "own_nets:build", "--noise", "gaussian:1/4", "--votes", "3", models=None)
    assert result.exit_code == 0, result.output
    assert {name for name, _ in done()} == {"own_nets.build", "own_nets.build@1", "own_nets.build@3"}


@pytest.mark.usefixtures("nets")
def test_options_of_a_defence_that_is_given_hold(attack) -> None:
    import torch

    with torch.random.fork_rng():
        same = ["--noise", "uniform:0.2", "--votes", "3", "--device", "cpu", "--precision", "float32", "--memory", "0.5"]
        result = attack("--model", "own_nets:smoothed", *same, "--name", "mine", "--label", "extra-data=500k", models=None)
    assert result.exit_code == 0, result.output
    (found,) = {(r.labels["defense"], r.labels["extra_data"]) for r in load_results(Path("results"))}
    assert found == ("mine@3", "500k")


@pytest.mark.parametrize("named", [False, True])
def test_two_networks_of_one_function_name_are_told_apart(attack, rush_bench, tmp_path: Path, monkeypatch, named: bool) -> None:
    """By the modules that they are from; under one --name, by the beginning of the digest of their weights."""
    import torch

    monkeypatch.syspath_prepend(str(tmp_path))
    about = ["--label", "protocol=of mine", *(["--name", "twin"] if named else [])]
    for number, seed in ((1, 0), (2, 7)):
        module = f"twin{number}{named}"
        (tmp_path / f"{module}.py").write_text(NETWORK.replace("manual_seed(0)", f"manual_seed({seed})"))
        with torch.random.fork_rng():
            result = attack("--model", f"{module}:build", *about, models=None)
        assert result.exit_code == 0, result.output
    rows = json.loads(rush_bench("table", "--json").stdout)
    names = sorted(row["defense"] for row in rows)
    assert len(set(names)) == 2 and {row["protocol"] for row in rows} == {"of mine"}
    weights = sorted({r.identity["weights"][:6] for r in load_results(Path("results"))})
    assert names == ([f"twin ({digest})" for digest in weights] if named else ["twin1False.build", "twin2False.build"])


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "own_nets:train_mode"], ".eval()"),
        (["--model", "own_nets:probabilities"], "logits"),
        (["--model", "own_nets:nothing"], "has no 'nothing'"),
        (["--model", "no_such_package:build"], "cannot import"),
        (["--model", "own_nets"], "package.module:function"),
        (["--model", "own_nets:build", "--noise", "uniform"], "uniform:0.3"),
        (["--model", "own_nets:build", "--noise", "unifrom:0.3"], "did you mean 'uniform'"),
        (["--model", "own_nets:build", "--votes", "3"], "--votes needs --noise"),
        (["--model", "own_nets:smoothed", "--votes", "3"], "the function of --model returns states its own votes"),
        (["--model", "own_nets:build", "--models", "all"], "say what to attack"),
        ([], "say what to attack"),
        (["--models", "rush", "--noise", "uniform:0.3"], "--noise without --model"),
        (["--models", "rush", "--name", "mine", "--label", "protocol=x"], "--name, --label without --model"),
        (["--models", "rush@²"], "a number of votes"),
        (["--models", "rush@99999999999"], "a number of votes"),
        (["--models", "rush", "--n", "²"], "`all`"),
        (["--model", "os:system"], "called without arguments: TypeError"),
        (["--model", "os:getcwd"], "os:getcwd gave str; it must return an nn.Module"),
        (["--model", "sys:exit"], "called without arguments: SystemExit"),
        (["--model", "math:pi"], "gave float"),
        (["--model", "own_nets.py:build"], "cannot import"),
        (["--model", "./own_nets:build"], "package.module:function"),
        (["--model", ":build"], "package.module:function"),
        (["--model", "own_nets:fails"], "ValueError: no weights here, own_nets.py"),
        (["--model", "own_nets:build", "--name", "a@b"], "must be 1 to 80"),
        (["--model", "own_nets:build", "--name", ""], "must be 1 to 80"),
        (["--model", "own_nets:build", "--name", "x" * 300], "must be 1 to 80"),
        (["--model", "own_nets:build", "--label", "colour=red"], "no label named 'colour'"),
        (["--model", "own_nets:build", "--label", "protocol"], "key=value"),
        (["--model", "own_nets:build", "--model", "own_nets:defense"], "--model is given 2 times and takes one value"),
        (["--model", "own_nets:defense", "--noise", "uniform:0.3"], "noise cannot be set from outside"),
        (["--model", "own_nets:defense", "--noise", "uniform:0.3", "--votes", "3"], "noise cannot be set from outside"),
        (["--model", "own_nets:defense", "--precision", "bfloat16"], "precision cannot be set from outside"),
        (["--model", "own_nets:smoothed", "--noise", "uniform:0.2", "--votes", "7"], "votes cannot be set from outside"),
        (["--model", "own_nets:stranger", "--label", "protocol=x"], "whose labels() are its own"),
        (["--model", "own_nets:stranger", "--memory", "1"], "memory cannot be set from outside"),
    ],
)
def test_wrong_networks_and_options_are_one_line(attack, args: list[str], says: str) -> None:
    result = attack(*args, models=None)
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_own_network_needs_images(attack) -> None:
    result = attack("--model", "own_nets:build", models=None, dataset=None)
    assert result.exit_code == 2 and "--dataset" in result.stderr


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        (["--suite", "linf"], {}, "linf8"),
        (["--set", "pgd.step_count=1"], {}, "setting"),
        (["--set", "aa.steps=1"], {}, "an attack of the suite"),
        (["--shard", "3/2"], {}, "1/4"),
        (["--n", "21"], {}, "20"),
        (["--n", "few"], {}, "`all`"),
        (["--precision", "float16"], {}, "bfloat16"),
        (["--device", "gpu"], {}, "--device auto"),
        ([], {"models": "rsuh"}, "did you mean 'rush'"),
        ([], {"models": "plain@64"}, "deterministic"),
        ([], {"models": "rush@many"}, "rush@64"),
        ([], {"dataset": "cifar1"}, "did you mean 'cifar10'"),
        ([], {"dataset": "digits"}, "train one first"),
        ([], {"dataset": None}, "--dataset path/to/mine.npz"),
        (["--size", "9"], {}, "takes images"),
    ],
)
def test_wrong_names_are_one_line_with_the_fix(attack, args: list[str], options: dict, says: str) -> None:
    result = attack(*args, **options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.startswith("error: ") and result.stdout == ""


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "card"])
def test_a_damaged_model_is_refused(attack, store: Path, damage: str) -> None:
    path = store / "plain-mine" / ("card.json" if damage == "card" else "model.safetensors")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage in ("cut", "card") else content[:-1] + b"\x01")
    result = attack(models="plain-mine")
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(path.name) in result.stderr and "Traceback" not in result.stderr


def test_a_full_disk_is_one_error_and_the_same_command_goes_on(attack, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    result = attack(models="plain")
    assert result.exit_code == 1 and "No space left" in result.stderr and "free some space" in result.stderr
    monkeypatch.setattr(os, "fsync", real)
    assert attack(models="plain").exit_code == 0
    assert all(done().values())


def test_a_results_folder_that_is_a_file_is_one_error(attack) -> None:
    Path("results").write_text("a file")
    result = attack(models="plain")
    assert result.exit_code == 1 and "choose another folder" in result.stderr


def test_default_images_are_a_thousand_or_all_there_are(rush_bench, store: Path, mine: Path, quick: list[str]) -> None:
    at = quick.index("--n")
    short = quick[:at] + quick[at + 2 :]
    base = ["attack", *short, "--models", "plain", "--dataset", mine]
    assert rush_bench(*base).exit_code == 0
    assert rush_bench(*base, "--n", "all").exit_code == 0
    assert {r.labels["n"] for r in load_results(Path("results"))} == {20}
    index = [np.sort(r.frame["index"].to_numpy()) for r in load_results(Path("results"))]
    assert all(np.array_equal(each, np.arange(20)) for each in index)


@pytest.mark.parametrize("style", ["plain", "paper"])
def test_table_writes_what_was_asked_for(attack, rush_bench, style: str) -> None:
    assert attack(models="plain").exit_code == 0
    result = rush_bench("table", "--style", style, "--format", "md")
    assert result.exit_code == 0, result.output
    assert "plain-mine" in result.stdout and "plain-mine" in Path("results/table.md").read_text()
    assert not Path("results/table.csv").exists()


def test_table_in_the_papers_style_needs_no_measurement(rush_bench) -> None:
    result = rush_bench("table", "--style", "paper")
    assert result.exit_code == 0, result.output
    assert "77.8" in result.stdout and "STL-10" in Path("results/table.tex").read_text()


def test_table_into_a_file_instead_of_a_folder(rush_bench) -> None:
    Path("taken").write_text("a file")
    result = rush_bench("table", "--style", "paper", "--out", "taken")
    assert result.exit_code == 1 and "choose another folder" in result.stderr
