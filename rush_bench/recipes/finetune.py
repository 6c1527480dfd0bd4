"""Fine-tuning of any encoder by any protocol: of the store, of a finished model, or from a file of others (`--from`).

The numbers are those that each protocol was published with: SLF, ALF and AFF as DynACL and the RobustSSL benchmark run
them (`LinearSettings`, `AFFSettings`), NSLF as RUSH's second stage (its appendix B).
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rush_bench.recipes import digits
from rush_bench.recipes.rush import RushSettings
from rush_bench.training import protocols
from rush_bench.training.protocols import LINEAR_RATES, PretrainedSettings
from rush_bench.training.stage import Plan, Recipe

NAMES = {"finetune": "a linear head, or all weights, on any encoder: --from NAME|FILE --protocol SLF|NSLF|ALF|AFF"}
SIZES = ("epochs", "batch_size")  # the same for all, and what a preset is about


def plans(settings: PretrainedSettings) -> list[Plan]:
    """One stage, that of the protocol."""
    return [protocols.finetuning_plan(settings)]


def card(settings: PretrainedSettings) -> dict[str, Any]:
    """As of a recipe that pre-trains; RUSH's protocol with RUSH's votes."""
    common = protocols.card(settings)
    return {**common, "votes": [1, 64]} if settings.finetune.protocol == "NSLF" else common


def dependent_defaults(settings: PretrainedSettings) -> Mapping[str, Any]:
    """NSLF has RUSH's numbers, not those of SLF."""
    if settings.finetune.protocol != "NSLF":
        return {}
    rush = RushSettings().finetune
    names = [
        setting.name
        for setting in fields(rush)
        if setting.name not in (*SIZES, "protocol", "attack", "alf_lr", "padding", "flip")
    ]
    return {f"finetune.{name}": getattr(rush, name) for name in names}


def presets() -> dict[str, dict[str, Any]]:
    """As of the recipes that pre-train, without their pre-training."""
    shared = {key: layer.items() for key, layer in protocols.presets({}).items()}
    return {key: {k: v for k, v in layer if not k.startswith(("pretrain.", "attack."))} for key, layer in shared.items()}


def make(name: str) -> Recipe:
    """The recipe `finetune`."""
    return Recipe(
        name,
        PretrainedSettings(),
        plans,
        card,
        presets(),
        digits.adapt(name),
        LINEAR_RATES,
        dependent_defaults,
        needs_encoder=True,
    )
