"""What the README shows is what the files and the code have."""

import importlib.util
import json
import re
import zipfile
from pathlib import Path

import pytest

import rush_bench
from rush_bench.cli.group import COMMANDS
from rush_bench.files import sha256_file
from rush_bench.store import read_card

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("embed_tables", ROOT / "docs" / "embed_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(module.BLOCK.findall(text)) >= 1
        assert module.embedded(text) == text, "run `python docs/embed_tables.py`"


def test_what_is_said_of_the_control_is_in_its_table():
    table = (ROOT / "results/control/table.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/rush-claim.md").read_text(encoding="utf-8")
    findings = page.partition("## What this says")[2].partition("## What it does not say")[0]
    of_the_readme = README.partition("without its\ncontrast")[2].partition("(docs/rush-claim.md)")[0]
    for text in (findings, of_the_readme):
        numbers = set(re.findall(r"\d+\.\d(?= %)", text)) - {"77.8"}  # the paper's
        assert numbers and all(f" {number} [" in table for number in numbers)


def test_what_is_said_of_the_full_size_is_in_its_tables():
    files = [ROOT / f"results/full-size/{name}.md" for name in ("table", "compare", "votes")]
    tables = "".join(file.read_text(encoding="utf-8") for file in files)
    page = (ROOT / "docs/rush-claim.md").read_text(encoding="utf-8")
    findings = page.partition("## RUSH at the paper's size")[2].partition("## The control")[0].rpartition("<!-- end -->")[2]
    in_short = page.partition("In short:")[2].partition("- **Nor has it")[0]
    of_the_readme = README.partition("Of RUSH the published attack")[2].partition("(docs/rush-claim.md)")[0]
    for text in (findings, in_short, of_the_readme):
        numbers = set(re.findall(r"\d+\.\d", text)) - {"73.7", "77.8", "86.4", "87.9"}  # the paper's
        assert numbers and all(re.search(rf"[ \[+-]{re.escape(number)}[ ,\]]", tables) for number in numbers)


def test_what_is_said_of_the_models_is_on_their_cards():
    rows = re.findall(r"^\| `([\w./-]+)` \| (.*) \|$", (ROOT / "models/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows
    for name, said in rows:
        card = read_card(ROOT / "models", name)
        last = card["validation"]["history"][-1]
        measured = [f"{100 * last[key]:.1f}" for key in ("clean", "robust", "noisy") if key in last]
        assert re.findall(r"\d+\.\d", said) == measured
        assert all(sha256_file(ROOT / f"models/{name}/{stem}.safetensors") == sha for stem, sha in card["sha256"].items())


def test_what_is_said_of_the_audit_of_pgd_at_is_in_its_file():
    page = (ROOT / "docs/rush-claim.md").read_text(encoding="utf-8")
    said = re.search(r"its claim of ([\d.]+) % \*(.+)\*: ([\d.]+) % \[([\d.]+), ([\d.]+)\]", page)
    with zipfile.ZipFile(ROOT / "results/table1-cpu.zip") as file:
        verdict = json.loads(file.read("audit/pgd_at-c10-tiny-cifar10-linf8-quick.json"))["verdict"]
    numbers = [verdict["claim"]["value"], *(verdict["worst"][end] for end in ("value", "low", "high"))]
    assert said[2] == verdict["word"] and [said[k] for k in (1, 3, 4, 5)] == [f"{100 * number:.1f}" for number in numbers]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_commands_and_names_exist():
    commands = set(re.findall(r"^    rush-bench ([a-z]+)|`rush-bench ([a-z]+)", README, re.MULTILINE))
    commands = {name for pair in commands for name in pair if name}
    assert {"train", "attack", "table"} <= commands <= set(COMMANDS)
    for name in set(re.findall(r"rb\.(\w+)", README)):
        assert hasattr(rush_bench, name)
    targets = set(re.findall(r"^    make (\w+)", README, re.MULTILINE))
    assert targets and all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
