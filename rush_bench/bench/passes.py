"""What a training costs in passes of an image through the encoder, from its settings alone.

Counted is 1 forward, 1 more back to the image, 1 more for the weights' gradients: an image that trains costs 3, one that a
step of an attack looks at costs 2. benchmarks/training_cost.py holds the table against FLOPs counted in real steps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rush_bench.errors import RushBenchError
from rush_bench.registry import recipes
from rush_bench.settings import override
from rush_bench.training.stage import Plan, Recipe

LOOK, ATTACK, LEARN = 1, 2, 3  # forward; and back to the image, whose gradient alone is wanted; and the weights' gradients
SECOND = 4  # a gradient in the image that is itself differentiated in it: forward and back, twice
OTHER_ROWS = ("selfie", "joint", "diffusion")  # stages whose rows are not those of the encoder: not counted here


def acl(s: Any) -> float:
    attacked = {"S2S": 0, "A2A": 2, "A2S": 1, "DS": 2}[s.pretrain.variant]  # views
    learn = {"S2S": 2, "A2A": 2, "A2S": 2, "DS": 4}[s.pretrain.variant]  # DS: both views, clean and attacked
    key = LOOK if s.pretrain.variant == "A2S" else 0  # the clean view, for the attack
    return attacked * s.attack.steps * ATTACK + key + learn * LEARN


def dynacl(s: Any) -> float:
    return 2 * s.attack.steps * ATTACK + 2 * (LEARN + LOOK)  # both views are attacked; queries learn, keys pass


def advcl(s: Any) -> float:
    return 3 * LEARN + 2 * s.attack.steps * ATTACK + 2 * LEARN  # a, b, q; one image attacked for each of two terms


def rocl(s: Any) -> float:
    return LOOK + s.attack.steps * ATTACK + 2 * LEARN + 3 * LEARN  # t' as the attack's target; t attacked; the pair; the three


def byorl(s: Any) -> float:
    one_way = LOOK + s.attack.steps * ATTACK + LEARN  # the target network; the online view
    return (2 if s.pretrain.symmetric else 1) * one_way


def deacl(s: Any) -> float:
    return LOOK + s.attack.steps * ATTACK + 2 * LEARN  # teacher; student attacked; clean and attacked


def trades(attack: Any) -> float:
    return LOOK + attack.steps * ATTACK + 2 * LEARN  # p(x) for the attack; clean and attacked


def dataaug(s: Any) -> float:
    return trades(s.attack) - (LOOK if s.train.mixes else 0)  # mixed labels take the place of p(x)


def pgd_at(s: Any) -> float:
    return s.attack.steps * ATTACK + LEARN


def smoothadv(s: Any) -> float:
    # Each image is there m times, in m parts of the mini-batch in turn: m steps of as many rows as a mini-batch has images.
    return s.attack.draws * (s.attack.steps * ATTACK + LEARN)


def random_probe(s: Any) -> float:
    return LOOK if s.finetune.bn_adapt in ("none", "stats") else ATTACK  # back to BatchNorm's biases, no convolution's weights


def task(s: Any) -> float:
    return s.attack.steps * ATTACK + 2 * LEARN  # clean and attacked


def joint(s: Any) -> float:
    diverse = s.joint.diversity != 0
    # Where the weights minimise log det too, the backward pass goes twice through the gradient's graph and the image's.
    worst = LOOK + 1 + 2 + 2 if diverse and s.joint.penalise else LEARN
    return s.attack.steps * (SECOND if diverse else ATTACK) + LEARN + worst


# "recipe stage": passes an image, before the stages that `fine_tuning` knows.
PASSES: dict[str, Callable[[Any], float]] = {
    "acl pretrain": acl,
    "advcl simclr": lambda s: 2 * LEARN,
    "advcl pretrain": advcl,
    "byorl_reimpl pretrain": byorl,
    "cohen train": lambda s: LEARN,
    "dataaug train": dataaug,
    "deacl pretrain": lambda s: 2 * LEARN,
    "deacl distil": deacl,
    "dynacl pretrain": dynacl,
    "dynacl_pp pretrain": dynacl,
    "dynacl_pp probe": lambda s: LOOK,
    "dynacl_pp trades": lambda s: trades(s.trades.attack),
    "free train": lambda s: s.train.replays * LEARN,  # the image's gradient comes with the weights'
    "noise_sup train": lambda s: LEARN,
    "pgd_at train": pgd_at,
    "purify diffusion": lambda s: LEARN,
    "purify_simclr diffusion": lambda s: LEARN,
    "purify_simclr pretrain": lambda s: 2 * LEARN,
    "random_probe finetune": random_probe,
    "random_probe_frozen finetune": random_probe,
    "rocl pretrain": rocl,
    "rush pretrain": lambda s: 2 * LEARN,
    "simclr pretrain": lambda s: 2 * LEARN,
    "smoothadv train": smoothadv,
    "ssp rotation": task,
    "ssp jigsaw": task,
    "ssp selfie": task,
    "ssp_joint joint": joint,
    "ssp_jigsaw jigsaw": task,
    "ssp_rotation rotation": task,
    "ssp_selfie selfie": task,
    "trades train": lambda s: trades(s.attack) + LOOK,  # and clean once more
}


def fine_tuning(settings: Any, plan: Plan) -> float:
    """Passes of an image in the stage that follows pre-training (`protocols.finetuning`, and SSP's own)."""
    if plan.name == "aff" and settings.aff.objective == "trades":
        return trades(settings.aff.attack)
    if plan.name == "aff" or (plan.name == "finetune" and hasattr(settings, "finetune_attack")):
        attack = settings.aff.attack if plan.name == "aff" else settings.finetune_attack
        return attack.steps * ATTACK + LEARN
    own = settings.linear if plan.name == "linear" else settings.finetune
    if own.protocol == "ALF":  # the head alone learns; TRADES looks at the clean image twice more
        return own.attack.steps * ATTACK + LOOK + (2 * LOOK if own.alf_loss == "trades" else 0)
    return LOOK if own.bn_adapt in ("none", "stats") else ATTACK


def of_stage(system: Recipe, settings: Any, plan: Plan) -> float:
    """Passes of one image in one epoch of a stage; NaN where nobody has counted them."""
    if plan.name in OTHER_ROWS:
        return math.nan
    if known := PASSES.get(f"{system.name} {plan.name}"):
        return known(settings)
    return fine_tuning(settings, plan) if plan.name in ("finetune", "linear", "aff") else math.nan


@dataclass(frozen=True)
class Cost:
    """Images that a stage or a training shows to its network, one as often as it is shown, and passes through the encoder."""

    images: int
    passes: float


def of_stages(system: Recipe, settings: Any, sizes: Mapping[str, Any]) -> dict[str, Cost]:
    """What each stage costs; `sizes` are those of its data, `n_train` say, as a card has them. Epochs are whole batches."""
    made = {}
    for plan in system.plans(settings):
        own = plan.settings
        images = own.epochs * (sizes[f"n_{plan.split}"] // own.batch_size * own.batch_size)
        made[plan.name] = Cost(images, images * of_stage(system, settings, plan))
    return made


def of_card(card: Mapping[str, Any]) -> Cost | None:
    """What the training of a model took, from its card; None for what was imported, began elsewhere or nobody has counted."""
    if "from" in card or not card.get("settings"):
        return None
    try:
        system = recipes.load(card["recipe"])
        stages = of_stages(system, override(system.settings, card["settings"]), card["data"]).values()
    except (RushBenchError, KeyError):  # a plug-in that is not here, a setting that is no more
        return None
    whole = Cost(sum(stage.images for stage in stages), sum(stage.passes for stage in stages))
    return None if math.isnan(whole.passes) else whole
