"""Names and lazy targets. Listing a registry imports neither torch nor the modules it names.

A built-in is found by its file: every module of the package that states a literal `NAMES = {"name": "one-line summary"}`
registers those names, and its function `make(name)` builds the object when it is asked for. Outside this repository the
same is done by entry point: group `rush_bench.<kind>`, the entry's name is the registered name and its value is the object.
"""

import ast
import fnmatch
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, unknown_name


@dataclass(frozen=True)
class Entry:
    """One registered name: where it is and what it is in one line."""

    name: str
    summary: str
    module: str
    entry_point: importlib.metadata.EntryPoint | None = None


class Registry:
    """The names of one kind (recipes, attacks, datasets)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.package = f"rush_bench.{kind}"

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every name, built-in first, sorted within each."""
        found: dict[str, Entry] = {}
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None
        for folder in spec.submodule_search_locations:
            for file in sorted(Path(folder).glob("*.py")):
                for name, summary in _literal_names(file).items():
                    found[name] = Entry(name, summary, f"{self.package}.{file.stem}")
        for point in sorted(importlib.metadata.entry_points(group=self.package), key=lambda p: p.name):
            if point.name in found:
                raise BadInput(f"the plug-in {point.value!r} registers {point.name!r}, which exists; rename its entry point")
            distribution = point.dist.name if point.dist else "unknown package"
            found[point.name] = Entry(point.name, f"plug-in from {distribution}", point.module, point)
        return found

    def get(self, name: str) -> Entry:
        """The entry of a name; a wrong one is a BadInput with a suggestion."""
        if name not in self.entries:
            raise unknown_name(self.kind.rstrip("s"), name, self.entries)
        return self.entries[name]

    def load(self, name: str) -> Any:
        """The object behind a name (this is where its module is imported)."""
        entry = self.get(name)
        if entry.entry_point is not None:
            return entry.entry_point.load()
        return importlib.import_module(entry.module).make(name)


def match(kind: str, patterns: Iterable[str], known: Iterable[str]) -> list[str]:
    """The known names that match any of the patterns (shell wildcards, `all`), in the known order; none is a BadInput."""
    known = list(known)
    chosen: list[str] = []
    for pattern in patterns:
        hits = known if pattern == "all" else fnmatch.filter(known, pattern)
        if not hits:
            raise unknown_name(kind, pattern, known)
        chosen += [name for name in hits if name not in chosen]
    return sorted(chosen, key=known.index)


def _literal_names(file: Path) -> dict[str, str]:
    """What a module states as NAMES; BadInput, with the file, for one that is not written out."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "NAMES" for target in targets):
            try:
                names = ast.literal_eval(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else None
            except ValueError:
                names = None
            if not isinstance(names, dict) or not all(isinstance(part, str) for entry in names.items() for part in entry):
                raise BadInput(
                    f'{file}, line {node.lineno}: NAMES must be written out, as in NAMES = {{"name": "one-line summary"}}; '
                    "it is read without importing the module"
                )
            return names
    return {}


recipes = Registry("recipes")
attacks = Registry("attacks")
datasets = Registry("datasets")
