"""Plain SimCLR and a linear classifier: the reference and the ablation arm of RUSH (sources S2.2).

RUSH's recipe with Q the identity in pre-training. The four combinations of S2.2 are:
    (default)                                               no noise at the probe, none at inference
    --set noise=uniform:0.3                                 noise at both (a defence with votes, and without)
    --set noise=uniform:0.3 --set finetune.noisy=false      noise at inference only
    --set noise=uniform:0.3 --votes 0 when attacked         noise at the probe only
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rush_bench.recipes import digits
from rush_bench.training.aff import AFFSettings
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage
from rush_bench.training.finetune import FinetuneSettings
from rush_bench.training.losses import nt_xent
from rush_bench.training.options import RunSettings
from rush_bench.training.protocols import AFF_PRESETS, FINETUNING_SETTINGS, card, finetuning_plan
from rush_bench.training.stage import TRAIN_STEP, Batch, Plan, Recipe

NAMES = {"simclr": "SimCLR with a linear classifier (Chen et al. 2020): RUSH without its noise"}

# Layers on the paper's 1000 + 25 epochs at batch 512. The learning rate goes with the batch size.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "short": {"pretrain.epochs": 100, "finetune.epochs": 10, "pretrain.knn_every": 10},
    "smoke": {
        "n_train": 256,
        "pretrain.epochs": 2,
        "pretrain.batch_size": 64,
        "pretrain.lr": 0.06,
        "finetune.epochs": 2,
        "finetune.batch_size": 64,
    },
    "demo": {"pretrain.epochs": 15, "finetune.epochs": 10, "pretrain.knn_every": 5},
}


@dataclass(frozen=True)
class SimCLRSettings(RunSettings):
    """As RUSH's (S2.2), without noise and with a frozen encoder (SLF)."""

    pretrain: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)  # its `protocol`: SLF, NSLF, ALF or AFF
    aff: AFFSettings = field(default_factory=AFFSettings)


class SimCLRStage(ContrastiveStage):
    """min E L(g(f([t1(x), t2(x)]))): RUSH paper eq. 10."""

    def loss(self, batch: Batch) -> Tensor:
        x1 = self.views(batch.images, batch.generator)
        x2 = self.views(batch.images, batch.generator)
        u, v = self.project(x1, x2)
        return nt_xent(u, v, self.settings.temperature)


def plans(settings: SimCLRSettings) -> list[Plan]:
    """Pre-training, then fine-tuning."""
    return [
        Plan("pretrain", "pretrain", settings.pretrain, lambda c: SimCLRStage(c, settings.pretrain), passes=2 * TRAIN_STEP),
        finetuning_plan(settings),
    ]


def make(name: str) -> Recipe:
    """The recipe `simclr`."""
    presets = {key: layer | AFF_PRESETS.get(key, {}) for key, layer in PRESETS.items()}

    return Recipe(name, SimCLRSettings(), plans, card, presets, digits.adapt(name), finetuning_settings=FINETUNING_SETTINGS)
