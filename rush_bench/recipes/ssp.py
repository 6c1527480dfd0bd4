"""Adversarial robustness from self-supervised pre-training to fine-tuning (Chen et al. 2020b; recipes R2.11).

`ssp` is the paper's ensemble: three networks, each pre-trained on its own task, fine-tuned and attacked as one. The other
names are its members on their own.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rush_bench.errors import BadInput
from rush_bench.networks.ensemble import Parallel
from rush_bench.recipes.pgd_at import PGDATStage
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.pretext import Jigsaw, Rotation, Selfie, SelfieSettings, TaskSettings
from rush_bench.training.stage import Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, presets
from rush_bench.training.supervised import adapt as adapt_supervised

NAMES = {
    "ssp": "adversarial self-supervised pre-training: ensemble of the three tasks' networks (Chen et al. 2020b)",
    "ssp_rotation": "adversarial pre-training on rotations, then adversarial fine-tuning (Chen et al. 2020b)",
    "ssp_jigsaw": "adversarial pre-training on jigsaws, then adversarial fine-tuning (Chen et al. 2020b)",
    "ssp_selfie": "adversarial pre-training on Selfie, then adversarial fine-tuning (Chen et al. 2020b)",
}
STAGES: dict[str, Any] = {"rotation": Rotation, "jigsaw": Jigsaw, "selfie": Selfie}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SSPFinetuneSettings(SupervisedSettings):
    """R2.11: PGD-AT for 100 epochs. `partial` is the paper's, and in our definition, since its code has full only."""

    mode: Literal["full", "partial"] = "full"
    epochs: int = 100
    milestones: tuple[float, ...] = (60, 80)
    weight_decay: float = 3e-4


@dataclass(frozen=True)
class SSPSettings(RunSettings):
    """R2.11, on our ResNet-18 (the paper: ResNet-50v2)."""

    network: NetworkSettings = field(default_factory=lambda: NetworkSettings(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    rotation: TaskSettings = field(default_factory=TaskSettings)
    jigsaw: TaskSettings = field(default_factory=TaskSettings)
    selfie: SelfieSettings = field(default_factory=SelfieSettings)
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(mode="train"))  # of pre-training
    finetune: SSPFinetuneSettings = field(default_factory=SSPFinetuneSettings)
    finetune_attack: InnerSettings = field(default_factory=InnerSettings)


class SSPFinetune(PGDATStage):
    """PGD-AT from pre-trained encoders. An ensemble is one network to the attack and to the loss (its mean softmax)."""

    name = "finetune"

    def __init__(self, context: Context, settings: SSPFinetuneSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings, attack)
        encoder = self.network.encoder
        encoders = list(encoder.members) if isinstance(encoder, Parallel) else [encoder]
        # Partial: stem to layer3 stay as they are, their BatchNorm in eval(); layer4 and the linear layer learn.
        parts = [(one, name, part) for one in encoders for name, part in one.named_children()]
        last = [part for one, name, part in parts if name == f"layer{one.stages}"]
        self.frozen = [part for _, _, part in parts if part not in last] if settings.mode == "partial" else []
        for part in self.frozen:
            part.requires_grad_(False)

    def begin_epoch(self, epoch: int) -> None:
        self.train()
        for part in self.frozen:
            part.eval()


def plans(settings: SSPSettings, tasks: tuple[str, ...]) -> list[Plan]:
    """A pre-training stage for each task's network, then one fine-tuning for all."""
    if max(1, settings.network.members) != len(tasks):
        raise BadInput(f"network.members must be {len(tasks)}, one for each task of this recipe")

    def pretrain(number: int, task: str) -> Plan:
        own = getattr(settings, task)
        return Plan(task, "pretrain", own, lambda context: STAGES[task](context, own, settings.attack, number))

    def finetune(context: Context) -> SSPFinetune:
        return SSPFinetune(context, settings.finetune, settings.finetune_attack)

    before = [pretrain(number, task) for number, task in enumerate(tasks)]
    return [*before, Plan("finetune", "train", settings.finetune, finetune, labelled=True)]


def card(settings: SSPSettings) -> dict[str, Any]:
    """Adversarial full fine-tuning, or of the last stage."""
    full = settings.finetune.mode == "full"
    return {"protocol": "AFF" if full else "partial AFF", "extra_data": None, "votes": [0]}


def adapt(preset: str, shape: tuple[int, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Scans of digits: a small transformer, five attack steps in pre-training."""
    layer = adapt_supervised(preset, shape, "finetune")
    if "network.name" in layer:
        layer |= {"attack.steps": 5, "attack.step": 0.04, "finetune_attack.eps": 0.1, "finetune_attack.step": 0.025}
        layer |= {"selfie.dim": 64, "selfie.layers": 2, "selfie.heads": 4, "selfie.feedforward": 128}
        layer |= {f"{task}.{key}": value for task in STAGES for key, value in (("padding", 1), ("flip", 0.0))}
    return layer


def make(name: str) -> Recipe:
    """`ssp`, or one of its members."""
    tasks = tuple(STAGES) if name == "ssp" else (name.removeprefix("ssp_"),)
    settings = SSPSettings()
    if len(tasks) > 1:
        settings = replace(settings, network=replace(settings.network, members=len(tasks)))
    layers = presets("finetune", epochs=10)
    for task in STAGES:
        layers["short"][f"{task}.epochs"] = 6
        layers["smoke"] |= {f"{task}.epochs": 2, f"{task}.batch_size": 64}
    return Recipe(name, settings, lambda s: plans(s, tasks), card, layers, lambda p, shape: adapt(p, shape, tasks))
