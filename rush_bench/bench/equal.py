"""Equal training cost: a paper's schedule, stretched to what another training spends in passes (`Plan.passes`).

1. A linear head (SLF, NSLF, ALF) gets as many epochs as the reference's. Full fine-tuning (AFF) gets half of the budget.
2. The stages before share the rest as their paper shares it: each gets the whole number of epochs nearest to what that buys.
3. Decays, warm-ups and what else is counted in epochs keep their place in the stage. All other settings are the paper's.
"""

import typing
from dataclasses import dataclass
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.training.stage import Plan, Recipe

COUNTED_IN_EPOCHS = ("warmup_epochs", "milestones", "ramp", "ramp_epochs", "anneal_every")
LINEAR = ("SLF", "ALF", "NSLF")


@dataclass(frozen=True)
class Budget:
    """What the reference spends: passes per image of its data, and epochs of its linear head."""

    passes: float
    head: int


@dataclass(frozen=True)
class Stretched:
    """The settings that fit a recipe into the budget, and the passes per image that they take."""

    sets: dict[str, Any]
    passes: float


def budget_of(system: Recipe, settings: Any) -> Budget:
    """The budget that a training sets; BadInput if its passes are not counted, or it has no linear head."""
    plans = system.plans(settings)
    if not _linear(settings, plans[-1]):
        raise BadInput(f"{system.name} has no linear head, whose epochs equal_cost takes; name a recipe such as rush")
    return Budget(_training_passes(system, plans), plans[-1].settings.epochs)


def stretched(system: Recipe, settings: Any, budget: Budget, share: float) -> Stretched:
    """By the rule at the top; `settings` are the paper's, `share` the part of the budget that this training gets."""
    plans, total = system.plans(settings), share * budget.passes
    _training_passes(system, plans)
    each = {plan.name: plan.encoder_passes for plan in plans}
    last, left, before, epochs = plans[-1], total, plans, dict[str, int]()
    linear = _linear(settings, last)
    if linear or last.name in ("aff", "finetune"):
        before = plans[:-1]
        epochs[last.name] = budget.head if linear else max(1, round(total / 2 / each[last.name]))
        left -= epochs[last.name] * each[last.name]
    if linear and not before and share != 1:
        raise BadInput(
            f"cost = {share:g} changes nothing of {system.name}, which has a linear head alone, with as many epochs as that of "
            "[equal_cost]; write cost = 1"
        )
    paper = sum(each[plan.name] * plan.settings.epochs for plan in before)
    if 2 * left < sum(each[plan.name] for plan in before):
        stages = " and ".join(plan.name for plan in before)
        raise BadInput(f"cost = {share:g} pays less than half an epoch of {stages} of {system.name} beside its head; give more")
    for plan in before:
        epochs[plan.name] = max(1, round(plan.settings.epochs * left / paper))
    sets: dict[str, Any] = {}
    for plan in plans:
        scale = epochs[plan.name] / plan.settings.epochs
        given = getattr(settings, plan.name)  # Free-m's count what its plan's do m times
        sets |= {f"{plan.name}.epochs": max(1, round(given.epochs * scale))} | _in_epochs(given, f"{plan.name}.", scale)
    main = (before or plans)[-1]
    if hasattr(settings, "attack"):
        sets |= _in_epochs(settings.attack, "attack.", epochs[main.name] / main.settings.epochs)
    return Stretched(sets, sum(each[name] * count for name, count in epochs.items()))


def _linear(settings: Any, plan: Plan) -> bool:
    return plan.name == "linear" or (plan.name == "finetune" and settings.finetune.protocol in LINEAR)


def _training_passes(system: Recipe, plans: list[Plan]) -> float:
    spent = sum(plan.encoder_passes * plan.settings.epochs for plan in plans)
    if spent != spent:
        raise BadInput(f"the passes of {system.name} are not counted (`Plan.passes`); leave its cost out")
    return spent


def _in_epochs(settings: Any, prefix: str, scale: float) -> dict[str, Any]:
    """What these settings count in epochs, at `scale` of the paper's epochs."""
    scaled: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if name not in COUNTED_IN_EPOCHS or not value:
            continue
        if isinstance(value, tuple):
            scaled[prefix + name] = tuple(round(part * scale, 2) for part in value)
        else:
            scaled[prefix + name] = max(1, round(value * scale)) if hint is int else round(value * scale, 2)
    return scaled
