"""Imports run downwards, through every function: what a room knows is below it, and records know nobody above them."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rush_bench"
# From the top; a room imports itself and what stands below it. Rooms of one line know nothing of each other.
ORDER = (
    ("__main__",),
    ("cli", "bench"),
    ("__init__",),  # the front door
    ("api",),
    ("report",),
    ("audits",),
    ("evaluation",),
    ("attacks", "recipes"),
    ("training",),
    ("defenses",),
    ("certificates",),
    ("features", "threats", "hub"),
    ("packs",),
    ("records", "noise", "store", "datasets", "networks", "declared"),
    ("deadline", "devices", "files", "packages", "places", "progress", "protocols", "registry", "settings", "version"),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Arrows that are not bent for a reason: (from, to) -> why.
EXCEPTIONS = {
    ("cli.run", "bench"): "running a benchmark file is a command",
    ("bench", "cli"): "a benchmark file is a list of commands, and its keys are their options",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`evaluation.work`, as it stands below the package; `report.page` for a folder's __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def imports_of(path: Path) -> list[str]:
    return list(imported(path.read_text(encoding="utf-8")))


def imported(source: str) -> Iterator[str]:
    """Every module of the package that a source names in an import, anywhere, below the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            package, _, rest = name.partition(".")
            if package == "rush_bench":
                room = rest.partition(".")[0]
                yield rest if room in LEVEL else "__init__"


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def upward(module: str, imports: Iterable[str]) -> list[str]:
    """What a module imports that does not stand below its room."""
    room = module.partition(".")[0]
    return [
        name
        for name in imports
        if (other := name.partition(".")[0]) != room
        and LEVEL[other] <= LEVEL[room]
        and not any(within(module, a) and within(name, b) for a, b in EXCEPTIONS)
    ]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    assert name_of(path).partition(".")[0] in LEVEL, "a new room has a place in ORDER"
    assert upward(name_of(path), imports_of(path)) == []


def test_every_exception_is_needed() -> None:
    arrows = [(name_of(path), name) for path in FILES for name in imports_of(path)]
    for a, b in EXCEPTIONS:
        assert any(within(module, a) and within(name, b) for module, name in arrows), f"{a} -> {b} is gone: delete it here"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("records.cells", "from rush_bench.evaluation.work import Run", ["evaluation.work.Run"]),
        ("certificates.bounds", "def f():\n    from rush_bench.report import certificates", ["report.certificates"]),
        ("attacks.pgd", "import rush_bench.recipes.rush", ["recipes.rush"]),
        ("report.tables", "from rush_bench.records import Cell\nfrom rush_bench.report import rows", []),
        ("evaluation.work", "from rush_bench.report.rows import rows", ["report.rows.rows"]),
        ("training.run", "from rush_bench import attack", ["__init__"]),
    ],
)
def test_an_arrow_upwards_is_found(module: str, source: str, found: list[str]) -> None:
    assert upward(module, imported(source)) == found


LIGHT = (
    "import rush_bench.records, rush_bench.records.statistics, rush_bench.records.published",
    "from pathlib import Path; from rush_bench.records import load_results; load_results(Path('nowhere'))",
    "from rush_bench.cli import main; [main(['show', name], standalone_mode=False) for name in ('linf8', 'eot')]",
)


def test_records_and_names_need_no_torch() -> None:
    asked = "\n".join(["import sys", *(f"{code}; assert 'torch' not in sys.modules" for code in LIGHT)])
    assert subprocess.run([sys.executable, "-c", asked], env={"PYTHONPATH": str(ROOT)}).returncode == 0
