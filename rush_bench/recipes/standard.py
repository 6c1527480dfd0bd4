"""Standard training, supervised, without noise or attack: what every defence is measured against."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import TRAIN_STEP, Batch, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets, refuse_noise
from rush_bench.training.supervised import card as supervised

NAMES = {"standard": "control: standard supervised training, without noise or attack"}


@dataclass(frozen=True)
class StandardSettings(RunSettings):
    """The optimiser of our supervised ResNet-18 (sources S2.16), as `noise_sup` and `pgd_at` have it."""

    train: SupervisedSettings = field(default_factory=SupervisedSettings)


class StandardStage(SupervisedStage):
    """min E CE(f(t(x)), y)."""

    def loss(self, batch: Batch) -> Tensor:
        return self.cross_entropy(self.inputs(batch), batch.labels)


def plans(settings: StandardSettings) -> list[Plan]:
    """One stage."""
    refuse_noise(settings, "standard")
    return [
        Plan("train", "train", settings.train, lambda c: StandardStage(c, settings.train), labelled=True, passes=TRAIN_STEP)
    ]


def card(settings: StandardSettings) -> dict[str, Any]:
    """Deterministic."""
    return supervised()


def make(name: str) -> Recipe:
    """The recipe `standard`."""
    return Recipe(name, StandardSettings(), plans, card, presets(), digits.adapt(name))
