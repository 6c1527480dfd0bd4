"""`rush-bench corruptions`: models of a store, mCE, shards, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

from rush_bench.cli import main
from rush_bench.datasets.corruptions import ALL, USUAL
from rush_bench.networks import build
from rush_bench.store import save_model

QUICK = ["--data-dir", "data", "--n", "5", "--repeats", "2"]


@pytest.fixture
def corruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`corruptions` in a folder with small files of all 19 corruptions and a store of two untrained models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUSH_BENCH_DATA", raising=False)
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for k, corruption in enumerate(ALL):
        np.save(folder / f"{corruption}.npy", np.random.RandomState(k).randint(0, 256, (100, 32, 32, 3)).astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5))
    for name, votes, noise in (("plain", [0], None), ("rush", [1, 3], {"law": "uniform", "scale": 0.3})):
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            model = build({"name": "resnet", "blocks": [1], "width": 2, "classes": 10, "channels": 3, "size": 32})
        card = {"name": f"{name}-cifar10", "recipe": name, "dataset": "cifar10", "network": model.spec, "noise": noise}
        save_model(tmp_path / "models" / f"{name}-cifar10", card | {"votes": votes}, model.state_dict())
    return lambda *args: CliRunner().invoke(main, ["corruptions", *map(str, args)])


def test_table_of_15_with_a_reference(corruptions) -> None:
    result = corruptions("rush@3", "--reference", "plain", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["complete"] and said["reference"] == "plain-cifar10" and said["failed"] == {}
    rows = {(row["defense"], row["corruption"]): row for row in said["table"]}
    assert set(rows) == {(name, c) for name in ("rush-cifar10@3", "plain-cifar10") for c in (*USUAL, "mean")}
    mean = rows["rush-cifar10@3", "mean"]
    assert mean["accuracy"] == pytest.approx(np.mean([rows["rush-cifar10@3", c]["accuracy"] for c in USUAL]))
    assert mean["ce"] == pytest.approx(np.mean([rows["rush-cifar10@3", c]["ce"] for c in USUAL]))
    assert rows["plain-cifar10", "mean"]["ce"] == pytest.approx(100)
    assert mean["K"] == 2 and mean["n"] == 5 and mean["accuracy_low"] <= mean["accuracy"] <= mean["accuracy_high"]
    assert not Path("results/runs").exists() and len(list(Path("results/corruptions/runs").iterdir())) == 150
    assert Path("results/corruptions/cifar10-set15.csv").is_file()

    # all 19: the 75 cells of each that are there are not made again
    first = {path: path.stat().st_mtime_ns for path in Path("results/corruptions/runs").glob("*/*.npz")}
    more = corruptions("rush@3", "--all19", *QUICK)
    assert more.exit_code == 0, more.output
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    lines = [line.split() for line in more.stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines[-21:]] == [*ALL, "mean", "mCE"] and lines[-1][1] == "–"
    assert "| mCE | – |" in Path("results/corruptions/cifar10-all19.md").read_text()


def test_stopped_is_3_and_a_shard_waits_for_the_others(corruptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rush_bench.api.corruptions.USUAL", USUAL[:2])
    stopped = corruptions("plain", *QUICK, "--max-minutes", "0")
    assert stopped.exit_code == 3 and "the same command continues" in stopped.stderr
    half = corruptions("plain", *QUICK, "--shard", "1/2")
    assert half.exit_code == 0 and "waits for the others" in half.stderr
    whole = corruptions("plain", *QUICK)
    assert whole.exit_code == 0 and "waits" not in whole.stderr and "–" not in whole.stdout.split("mCE  ")[0]


def test_a_later_run_of_fewer_models_keeps_the_columns_of_the_others(corruptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rush_bench.api.corruptions.USUAL", USUAL[:2])
    header = "| corruption | plain-cifar10 | rush-cifar10@3 |"
    for names in ("plain", "rush@3", "plain"):
        assert corruptions(names, *QUICK).exit_code == 0
    assert Path("results/corruptions/cifar10-set15.md").read_text().splitlines()[0] == header
    assert {*pd.read_csv("results/corruptions/cifar10-set15.csv")["defense"]} == {"plain-cifar10", "rush-cifar10@3"}
    assert corruptions("plain", *QUICK[:2], "--n", "6").exit_code == 0  # other images: a table of their own
    assert "rush" not in Path("results/corruptions/cifar10-set15.md").read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plian"], "did you mean 'plain'?"),
        (["plain", "--dataset", "stl10"], "choose cifar10 or cifar100"),
        (["plain", "--dataset", "cifar100"], "unpack CIFAR-100-C.tar"),
        (["plain", "--reference", "rush"], "more than one model: rush-cifar10@1, rush-cifar10@3"),
        (["plain", "--reference", "plane"], "did you mean 'plain'?"),
        (["plain", "--n", "many"], "--n takes a number"),
        (["plain", "--n", "21"], "ask for 1 to 20"),
        (["plain", "--shard", "3/2"], "--shard takes k/n"),
        (["plain", "--device", "nonsense"], "--device auto"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(corruptions, but, args: list[str], says: str) -> None:
    result = corruptions(*but(QUICK, args))
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""
    assert not Path("results").exists()
