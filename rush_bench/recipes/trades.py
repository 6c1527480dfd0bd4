"""TRADES (Zhang et al. 2019; sources S2.16): clean cross-entropy plus the divergence that an attack can cause."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.settings import NonNegative
from rush_bench.training import losses
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.options import RunSettings
from rush_bench.training.protocols import trades_passes
from rush_bench.training.stage import FORWARD, Batch, Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets, refuse_noise
from rush_bench.training.supervised import card as supervised

NAMES = {"trades": "TRADES: clean cross-entropy plus 6 KL to the attacked prediction (Zhang et al. 2019)"}


@dataclass(frozen=True)
class TradesTrainSettings(SupervisedSettings):
    """S2.16: 76 epochs with one decay that takes effect."""

    beta: NonNegative = 6.0  # 1 / lambda
    epochs: int = 76
    milestones: tuple[float, ...] = (74,)  # from epoch 75 on, counted from 1 as the code does
    weight_decay: float = 2e-4


@dataclass(frozen=True)
class TradesSettings(RunSettings):
    """S2.16, but on ResNet-18 as all our rows; the paper's network is WRN-34-10."""

    train: TradesTrainSettings = field(default_factory=TradesTrainSettings)
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(eps=0.031, step=0.007, start="gaussian"))


class TradesStage(SupervisedStage):
    """min E CE(f(x), y) + beta max_{|d| <= eps} KL(p(x) || p(x + d)): eq. 5."""

    def __init__(self, context: Context, settings: TradesTrainSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings, attack)
        self.beta = settings.beta

    def loss(self, batch: Batch) -> Tensor:
        x = self.inputs(batch)
        assert self.inner is not None
        with attack_mode(self.network, self.inner.mode):
            with torch.no_grad():
                target = self.logits(x)
            attacked = self.inner.run(self.network, lambda v: losses.kl(target, self.logits(v)).sum(), x, batch.generator)
        # Each forward pass in train() is a BatchNorm batch of its own. The code passes x once for the cross-entropy and once
        # more for the divergence: the same logits and gradients, but its statistics weigh in twice.
        loss = losses.trades(self.logits(x), self.logits(attacked), batch.labels, self.beta)
        with torch.no_grad():
            self.logits(x)
        return loss


def plans(settings: TradesSettings) -> list[Plan]:
    """One stage."""
    refuse_noise(settings, "trades")
    make = lambda context: TradesStage(context, settings.train, settings.attack)  # noqa: E731
    passes = trades_passes(settings.attack) + FORWARD  # and clean once more
    return [Plan("train", "train", settings.train, make, labelled=True, passes=passes)]


def card(settings: TradesSettings) -> dict[str, Any]:
    """Deterministic."""
    return supervised()


def make(name: str) -> Recipe:
    """The recipe `trades`."""
    return Recipe(name, TradesSettings(), plans, card, presets(), digits.adapt(name))
