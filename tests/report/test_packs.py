"""A pack reads as the folder that it was made of."""

import html
import json
import shutil
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.stats import binomtest

import rush_bench as rb
from rush_bench.cli import main
from rush_bench.errors import BadInput
from rush_bench.files import digest, write_json
from rush_bench.packs import opened, pack, unpack
from rush_bench.report.page import write_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
SHA = "ab" * 32


@pytest.fixture
def folder(lab):
    """Records, a table, and what does not belong into a pack; cards of two models, of which one was measured."""
    for attack, right in (("clean", [4] * 12), ("pgd", [4] * 8 + [1] * 4), ("worst", [4] * 7 + [0] * 5)):
        cell = lab.cell("rush-cifar10@64", attack, right, repeats=4, votes=64, weights="rush-cifar10", sha256=SHA)
    (lab.store.folder(cell) / "adversarial-0009.npy").write_bytes(b"x'")
    (lab.folder / "digits.toml").write_text("title = 'one'")
    (lab.folder / "worker-2.log").write_text("/home/somebody")
    (lab.folder / "jobs").mkdir()
    (lab.folder / "jobs" / "7_0_log.out").write_text("hostname=theirs")
    for name, sha in (("rush-cifar10", SHA), ("other", "cd" * 32)):
        network = {"name": "tiny", "classes": 4, "channels": 3, "size": 32}
        card = {"recipe": "rush", "dataset": "cifar10", "network": network, "votes": [64], "sha256": {"model": sha}, "seed": 0}
        card |= {"pretrain_dataset": "cifar10", "settings": {"noise": "uniform:0.3"}, "data": {"n_train": 50, "n_pretrain": 50}}
        card |= {"seconds": 12.5, "environment": {"device": "a device"}}
        write_json(lab.folder / "models" / name / "card.json", card | {"digest": digest(card)})
        (lab.folder / "models" / name / "model.safetensors").write_bytes(b"weights")
    return lab.folder


def answer(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_tables_and_the_page_are_those_of_the_folder(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    packed = pack(folder, away / f"{folder.name}.zip", store=folder / "models")
    whole = answer("table", "--results", folder, "--json", "--store", folder / "models", "--out", away)
    written = (away / "table.csv").read_bytes()
    assert json.loads(whole)[0]["training_seconds"] == 12.5
    page = write_page(folder, store=folder / "models").read_text()
    shutil.rmtree(folder)
    assert answer("table", "--results", packed, "--json", "--store", away / "none") == whole
    assert (away / folder.name / "table.csv").read_bytes() == written
    assert write_page(packed).read_text() == page and (away / folder.name / "report.html").exists()


def test_whatever_reads_a_folder_reads_its_pack(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    packed = pack(folder, away / "digits.zip")
    name = next((folder / "runs").iterdir()).name
    lines = (
        ("list", "results", "--results"),
        ("show", name, "--results"),
        ("compare", "rush-cifar10@64", "rush-cifar10@64", "--results"),
        ("export", "rush-cifar10@64", "--out", away / "export", "--results"),
    )
    for line in lines:
        assert answer(*line, packed) == answer(*line, folder) != ""
    assert answer("merge", packed, "--into", away / "more") == ""
    assert answer("table", "--json", "--results", away / "more") == answer("table", "--json", "--results", folder)


def test_is_a_folder_again_where_work_goes_on(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    packed = pack(folder, away / "digits.zip", store=folder / "models", adversarial=True)
    content = packed.read_bytes()
    (away / "digits").mkdir()
    (away / "digits" / "digits.toml").write_text("title = 'mine'")
    into, gained = unpack(packed)
    assert into == away / "digits" and gained == len(json.loads(zipfile.ZipFile(packed).read("pack.json"))["modified"]) - 1
    assert (into / "digits.toml").read_text() == "title = 'mine'"  # what is there stays
    assert unpack(packed) == (into, 0)
    (into / "digits.toml").unlink()
    assert answer("unpack", packed).strip() == str(into)
    assert pack(into, away / "again.zip", adversarial=True).read_bytes() == content
    with pytest.raises(BadInput, match="no pack"):
        unpack(into)


@pytest.mark.parametrize("line", [("rename", "rush-cifar10@64", "b"), ("rm", "rush-cifar10@64", "--yes")])
def test_is_not_changed(line, folder, tmp_path):
    packed = pack(folder, tmp_path / "p.zip")
    content = packed.read_bytes()
    result = CliRunner().invoke(main, [*line, "--results", str(packed)])
    assert result.exit_code == 2 and "rush-bench unpack" in result.stderr and packed.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "code"), [(("table", "--results"), 2), (("report",), 2), (("run", "tables.toml", "--plan", "--out"), 0)]
)
def test_a_folder_without_records_leads_to_its_pack(line, code, folder, tmp_path, monkeypatch):
    packed = pack(folder, tmp_path / "digits.zip")
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("tables.toml").write_text("[[table]]")
    result = CliRunner().invoke(main, [*line, str(tmp_path / "digits")])
    assert result.exit_code == code and f"rush-bench unpack {packed}" in result.stderr


def test_pandas_alone_reads_its_records(folder, tmp_path):
    with zipfile.ZipFile(pack(folder, tmp_path / "p.zip")) as file:
        records = pd.read_csv(file.open("records.csv"))
    right, of = (records.groupby("attack")[part].sum() for part in ("correct", "repeats"))
    assert (right / of).to_dict() == {"clean": 1.0, "pgd": 36 / 48, "worst": 28 / 48}
    assert set(records["record"]) == {f"runs/{path.name}" for path in (folder / "runs").iterdir()}


@pytest.mark.parametrize("name", ["cifar10-small", "cifar100-cpu", "control", "digits", "full-size", "table1-cpu"])
def test_what_is_committed_makes_the_tables_beside_it(name, tmp_path):
    answer("table", "--results", RESULTS / f"{name}.zip", "--store", tmp_path / "none", "--out", tmp_path, "--format", "csv,md")
    for file in ("table.csv", "table.md"):
        assert (tmp_path / file).read_bytes() == (RESULTS / name / file).read_bytes()


@pytest.mark.parametrize(
    ("file", "other", "cost"),
    [
        ("compare", "noise_sup", ""),
        ("quarter", "noise_sup", "-x0.25"),
        ("four", "noise_sup", "-x4"),
        ("probe", "random_probe", ""),
        ("nslf", "simclr-nslf", ""),
    ],
)
def test_what_is_committed_makes_the_comparisons_beside_it(file, other, cost):
    first, second = f"rush-c10-tiny{cost}@1", f"{other}-c10-tiny{cost}@1"
    shown = rb.compare(first, second, RESULTS / "table1-cpu.zip", seeds=not cost).to_markdown()
    assert (RESULTS / f"table1-cpu/{file}.md").read_text(encoding="utf-8") == shown


def test_what_is_committed_at_full_size_makes_the_tables_of_the_page():
    pack = RESULTS / "full-size.zip"
    columns = ["defense", "clean", "pgd-published", "pgd", "eot", "apgd", "training_passes", "n"]
    shown = {"front.md": rb.table(pack, columns=columns, only={"suite": "linf8-quick*"})}
    for file, votes in (("compare.md", 1), ("votes.md", 64)):
        shown[file] = rb.compare(f"rush-c10-full@{votes}", f"noise_sup-c10-full@{votes}", pack)
    for file, table in shown.items():
        assert (RESULTS / "full-size" / file).read_text(encoding="utf-8") == table.to_markdown()


def test_what_is_committed_makes_the_certified_accuracies_beside_it():
    """By hand: the share of images with the right class at a radius that is large enough, with scipy's interval."""
    shown = (RESULTS / "table1-cpu/certificates.md").read_text(encoding="utf-8")
    lines = [line for line in shown.splitlines() if line.startswith("|") and not line.startswith("|---")]
    (_, *names), *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    with zipfile.ZipFile(RESULTS / "table1-cpu.zip") as file:
        names_of = (name for name in file.namelist() if name.endswith("/certificate.tsv") and not name.startswith("settle/"))
        made = [pd.read_csv(file.open(name), sep="\t") for name in names_of]  # not those of audits
    assert rows and len(rows) == len(made)
    for _, *cells in rows:
        said = dict(zip(names, cells, strict=True))
        radii = {name: float(name.removeprefix("r=")) for name in names if name.startswith("r=")}

        def share(frame, radius):
            right = int(((frame["radius"] >= radius) & (frame["correct"] == 1)).sum())
            ends = binomtest(right, len(frame)).proportion_ci(0.95)
            return f"{100 * right / len(frame):.1f} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"

        assert any(
            all(said[name] == f"≥ {share(frame, radius)}" for name, radius in radii.items()) and said["n"] == str(len(frame))
            for frame in made
        )


@pytest.mark.parametrize(
    ("file", "suite", "more"), [("front.md", "linf8-quick*", ["pgd-published"]), ("small.md", "linf2-quick", [])]
)
def test_what_is_committed_makes_the_tables_of_cifar100(file, suite, more):
    columns = ["defense", "clean", "pgd", *more, "worst", "n"]
    shown = rb.table(RESULTS / "cifar100-cpu.zip", columns=columns, only={"suite": suite}, sort="-worst")
    assert (RESULTS / "cifar100-cpu" / file).read_text(encoding="utf-8") == shown.to_markdown()


def systems() -> list[str]:
    """What the defences at the cost of 1 are called, one vote where there is noise."""
    (first, *_) = tomllib.loads((ROOT / "rush_bench/bench/files/table1-cpu.toml").read_text(encoding="utf-8"))["train"]
    return [f"{recipe}-c10-tiny{votes}" for recipe in first["recipe"] for votes in ("", "@1")]


@pytest.mark.parametrize(
    ("file", "suite", "more", "only"),
    [
        ("systems.md", "linf8-quick*", "pgd-published", {"defense": systems()}),
        ("front.md", "linf8-quick*", "pgd-published", {}),
        ("small.md", "linf2-quick", "", {}),
        ("full.md", "linf8", "aa", {}),
    ],
)
def test_what_is_committed_makes_the_front_of_the_readme(file, suite, more, only):
    columns = [column for column in ("defense", "clean", "pgd", more, "worst", "training_passes", "n") if column]
    shown = rb.table(RESULTS / "table1-cpu.zip", columns=columns, only={"suite": suite, **only}, sort="-worst")
    assert (RESULTS / "table1-cpu" / file).read_text(encoding="utf-8") == shown.to_markdown()
    figure = html.unescape((RESULTS.parent / "docs/table1.svg").read_text(encoding="utf-8"))
    everything = rb.table(RESULTS / "table1-cpu.zip").frame
    drawn = everything[everything["training_passes"].notna() & ~everything["training_seeds"].astype(str).str.contains(",")]
    assert len(drawn) > 60
    for row in drawn.to_dict("records"):  # every training by itself
        assert f"{row['defense']}: {row['worst']:.6g} % [" in figure


def test_holds_what_a_reader_needs_and_no_more(folder, tmp_path):
    names = zipfile.ZipFile(pack(folder, tmp_path / "a.zip", store=folder / "models")).namelist()
    assert {"pack.json", "digits.toml", "cards/rush-cifar10/card.json", "records.csv"} <= {*names}
    assert sum(name.endswith("chunk-0001.npz") for name in names) == 3
    assert not [name for name in names if name.endswith((".npy", ".safetensors", ".log", ".out", "other/card.json"))]
    more = zipfile.ZipFile(pack(folder, tmp_path / "b.zip", adversarial=True)).namelist()
    assert {*more} - {*names} == {name for name in more if name.endswith("adversarial-0009.npy")} != set()


def test_the_same_folder_makes_the_same_bytes(folder, tmp_path_factory):
    first, second = (pack(folder, tmp_path_factory.mktemp("packs") / "p.zip").read_bytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("damage", ["cut", "changed", "other version", "leads out", "no pack"])
def test_what_is_no_whole_pack_is_refused(damage, folder, tmp_path_factory):
    path = pack(folder, tmp_path_factory.mktemp("packs") / "p.zip")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "changed":
        at = content.index(b"chunk-0000.npz") + 100
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        about = {"format": 2 if damage == "other version" else 1, "made_by": {}, "modified": {"../out": 0}}
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("../out", "")
            file.writestr("pack.json" if damage != "no pack" else "else.json", json.dumps(about))
    with pytest.raises(BadInput, match=r"p\.zip"):
        opened(path)


def test_a_folder_without_records_is_no_pack(tmp_path):
    with pytest.raises(BadInput, match="no record"):
        pack(tmp_path)
