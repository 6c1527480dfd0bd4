"""export, merge, rename, rm: files that come and go, and records that stay true."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rush_bench as rb
from rush_bench.api.files import export, merge, rename, rm
from rush_bench.cli import main
from rush_bench.errors import BadInput
from rush_bench.evaluation import runner
from rush_bench.store import model_names, read_card
from tests.api.conftest import QUICK, linear


def attacked(
    folder: str, name: str = "linear", shard: tuple[int, int] = (1, 1), network: torch.nn.Module | None = None
) -> None:
    digits = rb.load_dataset("digits", "test", 4)
    mine = rb.Deterministic(network or linear(), shape=digits.shape, name=name)
    runner.attack(mine, QUICK, digits, out=folder, quiet=True, chunk=2, shard=shard)


def test_export_is_what_was_scored(measured: Path) -> None:
    clean, pgd = (export("linear", measured, attack=attack, out="out")[0] for attack in ("clean", "pgd"))
    digits = rb.load_dataset("digits", "test", 10)
    with np.load(clean) as file:
        assert "x" not in file and np.array_equal(file["index"], digits.index) and np.array_equal(file["label"], digits.labels)
    with np.load(pgd) as file:
        x = torch.from_numpy(file["x"])
        assert (x - digits.floats()).abs().max() <= 8 / 255 + 1e-6
        assert np.array_equal(file["predicted"], linear()(x).argmax(1))
        assert np.array_equal(file["correct"], file["predicted"] == file["label"])
    with pytest.raises(BadInput, match="did you mean 'linear'"):
        export("liner", measured)
    with pytest.raises(BadInput, match="no finished attack on linear named 'aa'"):
        export("linear", measured, attack="aa")


def test_two_halves_merge_into_a_whole() -> None:
    for part in (1, 2):
        attacked(f"part{part}", shard=(part, 2))
    attacked("whole")
    assert not any(cell.complete for cell in rb.load_results("part1"))
    assert merge(["part1", "part2"], "both") > 0
    assert rb.table("both").frame.equals(rb.table("whole").frame)
    assert merge(["part1", "part2", "whole"], "both") == 0  # all there


def test_records_of_two_codes_do_not_merge() -> None:
    attacked("one")
    attacked("two")
    (path,) = Path("two/behaviour").glob("*.json")
    changed = json.loads(path.read_text())
    changed["probabilities"] = np.roll(changed["probabilities"], 1, axis=1).tolist()
    path.write_text(json.dumps(changed))
    with pytest.raises(BadInput, match="is other code in two than in one"):
        merge(["two"], "one")
    with pytest.raises(BadInput, match="is other code in two than in one"):
        merge(["one", "two"], "three")
    assert not Path("three").exists()
    with pytest.raises(BadInput, match="holds no records"):
        merge(["nowhere"], "one")


@pytest.mark.parametrize("new", ["a@3", "../e", "a,b", "[red]x", "x/y", "", "a:best", "-n", "a\nb", "x" * 81, "a*"])
def test_a_name_that_could_not_be_given_is_not_given_to_records(new: str) -> None:
    attacked("results")
    for old in ("linear", "nobody"):
        with pytest.raises(BadInput, match=r"name .* must be 1 to 80 letters, digits"):
            rename(old, new)
    assert {cell.labels["defense"] for cell in rb.load_results()} == {"linear"}


def test_a_name_with_votes_keeps_them() -> None:
    attacked("results", "linear@4")
    for old, new in (("linear@4", "mine@4"), ("mine", "my net (2)")):
        assert rename(old, new) == (False, 3)
    assert {cell.labels["defense"] for cell in rb.load_results()} == {"my net (2)@4"}
    with pytest.raises(BadInput, match="must be 1 to 80"):
        rename("my net (2)@4", "mine@64")


class Coded(torch.nn.Sequential):
    """Code without weights around the same weights."""

    flipped = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1) if type(self).flipped else super().forward(x)


def test_records_that_cannot_be_one_measurement_are_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    attacked("one", network=Coded(*linear()).eval())
    monkeypatch.setattr(Coded, "flipped", True)
    attacked("two", network=Coded(*linear()).eval())
    assert {path.name for path in Path("one/runs").iterdir()} == {path.name for path in Path("two/runs").iterdir()}
    shutil.rmtree("two/behaviour")
    for folders in (["one", "two"], ["two", "one"]):
        for door in (rb.table, lambda both: rb.load_results(*both), lambda both: merge(both, "three")):
            with pytest.raises(BadInput, match=r"different results of linear under \w+ \(.*\) under one key: "):
                door(folders)
    assert not Path("three").exists()
    shutil.rmtree("two/runs")
    shutil.copytree("one/runs", "two/runs")
    assert rb.table(["one", "two"]).frame.equals(rb.table("one").frame)


def test_a_damaged_chunk_is_not_copied() -> None:
    attacked("one")
    next(Path("one/runs").glob("*/chunk-0000.npz")).write_bytes(b"no archive")
    with pytest.raises(BadInput, match=r"chunk-0000\.npz"):
        merge(["one"], "two")


def test_a_name_changes_in_store_and_records_and_nothing_else_does(store: Path) -> None:
    runner.attack(rb.load_defense("tiny@1", store=store), QUICK, rb.load_dataset("digits", "test", 4, size=8), out="results")
    before = rb.table().frame
    assert rename("tiny", "small", store=store) == (True, 3)
    after = rb.table().frame
    assert after["defense"].tolist() == ["small@1"] and after.drop(columns="defense").equals(before.drop(columns="defense"))
    assert read_card(store, "small")["name"] == "small" and rb.load_defense("small@1", store=store).name == "small@1"
    with pytest.raises(BadInput, match="no model or defence named 'tiny'"):
        rename("tiny", "other", store=store)
    rename("small", "tiny", store=store)  # the store is shared
    assert model_names(store) == ["tiny"]


def test_rm_asks_and_takes_what_it_said(store: Path) -> None:
    attacked("results", "mine")
    attacked("results", "mine-too", network=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval())
    asked = CliRunner().invoke(main, ["rm", "mine", "--store", str(store)], input="n\n")
    assert asked.exit_code == 1 and "3 cells in results" in asked.stderr and len(rb.load_results()) == 6
    assert CliRunner().invoke(main, ["rm", "mine", "--store", str(store), "--yes"]).exit_code == 0
    assert {cell.labels["defense"] for cell in rb.load_results()} == {"mine-too"}
    key = rb.load_results()[0].folder.name
    assert [path.name for path in rm(key, store=store)[1]] == [key] and len(rb.load_results()) == 2
    with pytest.raises(BadInput, match="no model, defence or result named 'mine'"):
        rm("mine", store=store)


def own(folder: str, positions: slice) -> str:
    """An npz of the user's own, `own.npz`, of some digits."""
    digits = rb.load_dataset("digits", "test", 20)
    Path(folder).mkdir()
    path = Path(folder) / "own.npz"
    arrays = {"test_images": digits.pixels.numpy()[positions], "test_labels": digits.labels.numpy()[positions]}
    np.savez(path, classes=np.array(digits.classes), **arrays)
    return str(path)


@pytest.mark.parametrize("n", [4, None])
def test_images_of_ones_own_are_drawn_from_the_folder_that_holds_them(n: int | None) -> None:
    images = rb.load_dataset(own("here", slice(0, 10)), "test", n)
    own("other", slice(5, 15))
    runner.attack(rb.Deterministic(linear(), shape=images.shape, name="linear"), QUICK, images, out="results", quiet=True)
    (path,) = rb.figure("images", data_dir="here")
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    for folder, error in (
        (".", r"own is a data set of your own, .* no own\.npz .* --data-dir"),
        ("other", "is not the .* images"),
    ):
        with pytest.raises(BadInput, match=error):
            rb.figure("images", data_dir=folder)
        assert not path.exists()


@pytest.mark.parametrize("kind", ["eps", "cost", "images", "draws"])
def test_a_figure_of_an_unknown_defence_names_the_known(kind: str, monkeypatch: pytest.MonkeyPatch, measured: Path) -> None:
    evidence = SimpleNamespace(subject="linear")
    monkeypatch.setattr("rush_bench.api.figure._found", lambda folder: [evidence])
    with pytest.raises(BadInput, match=r"no defence in .* named 'nope'; known: linear"):
        rb.figure(kind, measured, defense="nope")
