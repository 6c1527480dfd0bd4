"""ACL: adversarial contrastive learning with two BatchNorm routes (Jiang et al. 2020; sources S2.3)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.datasets.views import Interpolation
from rush_bench.errors import BadInput
from rush_bench.recipes import digits
from rush_bench.settings import PositiveShare, Whole
from rush_bench.training import protocols
from rush_bench.training.aff import AFFSettings
from rush_bench.training.contrastive import ContrastiveSettings
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.losses import nt_xent
from rush_bench.training.options import NetworkSettings
from rush_bench.training.protocols import IMAGENET_NORMALISED, LINEAR_RATES, LinearSettings, PretrainedSettings
from rush_bench.training.routed import RoutedStage
from rush_bench.training.semi_supervised import DistilSettings, SemiSettings, TeacherSettings, semi_supervised_plans
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"acl": "ACL: adversarial contrastive learning, dual BatchNorm, also semi-supervised (Jiang et al. 2020)"}
CLEAN, ATTACKED = 0, 1  # BatchNorm routes


@dataclass(frozen=True)
class ACLPretrainSettings(ContrastiveSettings):
    """S2.3: LARS on all tensors, warm-up, cosine by step; the crop from .1 of the area, bicubic."""

    variant: Literal["DS", "S2S", "A2A", "A2S"] = "DS"
    optimiser: Literal["sgd", "lars"] = "lars"
    lars_exclude_1d: bool = False
    lr: float = 5.0
    lr_min: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 1e-6
    crop_floor: PositiveShare = 0.1
    interpolation: Interpolation = "bicubic"
    projector_layers: Literal[2, 3] = 3
    projector_out: Whole = 0  # 0: as wide as the features
    route: Literal[0, 1] = 1  # which route becomes the model, where there are two (S4.2)


@dataclass(frozen=True)
class ACLSettings(PretrainedSettings):
    """Fine-tuned by AFF: 100 epochs with decays at 40 and 60, the README's for CIFAR-10."""

    network: NetworkSettings = IMAGENET_NORMALISED
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(steps=5))
    pretrain: ACLPretrainSettings = field(default_factory=ACLPretrainSettings)
    finetune: LinearSettings = field(default_factory=lambda: LinearSettings(protocol="AFF"))
    # The code's scheduler steps at the start of an epoch, and so one epoch before what its options say.
    aff: AFFSettings = field(default_factory=lambda: AFFSettings(epochs=100, milestones=(39, 59)))
    label_share: PositiveShare = 1.0  # below 1: semi-supervised, in the stages `teacher` and `distil` instead of fine-tuning
    semi: SemiSettings = field(default_factory=SemiSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    distil: DistilSettings = field(default_factory=DistilSettings)


class ACLStage(RoutedStage):
    """S2S, A2A, A2S and DS: which of the two views are attacked and which BatchNorm route each takes."""

    settings: ACLPretrainSettings

    def __init__(self, context: Context, settings: ACLPretrainSettings, attack: InnerSettings) -> None:
        count = 2 if settings.variant in ("DS", "A2S") else 1
        self.settings = settings
        super().__init__(context, settings, count, model_route=min(settings.route, count - 1))
        self.attack, self.attacked_route = attack, count - 1

    def make_projector(self, dim: int) -> nn.Module:
        return acl_projector(dim, self.settings.projector_out or dim, self.settings.projector_layers)

    def nt(self, views: Tensor, route_index: int) -> Tensor:
        """NT(a, b; tau) of both views (2B, C, H, W) in one batch through a route."""
        u, v = self.embed(route_index, views)[0].chunk(2)
        return nt_xent(u, v, self.settings.temperature)

    def attack_pair(self, views: Tensor, batch: Batch) -> Tensor:
        """Both views perturbed jointly to maximise NT(a + d_a, b + d_b)."""
        return self.attack.run(self, lambda x: self.nt(x, self.attacked_route), views, batch.generator)

    def attack_first(self, a: Tensor, b: Tensor, batch: Batch) -> Tensor:
        """The first view alone perturbed, to maximise NT(a + d_a, b) with b through the clean route."""
        with attack_mode(self, self.attack.mode), torch.no_grad():
            (v,) = self.embed(CLEAN, b)

        def objective(x: Tensor) -> Tensor:
            return nt_xent(self.embed(ATTACKED, x)[0], v, self.settings.temperature)

        return self.attack.run(self, objective, a, batch.generator)

    def loss(self, batch: Batch) -> Tensor:
        a = self.views(batch.images, batch.generator)
        b = self.views(batch.images, batch.generator)
        views, variant = torch.cat([a, b]), self.settings.variant
        if variant == "S2S":
            return self.nt(views, CLEAN)
        if variant == "A2A":
            return self.nt(self.attack_pair(views, batch), self.attacked_route)
        if variant == "A2S":
            attacked = self.attack_first(a, b, batch)
            (u,), (v,) = self.embed(ATTACKED, attacked), self.embed(CLEAN, b)
            return nt_xent(u, v, self.settings.temperature)
        attacked = self.attack_pair(views, batch)
        return (self.nt(views, CLEAN) + self.nt(attacked, ATTACKED)) / 2  # DS: half of each


def acl_projector(dim: int, out: int, layers: int) -> nn.Sequential:
    """fc-BN-ReLU-fc-BN-ReLU-fc-BN, only the first fc with a bias; two layers end after the second fc-BN."""
    first = [nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU()]
    second = [nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU()] if layers == 3 else []
    return nn.Sequential(*first, *second, nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out))


def passes(settings: ACLSettings) -> float:
    """Of an image in pre-training: the views that are attacked, the clean view where it is the attack's key, what learns."""
    variant = settings.pretrain.variant
    attacked = {"S2S": 0, "A2A": 2, "A2S": 1, "DS": 2}[variant]
    learn = {"S2S": 2, "A2A": 2, "A2S": 2, "DS": 4}[variant]  # DS: both views, clean and attacked
    return attacked * settings.attack.steps * ATTACK_STEP + (FORWARD if variant == "A2S" else 0) + learn * TRAIN_STEP


def plans(settings: ACLSettings) -> list[Plan]:
    """Pre-training, then a fine-tuning protocol, or the teacher and its distillation."""
    pretrain, attack = settings.pretrain, settings.attack
    first = Plan("pretrain", "pretrain", pretrain, lambda context: ACLStage(context, pretrain, attack), passes=passes(settings))
    if settings.label_share == 1:
        if settings.aff.routes == 2 and pretrain.variant not in ("DS", "A2S"):
            raise BadInput(f"aff.routes=2 needs two BatchNorm routes; use pretrain.variant=DS, not {pretrain.variant}")
        if settings.semi.index:
            raise BadInput("semi.index says which images have labels; give their share too, as in --set label_share=0.01")
        return [first, protocols.finetuning_plan(settings)]
    if pretrain.variant not in ("DS", "A2S"):
        raise BadInput(f"semi-supervised ACL needs two BatchNorm routes; use pretrain.variant=DS, not {pretrain.variant}")
    return [first, *semi_supervised_plans(settings.teacher, settings.distil)]


def card(settings: ACLSettings) -> dict[str, Any]:
    """The protocol, or what share of the labels was used."""
    common = protocols.card(settings)
    return common if settings.label_share == 1 else {**common, "protocol": f"semi-{settings.label_share:.3g}"}


PRESETS = protocols.presets(
    {"pretrain.optimiser": "sgd", "pretrain.lr": 0.06}
    | {"teacher.epochs": 2, "teacher.batch_size": 16, "distil.epochs": 2, "distil.batch_size": 64, "distil.attack.steps": 2},
)
PRESETS["short"] |= {"teacher.epochs": 30, "teacher.milestones": (15, 22), "distil.epochs": 10, "distil.milestones": (6, 8)}
PRESETS["paper-1%"] = {"label_share": 0.01}
PRESETS["paper-10%"] = {"label_share": 0.1, "distil.batch_size": 225}


# The README's AFF on CIFAR-100 is the code's default of 25 epochs; again an epoch early.
DATASETS = {**LINEAR_RATES, "cifar100": {**LINEAR_RATES["cifar100"], "aff.epochs": 25, "aff.milestones": (14, 19)}}


def make(name: str) -> Recipe:
    """The recipe `acl`."""
    finetuning_settings = (*protocols.FINETUNING_SETTINGS, "label_share", "semi", "teacher", "distil")
    return Recipe(
        name, ACLSettings(), plans, card, PRESETS, digits.adapt(name), DATASETS, finetuning_settings=finetuning_settings
    )
