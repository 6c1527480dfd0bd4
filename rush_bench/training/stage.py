"""Stages, of which a recipe is made: they run in order, each with its own modules, optimiser, schedule and data split.

A stage is an `nn.Module` that owns everything it learns or carries (network, projector, momentum encoder, teacher,
perturbations as buffers): its state dict and the optimiser's are all that a checkpoint needs, since the randomness of a
step comes from (seed, stage, step) alone. Override `loss`; the other methods are hooks with sensible defaults.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.datasets import Images
from rush_bench.networks import Classifier
from rush_bench.training.options import Optimisation, RunSettings

# Passes of an image through the encoder, in forward passes: a forward pass; forward and back to the image (an attack step);
# forward and back to image and weights (a training step). benchmarks/training_cost.py compares them with counted FLOPs.
FORWARD, ATTACK_STEP, TRAIN_STEP = 1, 2, 3


@dataclass(frozen=True)
class Batch:
    """One mini-batch. `indices` (B,) are positions in the stage's data; `generator` is this step's own randomness."""

    data: Images
    indices: Tensor
    generator: torch.Generator
    epoch: int
    step: int  # counted from the start of the stage
    replay: int = 0  # which of the stage's `replays` of this mini-batch

    @cached_property
    def images(self) -> Tensor:
        """(B, C, H, W) float32 in [0,1], on the training device."""
        return self.data.floats(self.indices)

    @cached_property
    def labels(self) -> Tensor:
        """(B,) int64."""
        return self.data.labels[self.indices]


@dataclass(frozen=True)
class Context:
    """What a stage is built from.

    `splits`: `pretrain`, `train`, `val`, on the device, those the recipe asked for. `carried`: state dicts that a
    stage's `finish` leaves for later stages beside the network itself (a teacher); every checkpoint has them. The store
    keeps `transform`, the weights of a transform before the network.
    """

    network: Classifier
    settings: Any
    splits: Mapping[str, Images]
    seed: int
    carried: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Stage(nn.Module):
    """Base of all stages: holds the network under training; subclasses add modules and say what the loss is."""

    name = "stage"
    second_order = False  # whether the loss differentiates a gradient again
    replays = 1  # steps taken on each mini-batch in turn (Free-m)
    selection_metric: str | None = None  # the validation metric that chooses the best epoch; None: the last epoch is the best
    best: Mapping[str, Tensor] | None = None  # `weights` after the best epoch, once `finish` is called

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.network = context.network
        self.run_settings: RunSettings = context.settings
        self.splits, self.seed, self.carried = context.splits, context.seed, context.carried

    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimise on this batch."""
        raise NotImplementedError

    def prepare(self, fresh: bool) -> None:
        """Before the first step of this process; `fresh` is False when a checkpoint has just been loaded."""

    def begin_epoch(self, epoch: int) -> None:
        """At the start of each epoch, and again when one is resumed: set train/eval modes and whatever changes by epoch."""
        self.train()

    def backward(self, batch: Batch) -> Tensor:
        """Leave gradients in the parameters and return the loss, detached. Override to use the input's gradient too."""
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def after_step(self, batch: Batch) -> None:
        """After the optimiser's step (weight averages, momentum encoders)."""

    def finish(self) -> None:
        """After the last epoch (put averaged weights into the network). A resume may run it again."""

    def validates_after(self, epoch: int, epochs: int) -> bool:
        """Whether to validate after this epoch (counted from 0)."""
        return True

    def validate(self) -> dict[str, float]:
        """Metrics on the validation split; may leave the modules in any mode."""
        return {}

    def weights(self) -> Mapping[str, Tensor]:
        """The state that `validate` evaluated and that is kept of the best epoch (of averaged weights, where there are any)."""
        return self.network.state_dict()

    def parameter_groups(self) -> list[Any]:
        """What the optimiser updates: parameters, or groups of them as torch's optimisers take."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def autocast(self) -> torch.autocast:
        """The precision that the settings ask for, for forward passes through the network."""
        device = next(self.network.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.run_settings.precision == "bfloat16")


@dataclass(frozen=True)
class Plan:
    """One stage of a recipe: its name, the split it sees, its settings and how to build it.

    `passes`: what one image costs in one epoch, in forward passes (see FORWARD, ATTACK_STEP, TRAIN_STEP); NaN: not counted.
    `of_encoder`: False where these go through another network than the encoder, such as a U-Net.
    """

    name: str
    split: str  # pretrain, train, or labelled and unlabelled, which share `train` by the setting `label_share`
    settings: Optimisation
    make: Callable[[Context], Stage]
    labelled: bool = False
    passes: float = math.nan
    of_encoder: bool = True

    @property
    def encoder_passes(self) -> float:
        """Passes of one image through the encoder in one epoch; NaN where that is not what it takes."""
        return self.passes if self.of_encoder else math.nan


@dataclass(frozen=True)
class Recipe:
    """A system that can be trained: the registry's `make(name)` returns one.

    `settings`: a frozen dataclass, its defaults are the preset `paper`. `presets` and `adapt(preset, shape)` are layers
    of overrides, the second for the image shape (C, H, W) at hand. `card(settings)` gives protocol, extra_data, votes.
    `datasets`: what the source sets on a data set, by its name (`stl10-96`: at that size only); presets override it.
    `dependent_defaults(settings)`: defaults that depend on other settings, a layer below the user's. `finetuning_settings`:
    settings that no stage before the first labelled one reads; runs that differ in these alone share their pre-training.
    `needs_encoder`: it trains what `--from` names, and nothing without it.
    """

    name: str
    settings: RunSettings
    plans: Callable[[Any], list[Plan]]
    card: Callable[[Any], dict[str, Any]]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapt: Callable[[str, tuple[int, ...]], Mapping[str, Any]] = lambda preset, shape: {}
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dependent_defaults: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    finetuning_settings: tuple[str, ...] = ()
    needs_encoder: bool = False
