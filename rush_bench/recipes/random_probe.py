"""The second control (protocol 5, T14): RUSH without pre-training, its noisy linear probe on random features."""

from dataclasses import dataclass, field, replace
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.noise import is_noise
from rush_bench.recipes import digits
from rush_bench.recipes.rush import RushSettings
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.options import RunSettings
from rush_bench.training.protocols import linear_passes
from rush_bench.training.stage import Plan, Recipe

NAMES = {
    "random_probe": "control for RUSH: its noisy linear probe, moving BatchNorm included, on a network that never trained",
    "random_probe_frozen": "control for RUSH: a noisy linear probe of a network that never trained, BatchNorm as it was drawn",
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "short": {"finetune.epochs": 10},
    "smoke": {"n_train": 256, "finetune.epochs": 2, "finetune.batch_size": 64},
}


@dataclass(frozen=True)
class RandomProbeSettings(RunSettings):
    """RUSH's second stage unchanged (its appendix B, sources S5.21), on a randomly initialised network.

    BatchNorm's biases learn there and its statistics follow the noisy images, which is training of a kind; in
    `random_probe_frozen` nothing but the head moves.
    """

    noise: str = RushSettings.noise
    finetune: FinetuneSettings = field(default_factory=lambda: RushSettings().finetune)


def plans(settings: RandomProbeSettings, frozen: bool = False) -> list[Plan]:
    """Fine-tuning alone: RUSH eq. 12. BadInput where BatchNorm does not do what the recipe's name says."""
    if (settings.finetune.bn_adapt == "none") != frozen:
        raise BadInput(
            f"finetune.bn_adapt={settings.finetune.bn_adapt}: use random_probe{'' if frozen else '_frozen'} for this"
        )
    if not is_noise(settings.noise):
        raise BadInput("random_probe is a smoothed defence; give it a noise law, as in --set noise=uniform:0.3")
    if settings.finetune.protocol != "NSLF":
        raise BadInput(f"random_probe is RUSH's second stage, NSLF; leave finetune.protocol={settings.finetune.protocol} out")
    finetune = settings.finetune
    return [Plan("finetune", "train", finetune, lambda c: Finetune(c, finetune), labelled=True, passes=linear_passes(finetune))]


def card(settings: RandomProbeSettings) -> dict[str, Any]:
    """The protocol and the votes of RUSH."""
    return {"protocol": "NSLF", "extra_data": None, "votes": [1, 64]}


def make(name: str) -> Recipe:
    """The recipe `random_probe`, or `random_probe_frozen`."""
    settings, frozen = RandomProbeSettings(), name == "random_probe_frozen"
    if frozen:
        settings = replace(settings, finetune=replace(settings.finetune, bn_adapt="none"))
    return Recipe(name, settings, lambda settings: plans(settings, frozen), card, PRESETS, digits.adapt(name))
