"""`rush-bench table`: from several folders, and never from records that were swapped or damaged."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rush_bench.records import FORMAT, Cell, CellStore


def write(folder: Path, attack: str, right: int, defense: str = "net", seed: int = 0) -> Path:
    """A finished cell of 30 images, so many of them right; its folder."""
    clean = attack == "clean"
    identity = {"format": FORMAT, "weights": defense, "defense": {"votes": 0}, "attack": {"name": attack}, "images": "noise"}
    identity |= {"threat": None if clean else {"norm": "linf", "eps": 8 / 255}, "seed": seed, "repeats": 1, "chunk": 10}
    labels = {"defense": defense, "model": defense, "recipe": "r", "votes": 0, "dataset": "noise", "attack": attack, "n": 30}
    labels |= {"suite": "linf8-quick", "quick": True, "deterministic": True, "classes": 2, "norm": "linf", "eps": 8 / 255}
    store, cell = CellStore(folder), Cell(identity, labels)
    store.open(cell)
    for c in range(cell.chunks):
        rows = np.array(cell.rows(c))
        correct, zeros = (rows < right).astype(int), np.zeros(len(rows))
        arrays = {"index": rows, "label": zeros.astype(int), "correct": correct, "repeats": zeros.astype(int) + 1}
        arrays |= dict.fromkeys(("margin", "distance", "forwards", "backwards", "seconds"), zeros)
        x = None if clean else np.full((len(rows), 1, 2, 2), right / 30, np.float32)
        store.write(cell, c, arrays | {"counts": np.stack([correct, 1 - correct], 1)}, x)
    return store.folder(cell)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ["chunk-*", "chunk-0001*"])
def test_chunks_copied_from_another_cell_are_refused(rush_bench, tmp_path: Path, what: str, old: bool) -> None:
    clean, pgd = write(Path("results"), "clean", 25), write(Path("results"), "pgd", 2)
    if old:  # as published: neither whose it is nor x' beside it
        for path in Path("results").glob("runs/*/chunk-*.npz"):
            with np.load(path) as file:
                np.savez(path, **{name: file[name] for name in file.files if name != "cell"})
        for path in Path("results").glob("runs/*/adversarial-*"):
            path.unlink()
    right = rush_bench("table")
    assert right.exit_code == 0 and "6.7" in right.stdout
    for path in clean.glob(what):
        (pgd / path.name).write_bytes(path.read_bytes())
    found = rush_bench("table")
    assert found.exit_code == 2 and "copied from elsewhere" in found.stderr and not found.stdout


def test_chosen_columns_caption_and_label(rush_bench) -> None:
    write(Path("results"), "clean", 25)
    write(Path("results"), "pgd", 2)
    found = rush_bench("table", "--columns", "defense,pgd", "--caption", "Ours.", "--label", "tab:ours", "--format", "tex")
    assert found.exit_code == 0, found.output
    text = Path("results/table.tex").read_text()
    assert "Defence & PGD \\\\" in text and "\\caption{Ours.}\n\\label{tab:ours}" in text and "Clean" not in text
    wrong = rush_bench("table", "--columns", "defense,pdg")
    assert wrong.exit_code == 2 and "did you mean 'pgd'" in wrong.stderr


def test_rows_are_chosen_and_sorted_in_every_form(rush_bench) -> None:
    for defense, right in (("rush-a", 10), ("acl-b", 20), ("rush-c", 25)):
        write(Path("results"), "clean", right, defense)
    write(Path("results"), "pgd", 5, "rush-a")

    def shown(*args: str) -> list[str]:
        found = rush_bench("table", *args, "--json")
        assert found.exit_code == 0, found.output
        rows = [row["defense"] for row in json.loads(found.stdout)]
        assert [line.split(",")[0] for line in Path("results/table.csv").read_text().splitlines()[1:]] == rows
        return rows

    assert shown("--sort", "-clean") == ["rush-c", "acl-b", "rush-a"] and shown("--sort", "defense")[0] == "acl-b"
    assert shown("--sort", "-pgd")[0] == "rush-a"  # what has no value goes last
    assert shown("--only", "defense=rush*", "--only", "dataset=no*", "--sort", "clean") == ["rush-a", "rush-c"]
    assert shown("--only", "defense=acl*", "--only", "defense=rush-c") == shown("--only", "defense=acl*,rush-c")
    assert shown("--only", "n=30", "--columns", "defense,clean")[0] and list(pd.read_csv("results/table.csv")) == [
        "defense",
        "clean",
        "clean_low",
        "clean_high",
    ]
    assert "rush-c" not in rush_bench("table", "--only", "defense=acl*").stdout
    for args, says in (
        (("--only", "defence=x"), "did you mean 'defense'"),
        (("--only", "defense=x*"), "no row is left with defense x*; there is acl-b"),
        (("--only", "clean=9*"), "clean is an accuracy"),
        (("--only", "rush*"), "--only takes key=value"),
        (("--sort", "best"), "no column named 'best'"),
        (("--sort", "clean", "--format", "csv,robustbench"), "leave out --columns, --only and --sort"),
    ):
        wrong = rush_bench("table", *args)
        assert wrong.exit_code == 2 and says in " ".join(wrong.stderr.split()), wrong.output


def test_several_folders_make_one_table(rush_bench) -> None:
    for folder, defense in (("a", "one"), ("b", "two"), ("b", "one")):
        write(Path(folder), "clean", 25, defense)
    found = rush_bench("table", "--results", "a", "--results", "b", "--json")
    assert found.exit_code == 0 and sorted(row["defense"] for row in json.loads(found.stdout)) == ["one", "two"]
    assert Path("a/table.md").exists() and not Path("b/table.md").exists()
    assert rush_bench("table", "--results", "a", "--results", "b", "--out", "c").exit_code == 0 and Path("c/table.md").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"n": 30', '"n": 1000000000000'),
        lambda text: text.replace('"two"', '"one"'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: "[]",
    ],
)
def test_one_damaged_cell_is_left_out_with_a_line(rush_bench, damage) -> None:
    write(Path("results"), "clean", 25, "one")
    path = write(Path("results"), "clean", 20, "two") / "cell.json"
    path.write_text(damage(path.read_text()))
    found = rush_bench("table", "--json")
    assert found.exit_code == 0 and [row["defense"] for row in json.loads(found.stdout)] == ["one"]
    assert found.stderr.count("left out") == 1
    assert rush_bench("list", "results").exit_code == 0


def test_one_damaged_card_is_left_out_with_a_line(rush_bench, store: Path, mine: Path, quick: list[str]) -> None:
    for number, content in enumerate(("{", "[]", "{}", '{"recipe": "r", "dataset": "mine", "votes": [0], "network": {}}')):
        (store / f"bad{number}").mkdir()
        (store / f"bad{number}" / "card.json").write_text(content)
    changed = store / "rush-mine" / "card.json"
    changed.write_text(changed.read_text().replace("0.3", "0.7"))
    found = rush_bench("attack", "--models", "all", "--dataset", mine, *quick, "--json")
    assert found.exit_code == 0, found.stderr
    assert {cell["defense"] for cell in json.loads(found.stdout)["cells"]} == {"plain-mine"}
    assert found.stderr.count("left out model") == 5 and "rush-mine/card.json was changed" in found.stderr
    assert rush_bench("list", "models").exit_code == 0


@pytest.mark.parametrize("seed", [2**70, -1, 2**63])
def test_a_seed_out_of_range_is_refused_before_anything_runs(rush_bench, store: Path, mine: Path, seed: int) -> None:
    for line in (
        ("attack", "--models", "plain-mine", "--dataset", mine),
        ("certify", "rush-mine", "--dataset", mine),
        ("corruptions", "all"),
        ("settle", "plain-mine", "--dataset", mine),
        ("audit", "plain-mine", "--dataset", mine),
        ("train", "simclr", "--dataset", mine),
    ):
        assert rush_bench(*line, "--seed", seed).exit_code == 2
    assert not Path("results").exists()
