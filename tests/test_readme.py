"""What the README shows is what the files and the code have."""

import importlib.util
import re
from pathlib import Path

import pytest

import rush_bench
from rush_bench.cli.group import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("embed_tables", ROOT / "docs" / "embed_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.BLOCK.findall(README)) >= 1
    assert module.embedded(README) == README, "run `python docs/embed_tables.py`"


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
