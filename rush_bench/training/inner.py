"""The inner attack: images that maximise an objective, made while training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rush_bench.errors import RushBenchError
from rush_bench.settings import Count, PositiveShare, Settings
from rush_bench.threats import Threat

Start = Literal["uniform", "zero", "gaussian"]
Mode = Literal["eval", "train", "batch"]
GAUSSIAN_START_STD = 1e-3  # standard deviation of the gaussian start (TRADES' code, sources S2.16)


@dataclass(frozen=True)
class InnerSettings(Settings):
    """The l-inf attack that most systems share: PGD-10 at 8/255 (S2.16). `mode`: see `attack_mode`."""

    eps: PositiveShare = 8 / 255
    step: PositiveShare = 2 / 255  # in pixel units
    steps: Count = 10
    start: Start = "uniform"
    mode: Mode = "eval"

    @property
    def threat(self) -> Threat:
        """The ball that x' stays in."""
        return Threat("linf", self.eps)

    def run(
        self, module: nn.Module, objective: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator
    ) -> Tensor:
        """x' by `pgd` on an objective that goes through `module`, which is as it was afterwards (see `attack_mode`)."""
        with attack_mode(module, self.mode):
            return pgd(objective, images, self.threat, step=self.step, steps=self.steps, start=self.start, generator=generator)


def pgd(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    threat: Threat,
    *,
    step: float,
    steps: int,
    generator: torch.Generator,
    start: Start = "uniform",
    box: bool = True,
    ascend: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018) on `objective`, in pixel units; x' detached, as `images` otherwise.

    objective: x' (B, C, H, W) to a scalar, summed over the batch (in l-inf a mean would do as well). The gradient is
    taken in x' alone. Each step ends in the threat's ball around `images` and, with `box`, in [0,1]. start: `uniform` in the
    ball (l2: direction and radius uniform), `zero`, or `gaussian`, sigma 0.001. ascend: a gradient to a unit step (None: the
    threat's). One host sync, at the end: a gradient that was not finite is a RushBenchError that names the row of the batch.
    """
    images, ascend = images.detach(), ascend or threat.ascend
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    x = threat.project(starting_point(images, threat, generator, start), images, box)
    for _ in range(steps):
        with torch.enable_grad():
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(x), x)
        finite &= gradient.flatten(1).isfinite().all(1)
        x = threat.project(x.detach() + step * ascend(gradient), images, box)
    if not finite.all():
        raise RushBenchError(
            f"the inner attack's gradient at image {int(finite.int().argmin())} of the batch is not finite; lower the learning "
            "rate, or look at the network and the objective there"
        )
    return x


def starting_point(images: Tensor, threat: Threat, generator: torch.Generator, start: Start) -> Tensor:
    """Where the attack starts, before any projection: a new tensor."""
    if start == "zero":
        return images.clone()
    shape, device = images.shape, generator.device
    if start == "gaussian":
        return images + GAUSSIAN_START_STD * torch.randn(shape, generator=generator, device=device, dtype=images.dtype)
    if threat.norm == "linf":
        uniform = torch.rand(shape, generator=generator, device=device, dtype=images.dtype)
        return images + threat.eps * (2 * uniform - 1)
    direction = threat.ascend(torch.randn(shape, generator=generator, device=device, dtype=images.dtype))
    radius = torch.rand((len(images), 1, 1, 1), generator=generator, device=device, dtype=images.dtype)
    return images + threat.eps * radius * direction


@contextmanager
def attack_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """A module as the inner attack sees it, and as it was again afterwards: weights ask for no gradient.

    `eval`: running statistics, which stay. `train`: the mode that the stage trains in, by which the statistics move at every
    forward pass, as in systems whose code never leaves train(). `batch`: that mode too, but the running ones stay.
    """
    training = [(part, part.training) for part in module.modules()]
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        if mode == "eval":
            module.eval()
        for weight in weights:
            weight.requires_grad_(False)
        with frozen_running_statistics(module) if mode == "batch" else nullcontext():
            yield
    finally:
        for part, was_training in training:
            part.training = was_training
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm in train mode normalises by the batch and leaves its running statistics alone."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats and part.training]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
