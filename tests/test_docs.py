"""What the documentation says exists: pages, commands, names, links; and what outputs cite is a page."""

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import rush_bench
from rush_bench.cli import main
from rush_bench.cli.docs import pages
from rush_bench.cli.group import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", ["api", "commands"])
def test_a_page_of_docstrings_says_where_they_are(page) -> None:
    shown = CliRunner().invoke(main, ["docs", page]).stdout
    assert ":::" not in shown and "options:" not in shown and ":module:" not in shown
    said = [f"- `rb.{name}`: " in shown and f"help(rush_bench.{name})" in shown for name in rush_bench.__all__]
    assert all(said) if page == "api" else "rush-bench NAME --help" in shown


def test_the_command_lists_and_shows_every_page() -> None:
    listed = CliRunner().invoke(main, ["docs"])
    assert listed.exit_code == 0 and all(page.stem in listed.stdout for page in PAGES)
    shown = CliRunner().invoke(main, ["docs", "verdict"])
    assert shown.stdout.startswith("# How a verdict is reached")
    assert CliRunner().invoke(main, ["docs", "verdict", "--path"]).stdout.strip().endswith("docs/verdict.md")
    wrong = CliRunner().invoke(main, ["docs", "verdit"])
    assert wrong.exit_code == 2 and "did you mean 'verdict'" in wrong.stderr


def test_the_site_has_every_page() -> None:
    nav = re.findall(r": ([\w-]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted([*(page.name for page in PAGES), "tour.ipynb"])


def test_the_wheel_has_them_and_says_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"docs": "rush_bench/docs"}
    assert (ROOT / "rush_bench" / "py.typed").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_commands_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in set(re.findall(r"\]\(([^)#:]+)\)", text)):
        assert (page.parent / link).exists(), link
    code = "\n".join(re.findall(r"^    .+$|`[^`]+`", text, re.MULTILINE))
    commands = set(re.findall(r"rush-bench ([a-z]+)", code))
    assert commands <= set(COMMANDS), commands - set(COMMANDS)
    names = set(re.findall(r"\brb\.(\w+)", text))
    assert names <= {*rush_bench.__all__}, names - {*rush_bench.__all__}


def test_every_page_that_is_cited_is_there() -> None:
    cited = set()
    for path in (ROOT / "rush_bench").rglob("*.py"):
        cited |= set(re.findall(r"`rush-bench docs ([\w-]+)`", path.read_text(encoding="utf-8")))
    assert "verdict" in cited and cited <= set(pages())


def test_the_glossary_has_the_words_of_the_tables() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for word in ("NSLF", "SLF", "EOT", "bank", "worst", "K", "any of k", "votes"):
        assert re.search(rf"^\*\*[^*]*\b{word}\b", text, re.MULTILINE), word
