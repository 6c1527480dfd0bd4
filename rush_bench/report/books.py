"""Books of `settle` from its records alone: no defence is loaded, so that figures and the page need no weights."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rush_bench.audit.book import Book, entries_of
from rush_bench.evaluation.records import CellResult

ABOUT = ("suite", "threat_norm", "threat_eps", "dataset", "n")  # what trials of one book share, beside the subject


def books(results: Iterable[CellResult], certificates: Sequence[CellResult] = ()) -> list[Book]:
    """A book a defence, threat, budget and data set, sorted; trials that were never opened are not known to be missing."""
    groups: dict[tuple[Any, ...], list[CellResult]] = defaultdict(list)
    for result in results:
        if "experiment" in result.labels:
            shared = tuple(result.labels[key] for key in ABOUT)
            groups[result.labels["subject"], *shared, result.identity["seed"]].append(result)
    return [_book(groups[key], certificates) for key in sorted(groups, key=str)]


def _book(results: Sequence[CellResult], certificates: Sequence[CellResult]) -> Book:
    own = [result for result in results if not result.labels["on"]] or list(results)
    first = own[0]
    labels = first.labels | {
        "norm": first.labels["threat_norm"],
        "eps": first.labels["threat_eps"],
        "budget_name": first.labels["suite"].removeprefix("settle-"),
    }
    who = {key: value for key, value in first.identity["defense"].items() if key != "votes"}
    mine = tuple(one for one in certificates if one.complete and one.identity["defense"] == who)
    return Book(first.labels["subject"], labels, tuple(entries_of(results)), mine)
