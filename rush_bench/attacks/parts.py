"""The parts of AutoAttack, by name. No torch is imported."""

from collections.abc import Sequence
from typing import Literal

Name = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
STANDARD: tuple[Name, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")


def parts_for(classes: int, parts: Sequence[Name] = STANDARD) -> tuple[Name, ...]:
    """Those that exist for so few classes: DLR compares three of them, the targeted one four and gives way to the other."""
    found: list[Name] = ["apgd-dlr" if part == "apgd-t" and classes < 4 else part for part in parts]
    return tuple(dict.fromkeys(part for part in found if part != "apgd-dlr" or classes > 2)) or ("apgd-ce",)


def settled(classes: int, parts: tuple[Name, ...]) -> tuple[Name, ...]:
    """The parts as they are given, empty for the standard ones, if all exist for so many classes; else those that do."""
    wanted = parts or STANDARD
    found = parts_for(classes, wanted)
    return parts if found == wanted else found
