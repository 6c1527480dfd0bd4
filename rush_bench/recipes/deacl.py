"""DeACL: a clean teacher, then a robust student that follows it (Zhang et al. 2022; sources S2.13)."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rush_bench.datasets.views import pad_crop
from rush_bench.networks import build
from rush_bench.recipes import digits
from rush_bench.recipes.simclr import SimCLRStage
from rush_bench.settings import NonNegative, Whole
from rush_bench.training import protocols
from rush_bench.training.aff import AFFSettings
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage
from rush_bench.training.inner import InnerSettings
from rush_bench.training.losses import cosine
from rush_bench.training.options import NetworkSettings
from rush_bench.training.protocols import CIFAR_NORMALISED, LinearSettings, PretrainedSettings
from rush_bench.training.seeds import derive
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"deacl": "DeACL: decoupled adversarial contrastive learning, a student of SimCLR (Zhang et al. 2022)"}


@dataclass(frozen=True)
class DistilSettings(ContrastiveSettings):
    """S2.13, stage 2: the student. Its views are shifts and mirror images only; there is no projector."""

    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.5
    lr_min: float = 0.0
    warmup_epochs: float = 10
    weight_decay: float = 5e-4
    weight: NonNegative = 2.0  # of the robust term
    start: Literal["teacher", "scratch"] = "teacher"  # scratch: the code's --student_scratch, which no released script gives
    padding: Whole = 4


@dataclass(frozen=True)
class DeACLSettings(PretrainedSettings):
    """The stem pads by 2, as solo-learn's networks do; `pretrain` is the teacher's SimCLR, with our own numbers."""

    network: NetworkSettings = field(default_factory=lambda: replace(CIFAR_NORMALISED, padding=2))
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(steps=5))
    pretrain: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    distil: DistilSettings = field(default_factory=DistilSettings)
    # The code's SLF also leaves BatchNorm statistics moving: finetune.bn_adapt=stats. Its ALF is finetune.alf_loss=trades.
    finetune: LinearSettings = field(default_factory=lambda: LinearSettings(lr=0.1, alf_lr=0.01, milestones=(15, 20)))
    aff: AFFSettings = field(default_factory=lambda: AFFSettings(lr=0.01, batch_size=512))


class TeacherStage(SimCLRStage):
    """SimCLR, whose encoder is the teacher."""

    def finish(self) -> None:
        self.carried["teacher"] = {key: value.clone() for key, value in self.network.encoder.state_dict().items()}


class StudentStage(ContrastiveStage):
    """-cos(S(x), T(x)) - 2 cos(S(x'), S(x)) on features; x' maximises -cos(S(x'), T(x))."""

    name = "distil"

    settings: DistilSettings

    def __init__(self, context: Context, settings: DistilSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings)
        self.settings, self.attack = settings, attack
        self.projector = torch.nn.Identity()
        self.teacher = build(self.network.spec).encoder.requires_grad_(False)

    def prepare(self, fresh: bool) -> None:
        """The student begins as the teacher, which the stage before has left in the network, or from weights of its own."""
        self.teacher.load_state_dict(self.carried["teacher"])
        if fresh and self.settings.start == "scratch":
            self.network.load_state_dict(build(self.network.spec, derive(self.seed, "student") % 2**32).state_dict())

    def begin_epoch(self, epoch: int) -> None:
        self.train()
        self.teacher.eval()

    def loss(self, batch: Batch) -> Tensor:
        settings, student = self.settings, self.network.encoder
        x = pad_crop(batch.images, batch.generator, settings.padding, settings.flip)
        with torch.no_grad(), self.autocast():
            target = self.teacher(x)

        def objective(v: Tensor) -> Tensor:
            with self.autocast():
                return -cosine(student(v), target)

        attacked = self.attack.run(student, objective, x, batch.generator)
        with self.autocast():  # clean and attacked images in one BatchNorm batch
            clean, robust = student(torch.cat([x, attacked])).chunk(2)
        return -cosine(clean, target) - settings.weight * cosine(robust, clean)


def plans(settings: DeACLSettings) -> list[Plan]:
    """Teacher, student, then a fine-tuning protocol."""
    distil = settings.distil
    passes = FORWARD + settings.attack.steps * ATTACK_STEP + 2 * TRAIN_STEP  # teacher; student attacked; clean and attacked
    return [
        Plan("pretrain", "pretrain", settings.pretrain, lambda c: TeacherStage(c, settings.pretrain), passes=2 * TRAIN_STEP),
        Plan("distil", "pretrain", distil, lambda c: StudentStage(c, distil, settings.attack), passes=passes),
        protocols.finetuning_plan(settings),
    ]


PRESETS = protocols.presets(
    {"pretrain.lr": 0.06, "distil.epochs": 2, "distil.batch_size": 64, "distil.lr": 0.1, "distil.warmup_epochs": 0},
    epochs=40,
)
PRESETS["short"] |= {"distil.epochs": 30, "distil.warmup_epochs": 2, "distil.knn_every": 10}


def make(name: str) -> Recipe:
    """The recipe `deacl`."""
    return Recipe(
        name,
        DeACLSettings(),
        plans,
        protocols.card,
        PRESETS,
        digits.adapt(name),
        finetuning_settings=protocols.FINETUNING_SETTINGS,
    )
