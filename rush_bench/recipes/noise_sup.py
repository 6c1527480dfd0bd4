"""The control that the RUSH paper lacks (sources S2.17): RUSH's network, noise and smoothing, but supervised training.

If it scores like RUSH, contrastive pre-training is not the cause.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rush_bench.errors import BadInput
from rush_bench.noise import is_noise
from rush_bench.recipes import digits
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import TRAIN_STEP, Batch, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets
from rush_bench.training.supervised import card as supervised

NAMES = {"noise_sup": "control for RUSH: supervised training with its noise, smoothed as RUSH is at test"}


@dataclass(frozen=True)
class NoiseSupSettings(RunSettings):
    """S2.17: the noise of RUSH 5.1, 200 epochs; the optimiser of our supervised ResNet-18 (S2.16).

    `--set train.augment=simclr` gives the images that RUSH's pre-training sees.
    """

    noise: str = "uniform:0.3"
    train: SupervisedSettings = field(default_factory=SupervisedSettings)


class NoiseSupStage(SupervisedStage):
    """min E CE(f(Q(t(x))), y), Q(x) = x + n, not clipped (sources S5.9)."""

    def loss(self, batch: Batch) -> Tensor:
        assert self.noise is not None
        x = self.inputs(batch)
        return self.cross_entropy(x + self.noise.sample(x.shape, batch.generator), batch.labels)


def plans(settings: Any) -> list[Plan]:
    """One stage."""
    if not is_noise(settings.noise):
        raise BadInput("this recipe trains with noise; give it a law, as in --set noise=uniform:0.3 or noise=gaussian:0.25")
    make = lambda context: NoiseSupStage(context, settings.train)  # noqa: E731
    return [Plan("train", "train", settings.train, make, labelled=True, passes=TRAIN_STEP)]


def card(settings: NoiseSupSettings) -> dict[str, Any]:
    """The votes of RUSH."""
    return supervised(settings.noise)


def make(name: str) -> Recipe:
    """The recipe `noise_sup`."""
    return Recipe(name, NoiseSupSettings(), plans, card, presets(), digits.adapt(name))
