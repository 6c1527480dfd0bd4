"""Purification by diffusion (DiffPure: Nie et al. 2022): a DDPM (Ho et al. 2020) in front of a network that never met it.

Two systems share the DDPM's stage: `purify` defends a plainly supervised network, `purify_simclr` the recipe `simclr`.
"""

import copy
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.networks.ddpm import UNet, linear_schedule
from rush_bench.noise import Gaussian, Stream
from rush_bench.recipes import digits
from rush_bench.recipes.simclr import PRESETS, SimCLRStage
from rush_bench.recipes.standard import StandardStage
from rush_bench.settings import MOST, Count, NonNegative, Positive, PositiveShare, Range, Settings, Share, Whole
from rush_bench.training.contrastive import ContrastiveSettings
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.options import Optimisation, RunSettings
from rush_bench.training.protocols import linear_passes
from rush_bench.training.seeds import seeded
from rush_bench.training.stage import TRAIN_STEP, Batch, Context, Plan, Recipe, Stage
from rush_bench.training.supervised import SupervisedSettings, presets

NAMES = {
    "purify": "DiffPure: a small DDPM that purifies images for a plain supervised network (Nie et al. 2022)",
    "purify_simclr": "DiffPure in front of SimCLR with a linear classifier",
}


@dataclass(frozen=True)
class DiffusionSettings(Optimisation):
    """Defaults: sources S2.18, Ho et al. 2020 for CIFAR-10; the U-Net is a smaller one (see `networks.ddpm`)."""

    epochs: Count = 2048  # 800k steps of 128 images of 50,000
    batch_size: Count = 128
    optimiser: Literal["sgd", "lars", "adam"] = "adam"
    lr: Positive = 2e-4
    warmup_epochs: NonNegative = 12.8  # 5,000 steps; their code
    lr_min: NonNegative = 2e-4  # constant
    clip: Positive = 1.0  # of the gradient's norm; their code
    ema: Annotated[float, Range(0, 1, below=True)] = 0.9999
    padding: Whole = 0
    flip: Share = 0.5
    timesteps: Annotated[int, Range(21, MOST)] = 1000  # T, section 4; betas linear from 1e-4 to 0.02, scaled where T is another
    width: Annotated[int, Range(4, MOST)] = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)


@dataclass(frozen=True)
class PurificationSettings(Settings):
    """How far and in how many steps images are purified. Defaults: sources S2.18, for 8/255 on CIFAR-10."""

    start: PositiveShare = 0.1  # t*, of the timesteps
    steps: Count = 100  # every time up to t*, as DiffPure's dt = 1e-3
    eta: Share = 1.0  # ancestral sampling


@dataclass(frozen=True)
class PurifySettings(RunSettings):
    """The DDPM, the purification, and the classifier behind it: `supervised` is trained by `train`, `simclr` by the rest."""

    classifier: Literal["supervised", "simclr"] = "supervised"
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    purification: PurificationSettings = field(default_factory=PurificationSettings)
    train: SupervisedSettings = field(default_factory=SupervisedSettings)
    pretrain: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)


class DiffusionStage(Stage):
    """min E |n - n_theta(sqrt(a) x + sqrt(1 - a) n, t)|^2 over images, times and noise: Ho et al. eq. 14, algorithm 1."""

    name = "diffusion"

    def __init__(self, context: Context, settings: DiffusionSettings) -> None:
        super().__init__(context)
        self.settings = settings
        channels, *sides = self.splits["train"].shape
        if any(side % 2 ** (len(settings.multipliers) - 1) for side in sides):
            raise BadInput(
                f"diffusion.multipliers has {len(settings.multipliers)} levels, which halve {sides[0]} x {sides[1]} images too "
                "often; give fewer, as in --set diffusion.multipliers=1,2, or another --set size"
            )
        with seeded(self.seed, "unet"):
            self.unet = UNet(channels, settings.width, settings.multipliers)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.alpha_bars: Tensor
        self.register_buffer("alpha_bars", linear_schedule(settings.timesteps).float(), persistent=False)

    def parameter_groups(self) -> list[nn.Parameter]:
        """The U-Net alone."""
        return list(self.unet.parameters())

    def error(self, unet: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the predicted noise (B,), a mean over pixels: eq. 14."""
        a = self.alpha_bars[t][:, None, None, None]
        with self.autocast():
            predicted = unet(a.sqrt() * (2 * x - 1) + (1 - a).sqrt() * noise, t).float()
        return (predicted - noise).square().flatten(1).mean(1)

    def loss(self, batch: Batch) -> Tensor:
        x, generator = pad_crop(batch.images, batch.generator, self.settings.padding, self.settings.flip), batch.generator
        t = torch.randint(self.settings.timesteps, (len(x),), generator=generator, device=x.device)  # algorithm 1 line 3
        noise = torch.randn(x.shape, generator=generator, device=x.device)  # line 4
        return self.error(self.unet, x, t, noise).mean()

    def backward(self, batch: Batch) -> Tensor:
        loss = super().backward(batch)
        nn.utils.clip_grad_norm_(self.unet.parameters(), self.settings.clip)
        return loss

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """The average follows, faster in the beginning: what it began with is forgotten within a tenth of the run."""
        decay = min(self.settings.ema, (1 + batch.step) / (10 + batch.step))
        for averaged, weight in zip(self.average.parameters(), self.unet.parameters(), strict=True):
            averaged.lerp_(weight, 1 - decay)

    def validates_after(self, epoch: int, epochs: int) -> bool:
        return (epoch + 1) % max(1, epochs // 10) == 0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """`explained`: the share of the noise's variance that the averaged network predicts, at one time per image."""
        val = self.splits["val"]
        stream, shape = Stream(self.seed, "validation", val.index), val.shape
        noise = stream.noise(Gaussian(1.0), len(val), 1, shape, val.labels.device)[:, 0]
        t = torch.arange(len(val), device=noise.device) * self.settings.timesteps // len(val)
        return {"explained": 1 - float(self.error(self.average, val.floats(), t, noise).mean())}

    def finish(self) -> None:
        """Leave the average to later stages, which judge by it, and to the store."""
        self.carried["transform"] = self.average.state_dict()


def plans(settings: PurifySettings) -> list[Plan]:
    """The DDPM without labels, then the classifier."""
    if settings.noise != "none":
        raise BadInput("the noise of a purifier is its own; leave noise=none, and set purification.start")
    diffusion = lambda context: DiffusionStage(context, settings.diffusion)  # noqa: E731
    first = Plan("diffusion", "pretrain", settings.diffusion, diffusion, passes=TRAIN_STEP, of_encoder=False)
    if settings.classifier == "supervised":  # it sees neither noise nor purified images before the test, as in DiffPure
        train = lambda context: StandardStage(context, settings.train)  # noqa: E731
        return [first, Plan("train", "train", settings.train, train, labelled=True, passes=TRAIN_STEP)]
    if settings.finetune.protocol != "SLF":
        raise BadInput(f"the SimCLR behind the purifier is SLF; leave finetune.protocol={settings.finetune.protocol} out")
    return [
        first,
        Plan("pretrain", "pretrain", settings.pretrain, lambda c: SimCLRStage(c, settings.pretrain), passes=2 * TRAIN_STEP),
        Plan(
            "finetune",
            "train",
            settings.finetune,
            lambda c: Finetune(c, settings.finetune),
            labelled=True,
            passes=linear_passes(settings.finetune),
        ),
    ]


def card(settings: PurifySettings) -> dict[str, Any]:
    """One draw per prediction, as DiffPure; `@m` takes the vote of m. What `defenses.purify.purifier_from` reads."""
    protocol = "supervised" if settings.classifier == "supervised" else "SLF"
    purification, diffusion = settings.purification, settings.diffusion
    start = round(purification.start * diffusion.timesteps)
    if not 1 <= purification.steps <= start <= diffusion.timesteps:
        raise BadInput(
            f"purification.start={purification.start:g} is time {start} of {diffusion.timesteps}, "
            f"and purification.steps={purification.steps}: "
            "there must be at least as many times as steps, and one step"
        )
    transform: dict[str, Any] = {
        "timesteps": diffusion.timesteps,
        "start": start,
        "steps": purification.steps,
        "eta": purification.eta,
    }
    transform |= {"width": diffusion.width, "multipliers": list(diffusion.multipliers)}
    return {"protocol": f"{protocol}, purified", "extra_data": None, "votes": [1], "transform": {"name": "purify", **transform}}


SHORT = {"diffusion.epochs": 100, "diffusion.warmup_epochs": 5, "diffusion.ema": 0.999, "diffusion.width": 32}
SMOKE = {
    "diffusion.epochs": 2,
    "diffusion.batch_size": 32,
    "diffusion.lr": 2e-3,
    "diffusion.warmup_epochs": 0,
    "diffusion.width": 4,
}


def make(name: str) -> Recipe:
    """The recipes `purify` and `purify_simclr`."""
    layers = {key: {**layer, **PRESETS[key]} for key, layer in presets().items()}
    layers["short"] |= SHORT
    layers["smoke"] |= SMOKE
    settings = PurifySettings(classifier="simclr" if name == "purify_simclr" else "supervised")
    return Recipe(name, settings, plans, card, layers, digits.adapt(name))
