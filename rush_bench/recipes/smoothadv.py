"""SmoothAdv (Salman et al. 2019; sources S2.8): adversarial training of the smoothed classifier."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rush_bench.errors import BadInput
from rush_bench.noise import is_noise
from rush_bench.recipes import digits
from rush_bench.recipes.cohen import CIFAR_MEAN
from rush_bench.settings import Count, Level, Positive, Settings, Whole
from rush_bench.threats import Threat
from rush_bench.training.inner import attack_mode, pgd
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.stage import ATTACK_STEP, TRAIN_STEP, Batch, Context, Plan, Recipe
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage, presets
from rush_bench.training.supervised import card as supervised

NAMES = {"smoothadv": "SmoothAdv: adversarial training of a Gaussian-smoothed classifier (Salman et al. 2019)"}


@dataclass(frozen=True)
class SmoothAttackSettings(Settings):
    """The l2 attack on the smoothed classifier; with sigma .12 a released run from scratch, on ResNet-110 (S2.8).

    Its log certifies 57.8 % at l2 .4347 (82.4 % clean, 500 images). The 68.2 % of RUSH's Table 1 are another run: this attack
    at m = 1 in a fine-tuning of 30 epochs at a rate of .001, of a network pre-trained adversarially on ImageNet at 32 x 32.
    """

    method: Literal["pgd", "ddn"] = "pgd"
    draws: Count = 2  # m_train, of 1, 2, 4, 8
    eps: Positive = 127 / 256
    steps: Count = 10  # T
    ramp: Whole = 10  # epochs over which eps, and the radius that DDN begins with, grow linearly
    gamma: Level = 0.05  # DDN's factor of the radius


@dataclass(frozen=True)
class SmoothAdvTrainSettings(SupervisedSettings):
    """S2.8: a tenth of the rate every 50 of 150 epochs."""

    epochs: int = 150
    batch_size: int = 256
    milestones: tuple[float, ...] = (50, 100)
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class SmoothAdvSettings(RunSettings):
    """S2.8, but on ResNet-18 as all our rows (its own is ResNet-110). The paper has sigma .12, .25, .5 and 1.

    Networks from scratch only centre their input.
    """

    network: NetworkSettings = field(default_factory=lambda: NetworkSettings(mean=CIFAR_MEAN, std=(1.0, 1.0, 1.0)))
    noise: str = "gaussian:0.12"
    train: SmoothAdvTrainSettings = field(default_factory=SmoothAdvTrainSettings)
    attack: SmoothAttackSettings = field(default_factory=SmoothAttackSettings)


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log of the mean over m draws of softmax(logits)_y: eq. S of the paper. (B, m, K) and (B,) to (B,)."""
    label_log_probabilities = logits.log_softmax(2).gather(2, labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1))[..., 0]
    return math.log(logits.shape[1]) - label_log_probabilities.logsumexp(1)


def l2_norms(delta: Tensor) -> Tensor:
    """The l2 norm of each image's perturbation, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)


def l2_unit(delta: Tensor) -> Tensor:
    """A perturbation over its length as the paper's code divides, which rounds otherwise than `Threat.ascend`; 0 stays 0."""
    return delta / l2_norms(delta).clamp_min(1e-20)


def ddn(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    gamma: float = 0.05,
) -> Tensor:
    """Decoupled direction and norm (Rony et al. 2019) as SmoothAdv's code has it: in the l2 ball of eps and the box.

    logits: x' (B, C, H, W) to logits (B, m, K) of m draws, whose most frequent class is the prediction. The radius, eps at
    first, shrinks by gamma where x' is adversarial and grows where not. The smallest adversarial perturbation that was seen is
    returned, or the clean image where none was. The code also rounds to 256 levels, we do not. x' detached.
    """
    images = images.detach()
    delta, best_delta = torch.zeros_like(images), torch.zeros_like(images)
    farthest = l2_norms(torch.maximum(images, 1 - images))
    radius, smallest = torch.full_like(farthest, eps), farthest
    for step in range(steps):
        with torch.enable_grad():
            x = (images + delta).requires_grad_()
            scores = logits(x)
            (gradient,) = torch.autograd.grad(smoothed_loss(scores, labels).sum(), x)
        wrong = (scores.detach().argmax(2).mode(1).values != labels).view(-1, 1, 1, 1)
        norm = l2_norms(delta)
        smaller = wrong & (norm < smallest)
        best_delta, smallest = torch.where(smaller, delta, best_delta), torch.where(smaller, norm, smallest)
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * (step + 1) / steps)) / 2  # a cosine to 0.01, stepped first
        delta = delta + rate * l2_unit(gradient)
        radius = torch.minimum(radius * torch.where(wrong, 1 - gamma, 1 + gamma), farthest)
        delta = radius * l2_unit(delta)
        delta = (images + delta).clamp(0, 1) - images
    return Threat("l2", eps).project(images + best_delta, images)


class SmoothAdvStage(SupervisedStage):
    """min E CE(f(x' + n), y), x' the worst case in an l2 ball for the mean prediction over the same m draws n.

    A batch is split into m mini-batches, of which each image is there m times (S2.8): they are this stage's replays.
    """

    def __init__(self, context: Context, settings: SmoothAdvTrainSettings, attack: SmoothAttackSettings) -> None:
        super().__init__(context, settings)
        self.attack, self.replays = attack, attack.draws

    def scores(self, x: Tensor, noise: Tensor) -> Tensor:
        """(B, C, H, W) under noise (B, m, C, H, W): logits (B, m, K)."""
        return self.logits((x.unsqueeze(1) + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])

    def attacked(self, x: Tensor, labels: Tensor, noise: Tensor, batch: Batch) -> Tensor:
        """x' (B, C, H, W) against these very draws, which stay the same in all T steps."""
        attack = self.attack
        eps = attack.eps * min(1, (batch.epoch + 1) / max(1, attack.ramp))
        with attack_mode(self.network, "eval"):
            if attack.method == "ddn":
                return ddn(lambda v: self.scores(v, noise), x, labels, eps=eps, steps=attack.steps, gamma=attack.gamma)
            return pgd(
                lambda v: smoothed_loss(self.scores(v, noise), labels).sum(),
                x,
                Threat("l2", eps),
                step=2 * eps / attack.steps,
                steps=attack.steps,
                generator=batch.generator,
                start="zero",
                ascend=l2_unit,
            )

    def loss(self, batch: Batch) -> Tensor:
        assert self.noise is not None
        part_indices = batch.indices.tensor_split(self.replays)[batch.replay]
        part = Batch(batch.data, part_indices, batch.generator, batch.epoch, batch.step, batch.replay)
        x, y = self.inputs(part), part.labels
        noise = self.noise.sample((len(x), self.attack.draws, *x.shape[1:]), batch.generator)
        scores = self.scores(self.attacked(x, y, noise, part), noise)  # the draws of the attack are trained on
        return F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(self.attack.draws))


def plans(settings: SmoothAdvSettings) -> list[Plan]:
    """One stage."""
    if not is_noise(settings.noise):
        raise BadInput("smoothadv is a smoothed defence; give it a noise law, as in --set noise=gaussian:0.12")
    if settings.attack.draws > settings.train.batch_size:
        raise BadInput("attack.draws must be 1 to train.batch_size, which is split into so many parts")
    make = lambda context: SmoothAdvStage(context, settings.train, settings.attack)  # noqa: E731
    # each image is there m times, in m parts of the mini-batch in turn
    passes = settings.attack.draws * (settings.attack.steps * ATTACK_STEP + TRAIN_STEP)
    return [Plan("train", "train", settings.train, make, labelled=True, passes=passes)]


def card(settings: SmoothAdvSettings) -> dict[str, Any]:
    """A smoothed classifier, shown with RUSH's votes."""
    return supervised(settings.noise)


def make(name: str) -> Recipe:
    """The recipe `smoothadv`."""
    return Recipe(name, SmoothAdvSettings(), plans, card, presets(epochs=15), digits.adapt(name))
