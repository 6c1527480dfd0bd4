"""The notebook of the documentation runs from the first cell to the last."""

import dataclasses
import json
from pathlib import Path

import pytest

from rush_bench.attacks.suites import parse_suite
from rush_bench.audits import run as probes
from rush_bench.audits.experiments import BUDGETS
from tests.api.test_front_door import SMALL

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def shortened(source: str) -> str:
    """The cell on fewer images, steps and draws than a reader wants."""
    fewer = {"n=40": "n=6", "range(150)": "range(20)", "votes=16": "votes=2", "draws=1000": "draws=100"}
    for long, short in {**fewer, 'suite="linf25.5-quick"': "suite=short"}.items():
        source = source.replace(long, short)
    return source


@pytest.mark.usefixtures("undrawn")
def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flags", "truth", "indicators", "binarization"):  # they have tests of their own
        monkeypatch.setattr(probes, name, lambda *arguments: [])
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **SMALL))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # those are made where it is built
    steps = {"pgd.steps": 2, "eot.steps": 2, "eot.draws": 2, "apgd.steps": 2, "apgd.bank": 2, "square.queries": 20}
    found: dict = {"short": parse_suite("linf25.5-quick", overrides=steps)}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile(shortened(cell["source"]), "tour", "exec"), found)
    assert found["audit"].words["plain"] in ("stands", "weakened", "refuted", "cannot say")
    assert set(found["table"].frame["defense"]) == {"plain", "smoothed@16"}
