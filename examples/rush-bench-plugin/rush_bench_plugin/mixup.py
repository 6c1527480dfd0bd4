"""Mixup (Zhang et al. 2018, eq. 1): training on convex combinations of pairs of images and of their labels."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rush_bench.errors import BadInput
from rush_bench.recipes import digits
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import TRAIN_STEP, Batch, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, card, presets


@dataclass(frozen=True)
class MixupSettings(RunSettings):
    """Section 3.2: alpha = 1 on CIFAR-10, for which Beta(alpha, alpha) is uniform; other values are not offered."""

    alpha: float = 1.0
    train: SupervisedSettings = field(default_factory=SupervisedSettings)


class MixupStage(SupervisedStage):
    """min E lam CE(f(x'), y_i) + (1 - lam) CE(f(x'), y_j), x' = lam x_i + (1 - lam) x_j: one lam for a batch."""

    def loss(self, batch: Batch) -> Tensor:
        x, y = self.inputs(batch), batch.labels
        other = torch.randperm(len(x), generator=batch.generator, device=x.device)
        lam = torch.rand((), generator=batch.generator, device=x.device)
        mixed = lam * x + (1 - lam) * x[other]
        return lam * self.cross_entropy(mixed, y) + (1 - lam) * self.cross_entropy(mixed, y[other])


def plans(settings: MixupSettings) -> list[Plan]:
    """One supervised stage."""
    if settings.alpha != 1:
        raise BadInput(f"alpha={settings.alpha}: this example draws lam for alpha=1 only")
    return [Plan("train", "train", settings.train, lambda c: MixupStage(c, settings.train), labelled=True, passes=TRAIN_STEP)]


recipe = Recipe(
    "mixup",
    MixupSettings(),
    plans,
    lambda settings: card(settings.noise),
    presets(),
    digits.adapt("standard"),  # what suits scans of digits, as of supervised training
)
