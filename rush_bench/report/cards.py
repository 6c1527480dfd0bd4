"""The cards of measured models, and from a card to how the model came about: its system, its seed, what its training cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rush_bench.files import digest
from rush_bench.records import CellResult
from rush_bench.report.trainings import Training
from rush_bench.store import read_cards
from rush_bench.training.checkpoint import IDENTITY, identity
from rush_bench.training.cost import cost_from_card

Card = dict[str, Any]


def cards_of(results: Sequence[CellResult], stores: Iterable[Path]) -> tuple[dict[str, Card], list[str]]:
    """The cards of the models that were measured, by name; and the names of those whose weights are others by now.

    A record names the file that its weights came from by SHA-256: a card of that name with other weights is not its card.
    """
    found: dict[str, Card] = {}
    changed: set[str] = set()
    for in_store in [read_cards(store) for store in stores if store.is_dir()]:
        for labels in (result.labels for result in results):
            name = str(labels.get("model")).partition(":")[0]
            if name in in_store and labels.get("sha256") in in_store[name]["sha256"].values():
                found[name] = in_store[name]
            elif name in in_store:
                changed.add(name)
    return dict(sorted(found.items())), sorted(changed - found.keys())


def training_of(card: Mapping[str, Any]) -> Training:
    """Trainings of one system differ in the seed alone, their own or that of the weights which they start from."""
    if not card.get("settings") or any(key not in card for key in IDENTITY):  # published weights: each is a system of its own
        return Training(digest(card["sha256"]), int(card.get("seed") or 0))
    decides = identity(card)
    seed = decides.pop("seed")
    decides["data"].pop("from", None)
    start = {key: value for key, value in card.get("from", {}).items() if key not in ("name", "sha256", "seed")}
    cost, system = cost_from_card(card), digest([decides, start])
    training = Training(system, seed, seconds=card.get("seconds"))
    return training if cost is None else replace(training, passes=cost.passes, images=cost.images)
