"""Names are read off the modules' source: what is not written out is an error that says where."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rush_bench import registry
from rush_bench.errors import BadInput


def registered(path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> dict[str, registry.Entry]:
    """The entries of a package of one module, `mine.py`."""
    (path / "mine.py").write_text(source)
    spec = SimpleNamespace(submodule_search_locations=[path])
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [])
    return registry.Registry("attacks").entries


@pytest.mark.parametrize("source", ['NAMES = {"mine": "what it is"}', 'NAMES: dict[str, str] = {"mine": "what it is"}'])
def test_names_that_are_written_out_are_registered(tmp_path, monkeypatch, source) -> None:
    entry = registered(tmp_path, monkeypatch, source)["mine"]
    assert (entry.summary, entry.module) == ("what it is", "rush_bench.attacks.mine")


@pytest.mark.parametrize(
    "source",
    [
        "NAMES = {name: SUMMARY for name in KINDS}",
        "NAMES = dict(mine='what it is')",
        "NAMES = ['mine']",
        "NAMES = {'mine': 3}",
        "NAMES: dict[str, str] = names()",
        "NAMES |= {'mine': 'what it is'}",
    ],
)
def test_names_that_are_computed_are_an_error_with_the_file_and_line(tmp_path, monkeypatch, source) -> None:
    with pytest.raises(BadInput, match=r"mine\.py, line 3: NAMES must be written out"):
        registered(tmp_path, monkeypatch, f"SUMMARY = 'x'\n\n{source}\n")


def test_a_module_without_names_registers_none(tmp_path, monkeypatch) -> None:
    assert registered(tmp_path, monkeypatch, "NAME = 3\n") == {}
