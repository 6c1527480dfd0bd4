"""The evidence of `settle` from its records alone: no defence is loaded, so that figures and the page need no weights."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rush_bench.audits.evidence import Evidence, entries_of
from rush_bench.records import CellResult

SHARED = ("subject", "suite", "threat_norm", "threat_eps", "dataset", "n")  # labels that all trials of one evidence share
TRIAL = ("experiment", "trial", "on")


def evidence_of(results: Iterable[CellResult], certificates: Sequence[CellResult] = ()) -> list[Evidence]:
    """One per defence, threat, budget and images, sorted; trials that were never opened are not known to be missing.

    Where a trial is there under several settings, as after a change of its attack, it is the last written that is finished.
    """
    groups: dict[tuple[Any, ...], list[CellResult]] = defaultdict(list)
    for result in results:
        if {*SHARED, *TRIAL} <= result.labels.keys():
            shared = tuple(result.labels[key] for key in SHARED)
            groups[*shared, result.identity["images"], result.identity["seed"]].append(result)
    return [_evidence(groups[key], certificates) for key in sorted(groups, key=str)]


def _written(result: CellResult) -> tuple[bool, float, str]:
    return result.complete, (result.folder / "cell.json").stat().st_mtime, result.folder.name


def _evidence(results: Sequence[CellResult], certificates: Sequence[CellResult]) -> Evidence:
    last = {tuple(result.labels[key] for key in TRIAL): result for result in sorted(results, key=_written)}
    results = list(last.values())
    first = next((result for result in results if not result.labels["on"]), results[0])
    labels = first.labels | {
        "norm": first.labels["threat_norm"],
        "eps": first.labels["threat_eps"],
        "budget_name": first.labels["suite"].removeprefix("settle-"),
    }
    defense = {key: value for key, value in first.identity["defense"].items() if key != "votes"}
    mine = tuple(one for one in certificates if one.complete and one.identity["defense"] == defense)
    return Evidence(first.labels["subject"], labels, tuple(entries_of(results)), mine)
