"""A re-implementation of BYORL, which has no released code: BYOL with an attacked online view (sources S2.10).

Gowal et al. 2021 give the objective; the numbers are ours (S2.10: "engineering default"), and the rows that this recipe
makes never stand for theirs, which used WRN and 500,000 further images.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.recipes import digits
from rush_bench.settings import NonNegative, Share
from rush_bench.training import protocols
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage, projector
from rush_bench.training.inner import InnerSettings
from rush_bench.training.losses import cosine
from rush_bench.training.protocols import PretrainedSettings
from rush_bench.training.seeds import seeded
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"byorl_reimpl": "re-implementation of BYORL (no code released): BYOL with an attacked view (Gowal et al. 2021)"}


@dataclass(frozen=True)
class BYORLPretrainSettings(ContrastiveSettings):
    """S2.10: projector d-4096-256 and predictor 256-4096-256, both with BatchNorm; LARS as ACL's."""

    optimiser: Literal["sgd", "lars"] = "lars"
    lars_exclude_1d: bool = False
    lr: float = 5.0
    lr_min: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 1e-6
    projector_hidden: int = 4096
    projector_out: int = 256
    projector_norm: bool = True
    target_momentum: Share = 0.996  # rises to 1 by a cosine
    ramp_epochs: NonNegative = 0.0  # over which radius and step of the attack grow to their full size; S2.10 states none
    symmetric: bool = False  # BYOL's second term with the views exchanged; S2.10 states one direction


@dataclass(frozen=True)
class BYORLSettings(PretrainedSettings):
    """A standard linear head on top (SLF) is the paper's claim."""

    attack: InnerSettings = field(default_factory=InnerSettings)
    pretrain: BYORLPretrainSettings = field(default_factory=BYORLPretrainSettings)


class BYORLStage(ContrastiveStage):
    """2 - 2 cos(q(z(t + d)), z'(t')): BYOL eq. 2 at an online view that maximises it; z' is an average of z."""

    settings: BYORLPretrainSettings

    def __init__(self, context: Context, settings: BYORLPretrainSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings)
        self.settings, self.attack = settings, attack
        with seeded(self.seed, "predictor"):
            self.predictor = self.make_projector(settings.projector_out)
        self.online = nn.ModuleList([self.network.encoder, self.projector])
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def make_projector(self, dim: int) -> nn.Module:
        settings = self.settings
        return projector(dim, settings.projector_hidden, settings.projector_out, settings.projector_norm)

    def parameter_groups(self) -> list[nn.Parameter]:
        return [*self.online.parameters(), *self.predictor.parameters()]

    def regression(self, x: Tensor, target: Tensor) -> Tensor:
        """2 - 2 cos(q(g(f(x))), target)."""
        with self.autocast():
            return 2 - 2 * cosine(self.predictor(self.projector(self.network.encoder(x))), target)

    def one_direction(self, first: Tensor, second: Tensor, batch: Batch) -> Tensor:
        """The loss of an attacked first view against the target of the second."""
        with torch.no_grad(), self.autocast():
            encoder, head = self.target
            target = head(encoder(second))
        ramp = min(1.0, (batch.epoch + 1) / max(1.0, self.settings.ramp_epochs))
        attack = replace(self.attack, eps=ramp * self.attack.eps, step=ramp * self.attack.step)
        attacked = attack.run(self, lambda v: self.regression(v, target), first, batch.generator)
        return self.regression(attacked, target)

    def loss(self, batch: Batch) -> Tensor:
        t1 = self.views(batch.images, batch.generator)
        t2 = self.views(batch.images, batch.generator)
        loss = self.one_direction(t1, t2, batch)
        return loss + self.one_direction(t2, t1, batch) if self.settings.symmetric else loss

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Target parameters follow: 1 - tau = (1 - 0.996) (1 + cos(pi k / K)) / 2; BatchNorm statistics are their own."""
        total = self.settings.epochs * (len(batch.data) // self.settings.batch_size)
        rate = (1 - self.settings.target_momentum) * (1 + math.cos(math.pi * batch.step / max(1, total))) / 2
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), rate)


def plans(settings: BYORLSettings) -> list[Plan]:
    """Pre-training, then a fine-tuning protocol."""
    pretrain, attack = settings.pretrain, settings.attack
    one_direction = FORWARD + attack.steps * ATTACK_STEP + TRAIN_STEP  # the target network; the online view
    passes = (2 if pretrain.symmetric else 1) * one_direction
    first = Plan("pretrain", "pretrain", pretrain, lambda context: BYORLStage(context, pretrain, attack), passes=passes)
    return [first, protocols.finetuning_plan(settings)]


def card(settings: BYORLSettings) -> dict[str, Any]:
    """Every table row says that it is a re-implementation, whatever the model is called."""
    common = protocols.card(settings)
    return {**common, "protocol": f"{common['protocol']}, re-implementation"}


PRESETS = protocols.presets({"pretrain.lr": 1.0})


def make(name: str) -> Recipe:
    """The recipe `byorl_reimpl`."""
    datasets, finetuning_settings = protocols.LINEAR_RATES, protocols.FINETUNING_SETTINGS
    return Recipe(
        name, BYORLSettings(), plans, card, PRESETS, digits.adapt(name), datasets, finetuning_settings=finetuning_settings
    )
