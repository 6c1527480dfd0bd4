"""From a model's card to how it came about: its system, its seed, what its training cost."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rush_bench.files import digest
from rush_bench.report.trainings import Training
from rush_bench.training.checkpoint import IDENTITY, identity
from rush_bench.training.cost import cost_from_card


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
