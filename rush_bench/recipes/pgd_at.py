"""PGD adversarial training (Madry et al. 2018; sources S2.16): the baseline that every defence is measured against."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import ATTACK_STEP, TRAIN_STEP, Batch, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets, refuse_noise
from rush_bench.training.supervised import card as supervised

NAMES = {"pgd_at": "PGD-AT: adversarial training on PGD-10 (Madry et al. 2018)"}


@dataclass(frozen=True)
class PGDATSettings(RunSettings):
    """S2.16's ResNet-18 default, which the shared classes have as theirs."""

    train: SupervisedSettings = field(default_factory=SupervisedSettings)
    attack: InnerSettings = field(default_factory=InnerSettings)


class PGDATStage(SupervisedStage):
    """min E max_{|d| <= eps} CE(f(x + d), y): Madry et al. eq. 2.1."""

    def loss(self, batch: Batch) -> Tensor:
        x, y = self.inputs(batch), batch.labels
        assert self.inner is not None
        attacked = self.inner.run(self.network, lambda v: self.cross_entropy(v, y), x, batch.generator)
        return self.cross_entropy(attacked, y)


def plans(settings: PGDATSettings) -> list[Plan]:
    """One stage."""
    refuse_noise(settings, "pgd_at")
    make = lambda context: PGDATStage(context, settings.train, settings.attack)  # noqa: E731
    return [
        Plan("train", "train", settings.train, make, labelled=True, passes=settings.attack.steps * ATTACK_STEP + TRAIN_STEP)
    ]


def card(settings: PGDATSettings) -> dict[str, Any]:
    """Deterministic."""
    return supervised()


def make(name: str) -> Recipe:
    """The recipe `pgd_at`."""
    return Recipe(name, PGDATSettings(), plans, card, presets(), digits.adapt(name))
