"""Gaussian augmentation for randomised smoothing (Cohen et al. 2019; sources S2.7)."""

from dataclasses import dataclass, field
from typing import Any

from rush_bench.recipes import digits
from rush_bench.recipes.noise_sup import plans
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.stage import Recipe
from rush_bench.training.supervised import SupervisedSettings, presets
from rush_bench.training.supervised import card as supervised

NAMES = {"cohen": "randomised smoothing: supervised training on Gaussian noise (Cohen et al. 2019)"}
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the layer after the noise in its code


@dataclass(frozen=True)
class CohenTrainSettings(SupervisedSettings):
    """S2.7: a tenth of the rate every 30 of 90 epochs."""

    epochs: int = 90
    batch_size: int = 256
    milestones: tuple[float, ...] = (30, 60)
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class CohenSettings(RunSettings):
    """S2.7, but on ResNet-18 as all our rows (its own is ResNet-110). The paper has sigma .12, .25, .5 and 1."""

    network: NetworkSettings = field(default_factory=lambda: NetworkSettings(mean=CIFAR_MEAN, std=CIFAR_STD))
    noise: str = "gaussian:0.25"
    train: CohenTrainSettings = field(default_factory=CohenTrainSettings)


def card(settings: CohenSettings) -> dict[str, Any]:
    """A smoothed classifier, shown with RUSH's votes; its certificates need many more draws (rush_bench.certify)."""
    return supervised(settings.noise)


def make(name: str) -> Recipe:
    """The recipe `cohen`: min E CE(f(x + sigma N), y), which is `noise_sup`'s stage under a Gaussian law."""
    return Recipe(name, CohenSettings(), plans, card, presets(), digits.adapt(name))
