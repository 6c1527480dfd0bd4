"""Published numbers with their sources: `published.json` beside this file. They never share a column with our own (A6)."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.files import read_json

BLOCKS = ("CIFAR-10", "CIFAR-100", "CIFAR-10 -> STL-10", "STL-10 -> STL-10")  # the order of Table 1
FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Fact:
    """A statement and where it was read: tag [C], [S], [R] or [T], and the section that gives it.

    Not `checked`: written down when the row was, and its source not opened again since. It is shown as that.
    """

    value: str
    evidence: str
    checked: bool = True

    def __str__(self) -> str:
        return self.value if self.checked else f"{self.value} (unchecked)"


@dataclass(frozen=True)
class PublishedRow:
    """One row of the RUSH paper's Table 1, in percent. None: the paper prints a dash, or nobody states it.

    `system` is the recipe that reproduces it, at `votes` votes where that matters; `beside` says whether a measurement of
    that recipe belongs beside this row (not beside a WideResNet-70-16). `footnotes` are keys of `Published.footnotes`.
    """

    block: str
    method: str
    system: str
    votes: int | None
    standard: float | None
    pgd: float | None
    aa: float | None
    footnotes: tuple[str, ...]
    beside: bool
    architecture: Fact | None
    extra_data: Fact | None
    protocol: Fact | None
    remark: Fact | None
    source: str


@dataclass(frozen=True)
class Anchor:
    """A re-evaluation by others: clean and AutoAttack accuracy at l-inf 8/255, or mean accuracy under corruptions."""

    section: str
    dataset: str
    pretrain_dataset: str | None
    method: str
    system: str | None
    protocol: str | None
    clean: float | None
    aa: float | None
    architecture: str | None
    extra_data: str | None
    evidence: str
    source: str
    corruptions: float | None = None
    checked: bool = True  # as a fact's


@dataclass(frozen=True)
class Published:
    """Table 1 in its order, its footnotes, and the anchors with a caution a section."""

    table1: tuple[PublishedRow, ...]
    footnotes: dict[str, str]
    anchors: tuple[Anchor, ...]
    cautions: dict[str, str]


@functools.cache
def published(path: Path = FILE) -> Published:
    """The published numbers, checked: known blocks and footnotes, percentages, a source each, nothing unverified."""
    found = read_json(path)
    try:
        table1 = tuple(_row(entry) for entry in found["table1"])
        anchors = tuple(Anchor(**entry) for entry in found["anchors"])
        footnotes, cautions, tags = found["footnotes"], found["cautions"], found["evidence"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a file of published numbers: {error}") from error
    for row in table1:
        numbers = (row.standard, row.pgd, row.aa)
        facts = [fact for fact in (row.architecture, row.extra_data, row.protocol, row.remark) if fact]
        known = row.block in BLOCKS and set(row.footnotes) <= footnotes.keys() and row.source
        _check(path, row.method, numbers, known and not any("[M]" in fact.evidence for fact in facts))
    for anchor in anchors:
        known = anchor.evidence in tags and anchor.section in cautions and anchor.source
        _check(path, anchor.method, (anchor.clean, anchor.aa, anchor.corruptions), bool(known))
    return Published(table1, footnotes, anchors, cautions)


def _row(entry: dict[str, Any]) -> PublishedRow:
    facts = ("architecture", "extra_data", "protocol", "remark")
    values = {name: Fact(**entry[name]) if entry[name] else None for name in facts}
    return PublishedRow(**entry | values | {"footnotes": tuple(entry["footnotes"])})


def _check(path: Path, method: str, numbers: tuple[float | None, ...], known: object) -> None:
    stated = [number for number in numbers if number is not None]
    if not known or not stated or not all(0 <= number <= 100 for number in stated):
        raise BadInput(f"{path}: the entry {method!r} names an unknown block, footnote or source, or is no percentage")
