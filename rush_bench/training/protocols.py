"""Fine-tuning protocols SLF, NSLF, ALF and AFF (sources S1.5) for pre-trained encoders, chosen by `finetune.protocol`.

Recipes whose settings have the groups `finetune` (linear) and `aff` (full) use these; numbers differ by protocol, so
each has its own group: `--set finetune.protocol=AFF` alone is enough. NSLF is RUSH's: SLF under a noise law, which it needs
(`--set noise=uniform:0.3`), its encoder frozen but for what `finetune.bn_adapt` says (RUSH: beta_stats).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rush_bench.errors import BadInput
from rush_bench.noise import is_noise
from rush_bench.training.aff import AFF, AFFSettings
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Plan

FINETUNING_SETTINGS = (
    "finetune",
    "aff",
    "noise",
)  # what pre-training without a noise law does not read (`Recipe.finetuning_settings`)
IMAGENET_NORMALISED = NetworkSettings(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR_NORMALISED = NetworkSettings(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261))


@dataclass(frozen=True)
class LinearSettings(FinetuneSettings):
    """SLF and ALF as DynACL and the RobustSSL benchmark run them (S2.12); the best epoch by robust accuracy (S1.6)."""

    epochs: int = 25
    batch_size: int = 512
    lr: float = 0.01
    schedule: Literal["cosine", "steps"] = "steps"
    milestones: tuple[float, ...] = (10, 20)
    lr_min: float = 0.0
    weight_decay: float = 2e-4
    augment: Literal["none", "crop_flip"] = "crop_flip"
    head_init: Literal["default", "zero"] = "zero"
    select_images: int = 1000


@dataclass(frozen=True)
class PretrainedSettings(RunSettings):
    """Settings of a system that is pre-trained without labels and fine-tuned by one of the protocols."""

    finetune: LinearSettings = field(default_factory=LinearSettings)
    aff: AFFSettings = field(default_factory=AFFSettings)


def finetuning_plan(settings: Any, pretrained_with_noise: bool = False) -> Plan:
    """The last stage: `finetune` for SLF, NSLF and ALF, `aff` for AFF. BadInput where the noise does not go with it."""
    check_noise(settings, pretrained_with_noise)
    if settings.finetune.protocol == "AFF":
        aff = settings.aff
        return Plan("aff", "train", aff, lambda context: AFF(context, aff), labelled=True, passes=aff_passes(aff))
    finetune = settings.finetune
    if finetune.protocol == "ALF" and finetune.alf_lr is not None:
        finetune = replace(finetune, lr=finetune.alf_lr)
    return Plan(
        "finetune",
        "train",
        finetune,
        lambda context: Finetune(context, finetune),
        labelled=True,
        passes=linear_passes(finetune),
    )


def trades_passes(attack: InnerSettings) -> float:
    """TRADES: p(x) for the attack; clean and attacked images learn."""
    return FORWARD + attack.steps * ATTACK_STEP + 2 * TRAIN_STEP


def aff_passes(settings: AFFSettings) -> float:
    """Adversarial fine-tuning, by TRADES or from attacked images alone. All weights learn, or the head, to which no pass goes
    back; where the last stage learns it is counted as if all did."""
    trades = settings.objective == "trades"
    full = trades_passes(settings.attack) if trades else settings.attack.steps * ATTACK_STEP + TRAIN_STEP
    frozen = settings.trained == "head"
    return full - (TRAIN_STEP - FORWARD) * (1 + trades) if frozen else full


def linear_passes(settings: Any) -> float:
    """A linear stage: the head alone learns, or BatchNorm's biases with it, to which a pass goes back."""
    if settings.protocol == "ALF":  # TRADES looks at the clean image twice more
        return settings.attack.steps * ATTACK_STEP + FORWARD + (2 * FORWARD if settings.alf_loss == "trades" else 0)
    return FORWARD if settings.bn_adapt in ("none", "stats") else ATTACK_STEP


def check_noise(settings: Any, pretrained_with_noise: bool = False) -> None:
    """NSLF needs a law and uses it; ALF and AFF learn from attacked images without noise, whatever pre-training had."""
    finetune, randomised = settings.finetune, is_noise(settings.noise)
    if finetune.protocol == "NSLF" and not (randomised and finetune.noisy):
        raise BadInput("finetune.protocol=NSLF learns under noise: --set noise=uniform:0.3, and leave finetune.noisy=true")
    if finetune.protocol in ("ALF", "AFF") and randomised and not pretrained_with_noise:
        raise BadInput(f"finetune.protocol={finetune.protocol} learns from attacked images without noise; set noise=none")


def card(settings: Any, extra_data: str | None = None) -> dict[str, Any]:
    """The protocol as it ran, and the votes: with a noise law, as a deterministic and as a randomised defence.

    SLF under noise, or with BatchNorm that moves, is NSLF (S1.5).
    """
    finetune, randomised = settings.finetune, is_noise(settings.noise)
    noisy = (randomised and finetune.noisy) or finetune.bn_adapt != "none"
    protocol = "NSLF" if finetune.protocol == "SLF" and noisy else finetune.protocol
    smoothed = randomised and finetune.protocol in ("SLF", "NSLF")
    return {"protocol": protocol, "extra_data": extra_data, "votes": [0, 1, 64] if smoothed else [0]}


# What a recipe whose linear stage is LinearSettings has on other data sets: DynACL's code and RobustSSL (S2.12).
LINEAR_RATES: dict[str, dict[str, Any]] = {"cifar100": {"finetune.lr": 0.05}, "stl10-96": {"finetune.lr": 0.1}}

# Layers for the group `aff`, to be merged into a recipe's presets.
AFF_PRESETS: dict[str, dict[str, Any]] = {
    "short": {"aff.epochs": 10, "aff.milestones": (6, 8)},
    "smoke": {"aff.epochs": 2, "aff.batch_size": 64, "aff.milestones": (), "aff.attack.steps": 2},
}


def presets(smoke: Mapping[str, Any], epochs: int = 25) -> dict[str, dict[str, Any]]:
    """Layers on the paper's settings: `short` has `epochs` of pre-training, `smoke` two of everything."""
    return {
        "paper": {},
        "short": {
            "pretrain.epochs": epochs,
            "pretrain.knn_every": 10,
            "pretrain.warmup_epochs": min(10, epochs // 10),
            "finetune.epochs": 10,
            "finetune.milestones": (6, 8),
            **AFF_PRESETS["short"],
        },
        "smoke": {
            "n_train": 256,
            "pretrain.epochs": 2,
            "pretrain.batch_size": 64,
            "pretrain.warmup_epochs": 0,
            "finetune.epochs": 2,
            "finetune.batch_size": 64,
            "finetune.milestones": (),
            "finetune.lr": 0.03,
            "finetune.attack.steps": 2,
            "attack.steps": 2,
            **AFF_PRESETS["smoke"],
            **smoke,
        },
    }
