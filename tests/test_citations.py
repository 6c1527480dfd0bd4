"""Every citation in code, documents and published numbers names something that is in the repository."""

import re
from pathlib import Path

import pytest

from rush_bench.audits.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("rush_bench", "tests", "docs", "benchmarks", "examples")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".json", ".toml") and "results" not in path.parts and path != Path(__file__)
)
FILES += [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]
SOURCE = re.compile(r"\bS(\d+\.\d+)\b")
# "protocol 4", "protocol 1 to 3", "protocol 5, T15", but not "protocol T15" or "protocol SLF".
SECTION = re.compile(r"\bprotocol (\d+(?:\.\d+)?)(?: to (\d+))?\b")
EXPERIMENT = re.compile(r"\b(?:protocol|sources) [^;)\"\n]{0,16}?(T\d+)\b")
# Documents that are not in the repository: "recipes R2.3", "R5 row 21", "protocol A9", "recipes.md 1.6".
ELSEWHERE = re.compile(
    r"\bR\d+\.\d+\b|\bR[1-9] row|\bR[1-9] T\d|\brecipes(?:\.md)? R?\d|\bprotocol (?:R\d|A\d)|\bpublished\.md\b"
)


def entries() -> set[str]:
    return set(re.findall(r"\*\*S(\d+\.\d+)", (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")))


def sections() -> set[str]:
    return set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8"), re.MULTILINE))


def wrong(text: str) -> list[str]:
    """The citations in a text that lead nowhere."""
    lost = [f"S{number}" for number in SOURCE.findall(text) if number not in entries()]
    lost += [f"protocol {n}" for found in SECTION.findall(text) for n in found if n and n not in sections()]
    lost += [number for number in EXPERIMENT.findall(text) if number not in EXPERIMENTS]
    return lost + ELSEWHERE.findall(text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_citations_resolve(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {number: found for number, line in enumerate(lines, 1) if (found := wrong(line))} == {}


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("as in sources S2.3, S5.21 and protocol 4", []),
        ("sources S2.99", ["S2.99"]),
        ("protocol 12", ["protocol 12"]),
        ("protocol 1 to 33", ["protocol 33"]),
        ("sources S6.2, T99", ["T99"]),
        ("recipes R2.16", ["recipes R2"]),
        ("as R2.16 has it", ["R2.16"]),
        ("protocol A9", ["protocol A9"]),
        ("R5 row 21", ["R5 row"]),
        ("ResNet R50, finetune.protocol=SLF", []),
    ],
)
def test_what_counts_as_lost(text, lost):
    assert sorted(wrong(text)) == sorted(lost)


def test_entries_are_numbered_once():
    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\*\*S(\d+\.\d+)", text)
    assert len(numbers) == len(set(numbers)) > 60
