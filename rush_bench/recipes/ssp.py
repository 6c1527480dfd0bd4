"""Adversarial robustness from self-supervised pre-training to fine-tuning (Chen et al. 2020b; sources S2.11).

`ssp` is the paper's ensemble: three networks, each pre-trained on its own task, fine-tuned and attacked as one.
`ssp_joint` pre-trains the three together over a shared trunk. The released code has no fine-tuning from such a trunk; its
ensembles are three whole networks. So here each task leaves a network, a copy of the trunk and the task's last stage, and
the three are fine-tuned as `ssp`'s are. The other names are single members.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from rush_bench.errors import BadInput
from rush_bench.networks.ensemble import Parallel, trunk
from rush_bench.networks.resnet import Encoder
from rush_bench.recipes import digits
from rush_bench.recipes.pgd_at import PGDATStage
from rush_bench.training import protocols
from rush_bench.training.inner import InnerSettings
from rush_bench.training.joint import JointSettings, JointStage
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.pretext import Jigsaw, Rotation, Selfie, SelfieSettings, TaskSettings
from rush_bench.training.protocols import LinearSettings, PretrainedSettings
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, presets

NAMES = {
    "ssp": "adversarial self-supervised pre-training: ensemble of the three tasks' networks (Chen et al. 2020b)",
    "ssp_joint": "adversarial pre-training on the three tasks jointly, shared trunk, diverse gradients (Chen et al. 2020b)",
    "ssp_rotation": "adversarial pre-training on rotations, then adversarial fine-tuning (Chen et al. 2020b)",
    "ssp_jigsaw": "adversarial pre-training on jigsaws, then adversarial fine-tuning (Chen et al. 2020b)",
    "ssp_selfie": "adversarial pre-training on Selfie, then adversarial fine-tuning (Chen et al. 2020b)",
}
STAGES: dict[str, Any] = {"rotation": Rotation, "jigsaw": Jigsaw, "selfie": Selfie}
FINETUNING_SETTINGS = ("finetune", "finetune_attack", "linear", "noise")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SSPFinetuneSettings(SupervisedSettings):
    """S2.11: PGD-AT, 100 epochs after 200 warm-up steps. `partial` is the paper's, in our definition: its code has full only.

    With another protocol than AFF (S1.5) the settings of the group `linear` hold instead.
    """

    protocol: Literal["SLF", "NSLF", "ALF", "AFF"] = "AFF"
    mode: Literal["full", "partial"] = "full"
    epochs: int = 100
    milestones: tuple[float, ...] = (60, 80)
    warmup_epochs: float = 0.57  # 200 iterations of the 351 that 45,000 images take
    warmup_from: float = 0.01
    weight_decay: float = 3e-4


@dataclass(frozen=True)
class SharedSettings(RunSettings):
    """S2.11, on our ResNet-18 (the paper: ResNet-50v2)."""

    network: NetworkSettings = field(default_factory=lambda: NetworkSettings(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(mode="train"))  # of pre-training, likewise
    finetune: SSPFinetuneSettings = field(default_factory=SSPFinetuneSettings)
    finetune_attack: InnerSettings = field(default_factory=lambda: InnerSettings(mode="train"))  # as its code
    linear: LinearSettings = field(default_factory=LinearSettings)

    def linear_run(self) -> PretrainedSettings:
        """What SLF, NSLF and ALF have in common with other systems."""
        return PretrainedSettings(noise=self.noise, finetune=replace(self.linear, protocol=self.finetune.protocol))


@dataclass(frozen=True)
class SSPSettings(SharedSettings):
    """Each task on its own."""

    rotation: TaskSettings = field(default_factory=TaskSettings)
    jigsaw: TaskSettings = field(default_factory=TaskSettings)
    selfie: SelfieSettings = field(default_factory=SelfieSettings)


@dataclass(frozen=True)
class JointRunSettings(SharedSettings):
    """The three tasks over one trunk."""

    joint: JointSettings = field(default_factory=JointSettings)


class SSPFinetune(PGDATStage):
    """PGD-AT from pre-trained encoders. An ensemble is one network to the attack and to the loss (its mean softmax)."""

    name = "finetune"

    def __init__(self, context: Context, settings: SSPFinetuneSettings, attack: InnerSettings) -> None:
        super().__init__(context, settings, attack)
        encoder = self.network.encoder
        encoders = cast(list[Encoder], list(encoder.members) if isinstance(encoder, Parallel) else [encoder])
        # Partial: stem to layer3 are frozen, their BatchNorm in eval(); layer4 and the linear layer learn.
        trunk_parts = [member.get_submodule(name) for member in encoders for name in trunk(member)]
        self.frozen = trunk_parts if settings.mode == "partial" else []
        for part in self.frozen:
            part.requires_grad_(False)

    def begin_epoch(self, epoch: int) -> None:
        self.train()
        for part in self.frozen:
            part.eval()


SECOND_ORDER_STEP = 4  # a gradient in the image that is itself differentiated in it: forward and back, twice


def plans(settings: SSPSettings, tasks: tuple[str, ...]) -> list[Plan]:
    """A pre-training stage for each task's network, then one fine-tuning for all."""
    check_members(settings, len(tasks))

    def pretrain(number: int, task: str) -> Plan:
        task_settings = getattr(settings, task)
        make = lambda context: STAGES[task](context, task_settings, settings.attack, number)  # noqa: E731
        passes = settings.attack.steps * ATTACK_STEP + 2 * TRAIN_STEP  # clean and attacked
        return Plan(task, "pretrain", task_settings, make, passes=passes, of_encoder=task != "selfie")

    return [*(pretrain(number, task) for number, task in enumerate(tasks)), finetuning_plan(settings)]


def joint_plans(settings: JointRunSettings) -> list[Plan]:
    """One pre-training stage for the three networks, then one fine-tuning."""
    check_members(settings, len(STAGES))
    joint = settings.joint
    make = lambda context: JointStage(context, joint, settings.attack)  # noqa: E731
    return [Plan("joint", "pretrain", joint, make, passes=joint_passes(settings), of_encoder=False), finetuning_plan(settings)]


def joint_passes(settings: JointRunSettings) -> float:
    """Of an image in the joint stage, whose tasks have rows of their own."""
    diverse = settings.joint.diversity != 0
    # Where the weights minimise log det too, the backward pass goes twice through the gradient's graph and the image's.
    worst = FORWARD + 1 + 2 + 2 if diverse and settings.joint.penalise else TRAIN_STEP
    return settings.attack.steps * (SECOND_ORDER_STEP if diverse else ATTACK_STEP) + TRAIN_STEP + worst


def check_members(settings: SharedSettings, count: int) -> None:
    """BadInput where the network has another number of members than the recipe has tasks."""
    if max(1, settings.network.members) != count:
        raise BadInput(f"network.members must be {count}, one for each task of this recipe")


def finetuning_plan(settings: SharedSettings) -> Plan:
    """The last stage: the paper's adversarial fine-tuning, or a protocol that trains the linear layer."""
    finetune, default_protocol = settings.finetune, LinearSettings().protocol
    if settings.linear.protocol not in (default_protocol, finetune.protocol):
        raise BadInput(f"linear.protocol follows finetune.protocol: --set finetune.protocol={settings.linear.protocol}")
    protocols.check_noise(settings.linear_run())
    if finetune.protocol != "AFF":
        if finetune.mode != "full":
            raise BadInput(
                f"finetune.mode={finetune.mode} is a way of AFF; finetune.protocol={finetune.protocol} trains the linear layer"
            )
        return replace(protocols.finetuning_plan(settings.linear_run()), name="linear")

    def make(context: Context) -> SSPFinetune:
        return SSPFinetune(context, finetune, settings.finetune_attack)

    return Plan(
        "finetune", "train", finetune, make, labelled=True, passes=settings.finetune_attack.steps * ATTACK_STEP + TRAIN_STEP
    )


def card(settings: SharedSettings) -> dict[str, Any]:
    """Adversarial full fine-tuning, or of the last stage, or one of the other protocols."""
    if settings.finetune.protocol != "AFF":
        return protocols.card(settings.linear_run())
    full = settings.finetune.mode == "full"
    return {"protocol": "AFF" if full else "partial AFF", "extra_data": None, "votes": [0]}


def make(name: str) -> Recipe:
    """`ssp`, `ssp_joint`, or one of the members."""
    layers = presets("finetune", epochs=10)
    layers["short"] |= {"linear.epochs": 10, "linear.milestones": (6, 8)}
    layers["smoke"] |= {"linear.epochs": 2, "linear.batch_size": 64, "linear.milestones": (), "linear.lr": 0.03}
    layers["smoke"] |= {"linear.attack.steps": 2}
    joint, tasks = name == "ssp_joint", tuple(STAGES) if name == "ssp" else (name.removeprefix("ssp_"),)
    settings: SharedSettings = JointRunSettings() if joint else SSPSettings()
    if joint or len(tasks) > 1:
        settings = replace(settings, network=replace(settings.network, members=len(STAGES)))
    for task in ("joint",) if joint else STAGES:
        layers["short"][f"{task}.epochs"] = 4 if joint else 6
        layers["smoke"] |= {f"{task}.epochs": 2, f"{task}.batch_size": 64}
    if joint:
        for preset in ("short", "smoke"):  # few steps: faster ones
            layers[preset]["joint.lr"] = 0.05
        return Recipe(
            name,
            settings,
            joint_plans,
            card,
            layers,
            digits.adapt(name),
            finetuning_settings=FINETUNING_SETTINGS,
        )
    for preset in ("short", "smoke"):  # few steps, and no time to warm up: the sum of four terms at the rate of one
        layers[preset]["selfie.lr"] = 0.025
    return Recipe(
        name,
        settings,
        lambda s: plans(s, tasks),
        card,
        layers,
        digits.adapt(name),
        finetuning_settings=FINETUNING_SETTINGS,
    )
