"""Free adversarial training (Shafahi et al. 2019; sources S2.6): each mini-batch replayed m times, one backward pass
for the weights' gradient and the images' alike."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.settings import Count
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import RunSettings
from rush_bench.training.seeds import derive
from rush_bench.training.stage import TRAIN_STEP, Batch, Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets, refuse_noise
from rush_bench.training.supervised import card as supervised

NAMES = {"free": "Free-m: adversarial training at the cost of plain training, mini-batches replayed (Shafahi et al. 2019)"}


@dataclass(frozen=True)
class FreeTrainSettings(SupervisedSettings):
    """S2.6: 80,000 updates, replays included and whatever their number, rates falling after 40,000 and 60,000.

    `epochs`, `milestones` and `warmup_epochs` count 351 updates each, as many as 45,000 images in batches of 128 take once;
    there is one pass over the images for each m of them.
    """

    replays: Count = 8  # m
    epochs: int = 228
    milestones: tuple[float, ...] = (114, 171)
    weight_decay: float = 2e-4


@dataclass(frozen=True)
class FreeSettings(RunSettings):
    """S2.6, on ResNet-18; the paper's WRN-32-10, each image standardised: `--set network.name=wrn-32-10`.

    `attack` validates; its eps trains as well.
    """

    train: FreeTrainSettings = field(default_factory=FreeTrainSettings)
    attack: InnerSettings = field(default_factory=InnerSettings)


class FreeStage(SupervisedStage):
    """Algorithm 1. The perturbation outlives its mini-batch, as a row for each place in the batch."""

    def __init__(self, context: Context, settings: FreeTrainSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings, attack)
        self.replays, self.eps = settings.replays, attack.eps
        self.delta: Tensor
        self.register_buffer("delta", torch.zeros(settings.batch_size, *self.splits["train"].shape))

    def inputs(self, batch: Batch) -> Tensor:
        """The same augmented images in all replays of a mini-batch."""
        seed = derive(self.seed, self.name, "views", batch.step // self.replays)
        generator = torch.Generator(batch.generator.device).manual_seed(seed)
        return super().inputs(Batch(batch.data, batch.indices, generator, batch.epoch, batch.step))

    def backward(self, batch: Batch) -> Tensor:
        perturbed = self.inputs(batch) + self.delta
        x = perturbed.clamp(0, 1).requires_grad_()
        loss = self.cross_entropy(x, batch.labels)
        loss.backward()  # the weights' gradient and the images'
        assert x.grad is not None
        # Both public codes differentiate through the clip: a perturbation that leads out of [0,1] does not change.
        inside = (perturbed >= 0) & (perturbed <= 1)
        self.delta.add_(self.eps * x.grad.sign() * inside).clamp_(-self.eps, self.eps)  # step = eps
        return loss.detach()


def plans(settings: FreeSettings) -> list[Plan]:
    """One stage, of as many passes over the images as m replays leave to do (rounded up)."""
    refuse_noise(settings, "free")
    train = settings.train
    milestones = tuple(milestone / train.replays for milestone in train.milestones)
    warmup = train.warmup_epochs / train.replays
    per_pass = replace(train, epochs=math.ceil(train.epochs / train.replays), milestones=milestones, warmup_epochs=warmup)
    passes = train.replays * TRAIN_STEP  # the image's gradient comes with the weights'
    return [Plan("train", "train", per_pass, lambda c: FreeStage(c, train, settings.attack), labelled=True, passes=passes)]


def card(settings: FreeSettings) -> dict[str, Any]:
    """Deterministic."""
    return supervised()


def make(name: str) -> Recipe:
    """The recipe `free`."""
    return Recipe(
        name,
        FreeSettings(),
        plans,
        card,
        presets(epochs=160, smoke={"train.replays": 4, "train.epochs": 8}),
        digits.adapt(name),
    )
