"""What a training costs in passes of an image through the encoder (see `Plan.passes`), from its settings or its card alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rush_bench.errors import RushBenchError
from rush_bench.registry import recipes
from rush_bench.settings import override
from rush_bench.training.stage import Recipe


@dataclass(frozen=True)
class Cost:
    """Images shown to the network in a stage or a training, counted each time, and their passes through the encoder."""

    images: int
    passes: float


def stage_costs(system: Recipe, settings: Any, sizes: Mapping[str, Any]) -> dict[str, Cost]:
    """What each stage costs; `sizes` are those of its data, `n_train` say, as a card has them. Epochs are whole batches."""
    costs = {}
    for plan in system.plans(settings):
        stage = plan.settings
        images = stage.epochs * (sizes[f"n_{plan.split}"] // stage.batch_size * stage.batch_size)
        costs[plan.name] = Cost(images, images * plan.encoder_passes)
    return costs


def cost_from_card(card: Mapping[str, Any]) -> Cost | None:
    """The cost of a model's training, from its card; None if it was imported, started from other weights or is not counted."""
    if "from" in card or not card.get("settings"):
        return None
    try:
        system = recipes.load(card["recipe"])
        stages = stage_costs(system, override(system.settings, card["settings"]), card["data"]).values()
    except (RushBenchError, KeyError):  # a plug-in that is not here, a setting that is no more
        return None
    total = Cost(sum(stage.images for stage in stages), sum(stage.passes for stage in stages))
    return None if math.isnan(total.passes) else total
