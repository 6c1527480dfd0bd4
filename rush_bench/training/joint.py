"""Adversarial pre-training on three tasks at once, over one trunk (Chen et al. 2020b, "ensemble pre-training"; sources S2.11).

The tasks share everything but the last stage of the encoder, and their perturbations are made together: beside the
tasks' losses the attack raises a measure of how far apart the tasks' input gradients point.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.networks.ensemble import Parallel, own_trunks, share_trunk
from rush_bench.networks.resnet import Encoder
from rush_bench.settings import NonNegative, Positive
from rush_bench.training.inner import InnerSettings
from rush_bench.training.pretext import Jigsaw, Problem, Rotation, Selfie, SelfieSettings, TaskStage
from rush_bench.training.second_order import FastSecondDerivatives
from rush_bench.training.stage import Batch, Context, Stage

TASKS: tuple[type[TaskStage], ...] = (Rotation, Jigsaw, Selfie)  # one for each member of the network


@dataclass(frozen=True)
class JointSettings(SelfieSettings):
    """S2.11; momentum, weight decay, cosine without warm-up, crops and mirror images as in the released code."""

    epochs: int = 150
    batch_size: int = 80  # S2.11: 32 to 80
    lr: float = 0.001
    warmup_epochs: float = 0
    lr_min: float = 1e-8
    padding: int = 4
    flip: float = 0.5
    diversity: NonNegative = 0.1  # lambda, the weight of log det
    ridge: Positive = 1e-5
    penalise: bool = True  # as released: the weights minimise what the attack maximises, log det included
    selfie_weight: NonNegative = 4.0  # as released: Selfie's loss is summed over its hidden places


def log_det(gradients: Tensor, ridge: float = 1e-5) -> Tensor:
    """How diverse K directions per image are: log det(G^T G + ridge I), G's columns of unit length; batch mean, a scalar.

    gradients: (K, B, ...), whose lengths do not matter. At most K log(1 + ridge), reached when they are orthogonal.
    """
    g = gradients.flatten(2).transpose(0, 1)  # (B, K, D)
    g = g / (torch.linalg.vector_norm(g, dim=2, keepdim=True) + 1e-10)
    gram = g @ g.transpose(1, 2) + ridge * torch.eye(g.shape[1], device=g.device, dtype=g.dtype)
    return torch.linalg.slogdet(gram).logabsdet.mean()


class JointStage(Stage):
    """min over weights of 1/6 sum_i (L_i(x_i) + L_i(x_i')) + lambda h(x'), with x' = argmax of sum_i L_i + lambda h.

    x_i is task i's version of the image and has its own perturbation; h = `log_det` of the three dL_i/dx_i'. Its own
    gradient is exact, hence of second order in the losses (as released: no term is held constant), so a step of the
    attack costs four passes in place of two. `penalise=False` leaves h to the attack alone.

    Member 0 (rotation) owns the trunk while it learns, stem to last stage but one; the last stages are the members'.
    Selfie needs the trunk only, so that its member's last stage stays as it was made. In the end each member has its own copy.
    """

    name, second_order = "joint", True

    settings: JointSettings

    def __init__(self, context: Context, settings: JointSettings, attack: InnerSettings) -> None:
        super().__init__(context)
        self.settings, self.inner = settings, attack
        ensemble = context.network.encoder
        if not isinstance(ensemble, Parallel) or len(ensemble.members) != len(TASKS):
            raise BadInput(
                f"joint pre-training has a member for each of its {len(TASKS)} tasks; set network.members={len(TASKS)}"
            )
        self.encoders = cast(list[Encoder], list(ensemble.members))
        share_trunk(self.encoders)
        self.tasks = [stage_class(context, settings, attack, number) for number, stage_class in enumerate(TASKS)]
        self.learners = nn.ModuleList(self.tasks)
        self.task_weights = [settings.selfie_weight if stage_class is Selfie else 1.0 for stage_class in TASKS]

    def parameter_groups(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for task in self.tasks for parameter in task.parameter_groups()))  # the trunk once

    def losses(self, v: Tensor, problems: list[Problem]) -> Tensor:
        """sum_i L_i(v_i) of v (3B, C, H, W), each task's images through the network on their own: a scalar."""
        # The fused kernels of attention cannot be differentiated twice.
        with self.autocast(), sdpa_kernel(SDPBackend.MATH), FastSecondDerivatives():
            losses = [
                weight * F.cross_entropy(scores(part).float(), answers)
                for weight, part, (_, scores, answers) in zip(self.task_weights, v.chunk(len(TASKS)), problems, strict=True)
            ]
        return torch.stack(losses).sum()

    def objective(self, v: Tensor, problems: list[Problem]) -> tuple[Tensor, Tensor | float]:
        """The sum of the losses at v, which requires a gradient, and lambda h there."""
        total = self.losses(v, problems)
        if not self.settings.diversity:
            return total, 0.0
        (gradient,) = torch.autograd.grad(total, v, create_graph=True)  # v_i is in L_i alone
        return total, self.settings.diversity * log_det(gradient.unflatten(0, (len(TASKS), -1)), self.settings.ridge)

    def loss(self, batch: Batch) -> Tensor:
        images = pad_crop(batch.images, batch.generator, self.settings.padding, self.settings.flip)
        problems = [task.problem(images, batch.generator) for task in self.tasks]
        x = torch.cat([problem[0] for problem in problems])

        def attack_objective(v: Tensor) -> Tensor:
            total, h = self.objective(v, problems)
            return total + h

        attacked = self.inner.run(self, attack_objective, x, batch.generator)
        clean_loss = self.losses(x, problems)
        if self.settings.penalise:
            attacked_loss, h = self.objective(attacked.requires_grad_(), problems)
        else:
            attacked_loss, h = self.losses(attacked, problems), 0.0
        return (clean_loss + attacked_loss) / (2 * len(TASKS)) + h

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The share of right answers, by task."""
        return {task.name: task.validate()["task"] for task in self.tasks}

    def finish(self) -> None:
        own_trunks(self.encoders)
