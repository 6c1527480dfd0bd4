"""AdvCL: four views with a high-frequency one, three BatchNorm routes, pseudo-labels (Fan et al. 2021; sources S2.4)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.features import outputs
from rush_bench.networks import build
from rush_bench.recipes import digits
from rush_bench.recipes.simclr import SimCLRStage
from rush_bench.settings import NonNegative, Positive, Several, Whole
from rush_bench.training import protocols
from rush_bench.training.clusters import pseudo_labels, read_pseudo_labels
from rush_bench.training.contrastive import ContrastiveSettings
from rush_bench.training.inner import InnerSettings
from rush_bench.training.losses import multi_view
from rush_bench.training.options import file_setting
from rush_bench.training.protocols import LinearSettings, PretrainedSettings
from rush_bench.training.routed import RoutedStage
from rush_bench.training.seeds import derive, seeded
from rush_bench.training.stage import ATTACK_STEP, TRAIN_STEP, Batch, Context, Plan, Recipe

NAMES = {"advcl": "AdvCL: adversarial contrastive learning with high frequencies and pseudo-labels (Fan et al. 2021)"}
NORMAL, PGD, PGD_CE = 0, 1, 2  # BatchNorm routes


@dataclass(frozen=True)
class AdvCLPretrainSettings(ContrastiveSettings):
    """S2.4. The learning rate, momentum, decay and epochs are RUSH's (or RUSH's are AdvCL's)."""

    lr_min: float = 5e-4  # .001 lr
    warmup_epochs: float = 10
    warmup_from: float = 0.01
    crop_floor: float = 0.2
    projector_norm: bool = True
    base_temperature: Positive = 0.07  # the contrastive term is multiplied by temperature over this
    radius: NonNegative = 8.0  # of the low frequencies taken out, in units of the spectrum's pixels at 32 x 32
    ce_weight: NonNegative = 0.2
    clusters: tuple[Several, ...] = (2, 10, 50, 100, 500)
    padding: Whole = 4
    route: Literal[0, 1, 2] = 1  # the route that becomes the model: pgd


@dataclass(frozen=True)
class AdvCLSettings(PretrainedSettings):
    """No normalisation of the input. SLF as released, at a rate of .01 (another code has .1)."""

    # train: the code never leaves train(), so each attack step moves the statistics of its route.
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(steps=5, mode="train"))
    pseudo_source: Literal["self_simclr", "file"] = "self_simclr"
    pseudo_file: str = file_setting()  # .npz with pseudo_train_K; the paper's come from SimCLR on ImageNet: extra data
    simclr: ContrastiveSettings = field(default_factory=ContrastiveSettings)  # whose features are clustered
    pretrain: AdvCLPretrainSettings = field(default_factory=AdvCLPretrainSettings)
    finetune: LinearSettings = field(default_factory=lambda: LinearSettings(milestones=(15, 20)))


def high_pass(x: Tensor, radius: float) -> Tensor:
    """What is left of images (B, C, H, W) without frequencies nearer than `radius` to the centre; not clamped (S2.4)."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    ys = torch.arange(height, device=x.device) - height // 2
    xs = torch.arange(width, device=x.device) - width // 2
    mask = (ys.unsqueeze(1).square() + xs.square()).sqrt() >= radius
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


class LabelStage(SimCLRStage):
    """Our own SimCLR: k-means on its features gives the pseudo-labels."""

    name = "simclr"

    def __init__(self, context: Context, settings: ContrastiveSettings, clusters: tuple[int, ...]) -> None:
        super().__init__(context, settings)
        self.clusters, count = clusters, len(context.splits["pretrain"])
        if max(clusters) > count:
            raise BadInput(f"{max(clusters)} clusters of {count} images; give fewer, as in --set pretrain.clusters=2,10,50")

    def finish(self) -> None:
        self.eval()
        features = outputs(self.network.encoder, self.splits["pretrain"])
        self.carried["pseudo"] = pseudo_labels(features, self.clusters, self.seed)


class AdvCLStage(RoutedStage):
    """Views a, b (SimCLR's) and q (high frequencies of o) are clean; o, a weakly augmented image, is attacked twice."""

    routed_projector = False  # in the code BatchNorm has three sets in the encoder alone

    settings: AdvCLPretrainSettings

    def __init__(self, context: Context, settings: AdvCLPretrainSettings, attack: InnerSettings, file: str) -> None:
        super().__init__(context, settings, 3, model_route=settings.route)
        self.settings, self.attack, self.file = settings, attack, file
        dim = self.network.head.in_features
        with seeded(self.seed, "pseudo heads"):
            self.heads = nn.ModuleList(nn.Linear(dim, count) for count in settings.clusters)

    def prepare(self, fresh: bool) -> None:
        """Begin from weights of its own, whatever a SimCLR before it left in the network."""
        if not fresh:
            return
        self.network.load_state_dict(build(self.network.spec, derive(self.seed, "advcl") % 2**32).state_dict())
        if self.file:
            images, path = self.splits["pretrain"], Path(self.file).expanduser()
            self.carried["pseudo"] = read_pseudo_labels(path, self.settings.clusters, images, *self.official_size_bounds())

    def official_size_bounds(self) -> tuple[int, int | None]:
        """The least and the most images that the official training split has, as far as the splits at hand show."""
        images, val = self.splits["pretrain"], self.splits["val"]
        last, labelled = int(images.index.max()) + 1, bool((images.labels >= 0).all())
        same = images.name == val.name and labelled  # else its validation images, if it has any, are not at hand
        least = max(last, int(val.index.max()) + 1) if same else last
        whole = self.run_settings.n_train is None and (same or not labelled or images.split == "transfer")
        return least, least if whole else None

    def parameter_groups(self) -> list[nn.Parameter]:
        return [*super().parameter_groups(), *self.heads.parameters()]

    def contrastive_loss(self, attacked: Tensor, clean: list[Tensor]) -> Tensor:
        """Four views, each positive for each other; times tau / 0.07."""
        settings = self.settings
        return multi_view((attacked, *clean), settings.temperature) * (settings.temperature / settings.base_temperature)

    def pseudo_ce(self, x: Tensor, labels: list[Tensor]) -> Tensor:
        """The mean over K of CE(fc_K(f(x)), c_K), through the third route."""
        features = self.features(x, PGD_CE).float()
        losses = [F.cross_entropy(head(features), label) for head, label in zip(self.heads, labels, strict=True)]
        return torch.stack(losses).mean()

    def loss(self, batch: Batch) -> Tensor:
        settings, generator = self.settings, batch.generator
        a, b = self.views(batch.images, generator), self.views(batch.images, generator)
        o = pad_crop(batch.images, generator, settings.padding, settings.flip)
        q = high_pass(o, settings.radius * o.shape[-1] / 32)
        # Weights do not change during the attack, nor do batch statistics: clean views pass once, where the code passes
        # them again at every step. Each is a BatchNorm batch of its own.
        clean = [self.embed(NORMAL, view)[0] for view in (a, b, q)]
        fixed = [u.detach() for u in clean]
        labels = [self.carried["pseudo"][str(count)][batch.indices] for count in settings.clusters]
        # One joint attack in the code; its two parts never meet, since each enters one term only.
        attacked = self.attack.run(self, lambda x: self.contrastive_loss(self.embed(PGD, x)[0], fixed), o, generator)
        attacked_ce = self.attack.run(self, lambda x: self.pseudo_ce(x, labels), o, generator)
        return self.contrastive_loss(self.embed(PGD, attacked)[0], clean) + settings.ce_weight * self.pseudo_ce(
            attacked_ce, labels
        )


def plans(settings: AdvCLSettings) -> list[Plan]:
    """Where no file gives the labels, SimCLR; then AdvCL and a fine-tuning protocol."""
    pretrain, attack, simclr = settings.pretrain, settings.attack, settings.simclr
    file = settings.pseudo_file if settings.pseudo_source == "file" else ""
    if settings.pseudo_source == "file" and not Path(file).expanduser().is_file():
        raise BadInput(f"pseudo_source=file needs a file, not {file!r}; --set pseudo_file=labels.npz")
    if settings.pseudo_source != "file" and settings.pseudo_file:
        raise BadInput("pseudo_file is given but not used; --set pseudo_source=file")
    if not pretrain.clusters:
        raise BadInput(
            "pretrain.clusters is empty; give a number of clusters or several, as in --set pretrain.clusters=2,10,50"
        )
    first = Plan(
        "simclr", "pretrain", simclr, lambda context: LabelStage(context, simclr, pretrain.clusters), passes=2 * TRAIN_STEP
    )
    # a, b and q learn; one image is attacked for each of two terms
    passes = 3 * TRAIN_STEP + 2 * attack.steps * ATTACK_STEP + 2 * TRAIN_STEP
    return [
        *([] if file else [first]),
        Plan("pretrain", "pretrain", pretrain, lambda context: AdvCLStage(context, pretrain, attack, file), passes=passes),
        protocols.finetuning_plan(settings),
    ]


def card(settings: AdvCLSettings) -> dict[str, Any]:
    """Which data labels from a file were made with is not known; ours were made with none."""
    extra = f"pseudo-labels ({Path(settings.pseudo_file).name})" if settings.pseudo_source == "file" else None
    return protocols.card(settings, extra)


PRESETS = protocols.presets(
    {"pretrain.lr": 0.06, "simclr.epochs": 2, "simclr.batch_size": 64, "simclr.lr": 0.06, "pretrain.clusters": (2, 10, 50)},
)
PRESETS["short"] |= {"simclr.epochs": 40, "simclr.knn_every": 20, "pretrain.epochs": 30, "pretrain.warmup_epochs": 3}


def make(name: str) -> Recipe:
    """The recipe `advcl`."""
    return Recipe(
        name, AdvCLSettings(), plans, card, PRESETS, digits.adapt(name), finetuning_settings=protocols.FINETUNING_SETTINGS
    )
