"""The notebook of the documentation runs from the first cell to the last."""

import dataclasses
import json
from pathlib import Path

import pytest

from rush_bench.audits import run as probes
from rush_bench.audits.experiments import BUDGETS
from tests.api.test_front_door import SMALL

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


@pytest.mark.usefixtures("unlooked")
def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flags", "truth", "indicators", "binarization"):  # they have tests of their own
        monkeypatch.setattr(probes, name, lambda *arguments: [])
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **SMALL))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # those are made where it is built
    found: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":  # on fewer images than a reader wants
            exec(compile(cell["source"].replace("n=40", "n=8").replace("range(150)", "range(20)"), "tour", "exec"), found)
    assert found["audit"].words["plain"] in ("stands", "weakened", "refuted", "cannot say")
    assert set(found["table"].frame["defense"]) == {"plain", "smoothed@16"}
