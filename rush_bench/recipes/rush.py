"""RUSH: contrastive pre-training with one noisy view, noisy linear fine-tuning, smoothed inference (sources S2.1)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rush_bench.errors import BadInput
from rush_bench.noise import is_noise, noise_from
from rush_bench.recipes import digits
from rush_bench.recipes.simclr import PRESETS
from rush_bench.training import protocols
from rush_bench.training.aff import AFFSettings
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage
from rush_bench.training.finetune import FinetuneSettings
from rush_bench.training.losses import nt_xent
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"rush": "RUSH: contrastive learning with randomised smoothing, one noisy view (Pang et al. 2022)"}


@dataclass(frozen=True)
class RushPretrainSettings(ContrastiveSettings):
    """Appendix B, which `ContrastiveSettings` has as its defaults, and which views are noisy."""

    noisy_views: Literal["one", "both", "none"] = "one"  # eq. 11, Alg. 1 line 5: only the second (sources S5.13)


@dataclass(frozen=True)
class RushSettings(RunSettings):
    """Defaults: section 5.1, appendix B; `beta_stats` as argued in sources S5.21."""

    noise: str = "uniform:0.3"  # 5.1: U(-0.3, 0.3), the same law in both stages and at inference
    pretrain: RushPretrainSettings = field(default_factory=RushPretrainSettings)
    finetune: FinetuneSettings = field(default_factory=lambda: FinetuneSettings(protocol="NSLF", bn_adapt="beta_stats"))
    aff: AFFSettings = field(default_factory=AFFSettings)


class RushStage(ContrastiveStage):
    """min E L_pre(g(f([t1(x), Q(t2(x))]))): eq. 11."""

    def __init__(self, context: Context, settings: RushPretrainSettings) -> None:
        super().__init__(context, settings)
        self.noise, self.noisy_views = noise_from(context.settings.noise), settings.noisy_views

    def smooth(self, x: Tensor, batch: Batch) -> Tensor:
        """Q(x) = x + n, n i.i.d. for each pixel and channel; last of all (appendix A) and not clipped (sources S5.9)."""
        assert self.noise is not None
        return x + self.noise.sample(x.shape, batch.generator)

    def loss(self, batch: Batch) -> Tensor:
        x1 = self.views(batch.images, batch.generator)  # Alg. 1 line 4: t1, t2 ~ T
        x2 = self.views(batch.images, batch.generator)
        if self.noisy_views == "both":
            x1 = self.smooth(x1, batch)
        if self.noisy_views != "none":
            x2 = self.smooth(x2, batch)  # line 5
        u, v = self.project(x1, x2)  # line 6
        return nt_xent(u, v, self.settings.temperature)


def plans(settings: RushSettings) -> list[Plan]:
    """Pre-training (Alg. 1 lines 2 to 8), then fine-tuning: by default lines 9 to 14, eq. 12."""
    finetune = settings.finetune
    if not is_noise(settings.noise):
        raise BadInput("rush needs a noise law, as in --set noise=uniform:0.3; without noise it is the recipe simclr")
    if finetune.protocol in ("SLF", "ALF") and (finetune.noisy or finetune.bn_adapt != "none"):
        raise BadInput(
            f"finetune.protocol={finetune.protocol} of rush: set finetune.noisy=false and finetune.bn_adapt=none as well"
        )
    return [
        Plan("pretrain", "pretrain", settings.pretrain, lambda c: RushStage(c, settings.pretrain), passes=2 * TRAIN_STEP),
        protocols.finetuning_plan(settings, pretrained_with_noise=True),
    ]


def card(settings: RushSettings) -> dict[str, Any]:
    """I_F has one vote, I_F+ 64 (section 5.1), with the same weights. Under other protocols, an ablation."""
    common = protocols.card(settings)
    return {**common, "votes": [1, 64]} if common["protocol"] == "NSLF" else common


def make(name: str) -> Recipe:
    """The recipe `rush`."""
    presets = {key: layer | protocols.AFF_PRESETS.get(key, {}) for key, layer in PRESETS.items()}

    return Recipe(name, RushSettings(), plans, card, presets, digits.adapt(name), finetuning_settings=("finetune", "aff"))
