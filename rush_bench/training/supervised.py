"""The shared part of systems that learn from labels from the start: augmentation, validation under attack, presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from rush_bench.datasets.views import SimCLRViews, pad_crop
from rush_bench.errors import BadInput
from rush_bench.features import outputs
from rush_bench.networks import Classifier
from rush_bench.noise import is_noise, noise_from
from rush_bench.settings import Count, Share, Whole
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import Optimisation, RunSettings
from rush_bench.training.stage import Batch, Context, Stage
from rush_bench.training.validation import accuracy, evenly_spaced, robust_accuracy


@dataclass(frozen=True)
class SupervisedSettings(Optimisation):
    """Defaults: our PGD-AT for ResNet-18 (sources S2.16); the best epoch is chosen on the validation split (S1.6)."""

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    schedule: Literal["cosine", "steps"] = "steps"
    milestones: tuple[float, ...] = (100, 150)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Literal["none", "crop_flip", "simclr"] = "crop_flip"
    padding: Whole = 4
    flip: Share = 0.5
    select_every: Count = 1  # epochs between validations
    select_images: Whole = 1000  # images that a validation attacks, if the recipe has an attack (ours; 0: all)


class SupervisedStage(Stage):
    """Network and labels; subclasses write `loss`. `attack`: what training and validation attack with, if anything."""

    name = "train"

    def __init__(self, context: Context, settings: SupervisedSettings, attack: InnerSettings | None = None) -> None:
        super().__init__(context)
        self.settings, self.inner = settings, attack
        self.noise = noise_from(self.run_settings.noise)
        self.selection_metric = "robust" if attack is not None else "clean" if self.noise is None else "noisy"
        self.views = SimCLRViews.for_dataset(self.splits["train"].name) if settings.augment == "simclr" else None

    def inputs(self, batch: Batch) -> Tensor:
        """The augmented images, before any noise or attack: (B, C, H, W) in [0,1]."""
        if self.views is not None:
            return self.views(batch.images, batch.generator)
        if self.settings.augment == "crop_flip":
            return pad_crop(batch.images, batch.generator, self.settings.padding, self.settings.flip)
        return batch.images

    def logits(self, x: Tensor) -> Tensor:
        """(B, K) in float32, computed in the precision that the settings ask for."""
        with self.autocast():
            return self.network(x).float()

    def cross_entropy(self, x: Tensor, labels: Tensor) -> Tensor:
        """CE(f(x), y), batch mean."""
        return F.cross_entropy(self.logits(x), labels)

    def evaluated_network(self) -> Classifier:
        """The network that validation looks at: an average of weights, where there is one."""
        return self.network

    def weights(self) -> Mapping[str, Tensor]:
        return self.evaluated_network().state_dict()

    def validates_after(self, epoch: int, epochs: int) -> bool:
        return (epoch + 1) % self.settings.select_every == 0 or epoch + 1 == epochs

    def validate(self) -> dict[str, float]:
        """`clean` accuracy; with a noise law, `noisy` (one fixed draw per image); with an attack, `robust`."""
        self.eval()
        val, network = self.splits["val"], self.evaluated_network()
        with self.autocast():
            metrics = {"clean": accuracy(outputs(network, val), val.labels)}
            if self.noise is not None:
                metrics["noisy"] = accuracy(outputs(network, val, self.noise, self.seed), val.labels)
            if self.inner is not None:
                subset = evenly_spaced(val, self.settings.select_images)
                metrics["robust"] = robust_accuracy(network, subset, self.inner, self.seed)
        return metrics


def presets(stage: str = "train", epochs: int = 20, smoke: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Layers on a supervised stage's paper settings: a short run with its decays in proportion, and a smoke test."""
    milestones = (math.floor(epochs / 2), math.floor(3 * epochs / 4))
    return {
        "paper": {},
        "short": {f"{stage}.epochs": epochs, f"{stage}.milestones": milestones},
        "smoke": {
            "n_train": 256,
            f"{stage}.epochs": 2,
            f"{stage}.batch_size": 64,
            f"{stage}.milestones": (),
            **(smoke or {}),
        },
    }


def refuse_noise(settings: RunSettings, recipe: str) -> None:
    """BadInput for a noise law in a recipe that does not train under it: its card would say what never happened."""
    if is_noise(settings.noise):
        raise BadInput(
            f"{recipe} trains without noise; leave noise={settings.noise} out, or train noise_sup, cohen or smoothadv under it"
        )


def card(noise: str = "none", extra_data: str | None = None) -> dict[str, Any]:
    """With a noise law it is shown as a randomised defence at 1 and at 64 votes, else as a deterministic one."""
    return {"protocol": "supervised", "extra_data": extra_data, "votes": [1, 64] if is_noise(noise) else [0]}
