"""RoCL: instance-wise attacks in contrastive learning, three views, detached keys (Kim et al. 2020; sources S2.5)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.settings import NonNegative, Several
from rush_bench.training import protocols
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.losses import multi_view
from rush_bench.training.protocols import LinearSettings, PretrainedSettings
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"rocl": "RoCL: instance-wise adversarial contrastive learning (Kim et al. 2020)"}


@dataclass(frozen=True)
class RoCLPretrainSettings(ContrastiveSettings):
    """S2.5: LARS on all tensors, 256 images on each of two devices, warm-up from .1 to 15 times that."""

    optimiser: Literal["sgd", "lars"] = "lars"
    lars_exclude_1d: bool = False
    lr: float = 1.5
    lr_min: float = 0.0
    warmup_epochs: float = 10
    warmup_from: float = 0.1
    weight_decay: float = 1e-6
    projector_hidden: int = 2048
    pair_weight: NonNegative = 1 / 256  # lambda of NT(t + d, t')
    detach_keys: bool = True  # no gradient through the second factor of a similarity
    attack_group: Several = 256  # images whose views are each other's negatives in attack and pair term: one device's share


@dataclass(frozen=True)
class RoCLLinearSettings(LinearSettings):
    """S2.5's linear stage, on images without augmentation: LE; r-LE is finetune.protocol=ALF."""

    epochs: int = 150
    batch_size: int = 1024
    lr: float = 0.1
    milestones: tuple[float, ...] = (30, 50, 100)
    weight_decay: float = 5e-4
    augment: Literal["none", "crop_flip"] = "none"
    head_init: Literal["default", "zero"] = "default"


@dataclass(frozen=True)
class RoCLSettings(PretrainedSettings):
    """No normalisation of the input; eps and step as rounded in the code (sources S1.7)."""

    attack: InnerSettings = field(default_factory=lambda: InnerSettings(eps=0.0314, step=0.007, steps=7))
    pretrain: RoCLPretrainSettings = field(default_factory=RoCLPretrainSettings)
    finetune: RoCLLinearSettings = field(
        default_factory=lambda: RoCLLinearSettings(attack=InnerSettings(eps=0.0314, step=0.007))
    )


class RoCLStage(ContrastiveStage):
    """Views t, t' and t + d, where d maximises the contrastive loss of the pair (t + d, t')."""

    settings: RoCLPretrainSettings

    def __init__(self, context: Context, settings: RoCLPretrainSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings)
        self.settings, self.attack = settings, attack

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Projections of views, all in one BatchNorm batch."""
        with self.autocast():
            return self.projector(self.network.encoder(torch.cat(views))).chunk(len(views))

    def pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """NT of projections (B, D) of two views by groups of a device, as many losses as groups. Keys as the settings say."""
        settings = self.settings
        groups = zip(first.split(settings.attack_group), second.split(settings.attack_group), strict=True)
        return torch.stack([multi_view(pair, settings.temperature, settings.detach_keys) for pair in groups])

    def attacked(self, first: Tensor, second: Tensor, batch: Batch) -> Tensor:
        """t + d: eq. 3's instance-wise attack, on the first view alone."""
        with attack_mode(self, self.attack.mode), torch.no_grad():
            (fixed,) = self.embed(second)
        return self.attack.run(self, lambda x: self.pairs(self.embed(x)[0], fixed).sum(), first, batch.generator)

    def loss(self, batch: Batch) -> Tensor:
        t1 = self.views(batch.images, batch.generator)
        t2 = self.views(batch.images, batch.generator)
        attacked, settings = self.attacked(t1, t2, batch), self.settings
        pair = self.pairs(*self.embed(attacked, t2)).mean()  # a BatchNorm batch of its own, before the other, as in the code
        u, v, w = self.embed(t1, t2, attacked)
        # Six ordered pairs, each summed over images and divided by 3N: twice the mean over anchors and positives.
        three_views = 2 * multi_view((u, v, w), settings.temperature, settings.detach_keys)
        return three_views + settings.pair_weight * pair


def plans(settings: RoCLSettings) -> list[Plan]:
    """Pre-training, then a fine-tuning protocol."""
    pretrain, attack = settings.pretrain, settings.attack
    # t' as the attack's target; t attacked; the pair; the three
    passes = FORWARD + attack.steps * ATTACK_STEP + 2 * TRAIN_STEP + 3 * TRAIN_STEP
    first = Plan("pretrain", "pretrain", pretrain, lambda context: RoCLStage(context, pretrain, attack), passes=passes)
    return [first, protocols.finetuning_plan(settings)]


def card(settings: RoCLSettings) -> dict[str, Any]:
    """Deterministic as it is listed; `rocl-cifar10@30` averages the logits of 30 random views (the paper's transformation-
    smoothed inference, S2.5; no code of it is released: the views are those of its pre-training, the number is the user's).
    """
    pretrain = settings.pretrain
    names = ("crop_floor", "flip", "jitter", "jitter_p", "gray_p", "interpolation")
    return {**protocols.card(settings), "transform": {"name": "views"} | {name: getattr(pretrain, name) for name in names}}


PRESETS = protocols.presets({"pretrain.lr": 1.0})


def make(name: str) -> Recipe:
    """The recipe `rocl`."""
    return Recipe(
        name, RoCLSettings(), plans, card, PRESETS, digits.adapt(name), finetuning_settings=protocols.FINETUNING_SETTINGS
    )
