"""Optimisers and the learning rate over a stage."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from rush_bench.errors import BadInput
from rush_bench.training.options import Optimisation, RunSettings


def learning_rate(settings: Optimisation, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from `warmup_from` to lr over `warmup_epochs`, then a cosine from lr to lr_min, or steps down.

    All by step, counted from 0. Milestones count from the start of the stage, warm-up included.
    """
    warmup, total = round(settings.warmup_epochs * steps_per_epoch), settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.warmup_from + (settings.lr - settings.warmup_from) * (step + 1) / warmup
    if settings.schedule == "steps":
        return settings.lr * settings.decay ** sum(step >= round(m * steps_per_epoch) for m in settings.milestones)
    phase = math.pi * (step - warmup) / max(1, total - warmup)
    return settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(phase)) / 2


def make_optimiser(settings: Optimisation, parameters: list[Any]) -> torch.optim.Optimizer:
    """The stage's optimiser, fused where that exists. `parameters` may be groups, as torch has them.

    Weight decay applies to every parameter whose group does not say otherwise (sources S5.22).
    """
    shared: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if settings.optimiser == "lars":
        return LARS(parameters, **shared, exclude_1d=settings.lars_exclude_1d)
    if settings.optimiser == "adam":
        betas = (settings.momentum, 0.999)
        return torch.optim.Adam(parameters, settings.lr, betas, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(parameters, **shared, nesterov=settings.nesterov, fused=True)


ONLY_WITH = {"nesterov": ("optimiser", "sgd"), "decay": ("schedule", "steps"), "lr_min": ("schedule", "cosine")}


def check_optimisation(settings: RunSettings, usual: RunSettings) -> None:
    """BadInput for a stage whose optimiser cannot be, or would not read what is no longer as in the `usual` settings.

    Milestones under a cosine are let pass: presets and `equal_cost` have them there.
    """
    for field in dataclasses.fields(settings):
        stage, default = getattr(settings, field.name), getattr(usual, field.name)
        if not isinstance(stage, Optimisation):
            continue
        if stage.optimiser == "sgd" and stage.nesterov and not stage.momentum:
            raise BadInput(
                f"{field.name}.nesterov=true needs {field.name}.momentum above 0; set one of them, such as "
                f"--set {field.name}.nesterov=false"
            )
        for name, (key, needed) in ONLY_WITH.items():
            value, chosen = getattr(stage, name), getattr(stage, key)
            if value and value != getattr(default, name) and chosen != needed:
                unread = f"{field.name}.{name}"
                raise BadInput(f"{unread} is for {key}={needed}, and {field.name}.{key} is {chosen}; leave {unread} out")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017; sources S1.4).

    SGD with momentum on gradients (decay included) scaled, tensor by tensor, by trust * |w| / (|g| + wd |w|), and by 1
    where either norm is zero. No host sync.
    """

    def __init__(
        self,
        parameters: list[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
        exclude_1d: bool = True,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.trust, self.exclude_1d = trust, exclude_1d

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; tensors of one dimension (BatchNorm, biases) are plain SGD without decay if `exclude_1d`."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient: Tensor = weight.grad
                if not (self.exclude_1d and weight.ndim <= 1):
                    weight_norm, gradient_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
                    ratio = self.trust * weight_norm / (gradient_norm + group["weight_decay"] * weight_norm)
                    ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
                    gradient = gradient.add(weight, alpha=group["weight_decay"]) * ratio
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                weight.add_(state["momentum_buffer"], alpha=-group["lr"])
