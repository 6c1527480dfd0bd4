"""Fixing data augmentation (Rebuffi et al. 2021; sources S2.9): TRADES with CutMix, averaged weights, generated images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets import Images, as_images
from rush_bench.errors import BadInput
from rush_bench.networks import Classifier, build
from rush_bench.recipes import digits
from rush_bench.recipes.cohen import CIFAR_MEAN
from rush_bench.settings import Level, NonNegative, Positive, PositiveShare, Share
from rush_bench.threats import Threat
from rush_bench.training import losses
from rush_bench.training.inner import InnerSettings, Mode, attack_mode, frozen_running_statistics, starting_point
from rush_bench.training.options import NetworkSettings, RunSettings, file_setting
from rush_bench.training.protocols import trades_passes
from rush_bench.training.stage import FORWARD, Batch, Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets, refuse_noise
from rush_bench.training.supervised import card as supervised

NAMES = {"dataaug": "Data augmentation: TRADES with CutMix and averaged weights, generated images (Rebuffi et al. 2021)"}
CIFAR_DEVIATION = (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class AdamAttackSettings(InnerSettings):
    """S2.9: ten steps of Adam, the rate falling to a tenth after five; batch statistics that stay, as its code has it."""

    method: Literal["adam", "sign"] = "adam"  # sign: the PyTorch port's
    step: Positive = 0.1
    late_step: Positive = 0.01
    mode: Mode = "batch"


@dataclass(frozen=True)
class DataAugTrainSettings(SupervisedSettings):
    """S2.9. An epoch is as many images as the training split has, generated ones included."""

    beta: NonNegative = 6.0
    epochs: int = 400
    batch_size: int = 1024
    lr: float = 0.4  # 0.1 for each 256
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[float, ...] = ()
    warmup_epochs: float = 10
    nesterov: bool = True
    weight_decay: float = 5e-4  # not on BatchNorm
    average: Share = 0.995  # of the weights; its start is (1 + t) / (10 + t)
    bn_momentum: PositiveShare = 0.01  # of the running statistics, which are the first batch's to begin with
    cutmix: bool | None = None  # None: where there are no generated images, as the paper's ResNet-18 row
    generated: str = file_setting()  # an .npz file with `image` and `label`, such as the paper's million from a diffusion model
    generated_share: Level = 0.7  # of each batch
    label_smoothing: Share = 0.1  # of the generated images' labels
    select_images: int = 1024

    @property
    def mixes(self) -> bool:
        """Whether CutMix is on."""
        return not self.generated if self.cutmix is None else self.cutmix


@dataclass(frozen=True)
class DataAugSettings(RunSettings):
    """S2.9, on our ResNet-18 (its own is a pre-activation one with SiLU). `select`: PGD-40 chooses the epoch."""

    network: NetworkSettings = field(default_factory=lambda: NetworkSettings(mean=CIFAR_MEAN, std=CIFAR_DEVIATION))
    train: DataAugTrainSettings = field(default_factory=DataAugTrainSettings)
    attack: AdamAttackSettings = field(default_factory=AdamAttackSettings)
    select: InnerSettings = field(default_factory=lambda: InnerSettings(steps=40))


def adam_ascent(
    objective: Callable[[Tensor], Tensor], images: Tensor, settings: AdamAttackSettings, generator: torch.Generator
) -> Tensor:
    """Ascent of `objective` by Adam (Kingma and Ba 2015) in the pixels, projected at each step, from a uniform start."""
    images, threat = images.detach(), Threat("linf", settings.eps)
    x = threat.project(starting_point(images, threat, generator, settings.start), images)
    first_moment, second_moment = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(settings.steps):
        with torch.enable_grad():
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(x), x)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient**2
        move = first_moment / (1 - 0.9 ** (step + 1)) / ((second_moment / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        rate = settings.step if step < (settings.steps + 1) // 2 else settings.late_step
        x = threat.project(x.detach() + rate * move, images)
    return x


def cutmix(x: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A box of each image comes from another one (Yun et al. 2019), lambda ~ Beta(1, 1); one box per batch, as S2.9's code.

    x (B, C, H, W), targets (B, K) probabilities, mixed by the areas. No host sync.
    """
    (height, width), device = x.shape[-2:], x.device
    u = torch.rand(3, generator=generator, device=generator.device).to(device)
    partner = torch.randperm(len(x), generator=generator, device=generator.device).to(device)
    inside = []
    for size, position in ((height, u[1]), (width, u[2])):
        half, centre = (size * (1 - u[0]).sqrt()).floor().div(2, rounding_mode="floor"), (size * position).floor()
        pixel = torch.arange(size, device=device)
        inside.append((pixel >= centre - half) & (pixel < centre + half))
    box = inside[0].unsqueeze(1) & inside[1]
    share = box.float().mean()
    return torch.where(box, x[partner], x), (1 - share) * targets + share * targets[partner]


def read_generated(path: str, like: Images) -> Images:
    """Generated images of a file, of the shape and the classes of `like`; BadInput otherwise."""
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            keys = [next((key for key in (kind, kind + "s") if key in file), "") for kind in ("image", "label")]
            if not all(keys):
                raise BadInput(f"{path} has {', '.join(file)}; generated images need the keys image and label")
            pixels, labels = (file[key] for key in keys)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"generated images {path} cannot be read ({error}); give an .npz file with image and label") from error
    images = as_images(pixels, labels, classes=like.classes, name=Path(path).name, split="train")
    if images.shape != like.shape:
        raise BadInput(f"{path} has images of shape {images.shape}, {like.name} of {like.shape}; resize the file's images")
    return images.to(like.pixels.device)


class DataAugStage(SupervisedStage):
    """TRADES on mixed images; what is judged and kept is an exponential average of the weights."""

    settings: DataAugTrainSettings

    def __init__(self, context: Context, settings: DataAugSettings) -> None:
        super().__init__(context, settings.train, settings.select)
        self.settings, self.attack = settings.train, settings.attack
        self.average = build(self.network.spec)
        self.average.load_state_dict(self.network.state_dict())
        self.average.requires_grad_(False)
        train = self.splits["train"]
        self.generated = read_generated(settings.train.generated, train) if settings.train.generated else None

    def evaluated_network(self) -> Classifier:
        return self.average

    def norms(self) -> list[nn.BatchNorm2d]:
        """The network's BatchNorms."""
        return [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]

    def parameter_groups(self) -> list[Any]:
        undecayed = [weight for norm in self.norms() for weight in norm.parameters()]
        decayed = [weight for weight in self.network.parameters() if not any(weight is other for other in undecayed)]
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]

    def augmented_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Augmented images (B, C, H, W) and target probabilities (B, K)."""
        settings, classes, count = self.settings, len(batch.data.classes), len(batch.indices)
        if self.generated is None:
            x, targets = self.inputs(batch), F.one_hot(batch.labels, classes).float()
        else:
            real = round(count * (1 - settings.generated_share))
            shape, device = (count - real,), batch.generator.device
            chosen = torch.randint(len(self.generated), shape, generator=batch.generator, device=device)
            pixels = torch.cat([batch.data.pixels[batch.indices[:real]], self.generated.pixels[chosen]])
            labels = torch.cat([batch.data.labels[batch.indices[:real]], self.generated.labels[chosen]])
            mixed = Images(pixels, labels, labels, batch.data.classes, batch.data.name, "train")
            x = self.inputs(Batch(mixed, torch.arange(count, device=device), batch.generator, batch.epoch, batch.step))
            targets = F.one_hot(labels, classes).float()
            targets[real:] = targets[real:] * (1 - settings.label_smoothing) + settings.label_smoothing / classes
        return cutmix(x, targets, batch.generator) if settings.mixes else (x, targets)

    def attacked(self, x: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """x' away from the clean prediction or, as the code does where images are mixed, from the mixed labels."""
        with attack_mode(self.network, self.attack.mode):
            if not self.settings.mixes:
                with torch.no_grad():
                    targets = self.logits(x).softmax(1)

            def divergence(v: Tensor) -> Tensor:  # KL(targets || p(v)) up to a constant
                return losses.cross_entropy_to(self.logits(v), targets).sum()

            if self.attack.method == "sign":
                return self.attack.run(self.network, divergence, x, generator)
            return adam_ascent(divergence, x, self.attack, generator)

    def loss(self, batch: Batch) -> Tensor:
        x, targets = self.augmented_batch(batch)
        attacked = self.attacked(x, targets, batch.generator)
        for norm in self.norms():
            norm.momentum = 1.0 if batch.step == 0 else self.settings.bn_momentum
        with frozen_running_statistics(self.network):  # only the attacked images move the running statistics
            clean = self.logits(x)
        return losses.trades(clean, self.logits(attacked), targets, self.settings.beta)

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """The average follows: at most `average` of itself, less while it is young. Statistics are the network's."""
        decay = min(self.settings.average, (1 + batch.step) / (10 + batch.step))
        for averaged, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            averaged.lerp_(weight, 1 - decay)
        for statistic, latest in zip(self.average.buffers(), self.network.buffers(), strict=True):
            statistic.copy_(latest)

    def finish(self) -> None:
        self.network.load_state_dict(self.average.state_dict())


def plans(settings: DataAugSettings) -> list[Plan]:
    """One stage."""
    refuse_noise(settings, "dataaug")
    # mixed labels take the place of p(x) for the attack
    passes = trades_passes(settings.attack) - (FORWARD if settings.train.mixes else 0)
    return [Plan("train", "train", settings.train, lambda c: DataAugStage(c, settings), labelled=True, passes=passes)]


def card(settings: DataAugSettings) -> dict[str, Any]:
    """Generated images are extra data."""
    file = settings.train.generated
    return supervised(extra_data=f"generated images ({Path(file).name})" if file else None)


def make(name: str) -> Recipe:
    """The recipe `dataaug`."""
    return Recipe(name, DataAugSettings(), plans, card, presets(), digits.adapt(name))
