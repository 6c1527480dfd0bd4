"""The settings that a built-in attack declares, read from its source as NAMES are: importing it takes torch's seconds."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rush_bench.registry import Entry

PACKAGE = Path(__file__).parent
FIELD = re.compile(r"^    (\w+): [^#\n]*#\s*(.+)$", re.MULTILINE)


def declared(entry: Entry) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of the class of a built-in attack with their defaults, its bases' first; and the comments beside them."""
    tree, _ = _read(entry.module)
    (make,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "make")
    statement: Any = make.body[-1]
    target = statement.value
    if isinstance(target, ast.Subscript):  # {"pgd": PGD, "eot": EOT}[name]
        table: Any = target.value
        target = {key.value: value for key, value in zip(table.keys, table.values, strict=True)}[entry.name]
    return _class(entry.module, target.id)


def comments(source: str) -> dict[str, str]:
    """The comments beside the fields of a class, from its source."""
    return dict(FIELD.findall(source))


def _class(module: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Defaults, and the comments beside them, of a class of a module of this package and of its bases."""
    tree, text = _read(module)
    constants = dict(_assigned(tree))
    modules = {alias.name: node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    definition: Any = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    settings: dict[str, Any] = {}
    remarks: dict[str, str] = {}
    for base in definition.bases:
        inherited = _class(modules.get(base.id, module), base.id)
        settings, remarks = settings | inherited[0], remarks | inherited[1]
    for field, value in _assigned(definition):
        settings[field] = ast.literal_eval(constants[value.id] if isinstance(value, ast.Name) else value)
    return settings, remarks | comments(ast.get_source_segment(text, definition) or "")


def _read(module: str) -> tuple[Any, str]:
    text = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
    return ast.parse(text), text


def _assigned(tree: Any) -> Iterator[tuple[str, Any]]:
    """Names and their values, of the statements of a module or a class; a ClassVar is no setting."""
    for node in tree.body:
        plain = isinstance(node, ast.AnnAssign) and node.value and not ast.unparse(node.annotation).startswith("ClassVar")
        target = node.target if plain else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name):
            yield target.id, node.value
