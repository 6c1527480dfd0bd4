"""The shared part of contrastive pre-training: two views, projector, nearest-neighbour validation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rush_bench.datasets.views import Interpolation, SimCLRViews
from rush_bench.features import knn_accuracy, outputs
from rush_bench.settings import Count, NonNegative, Positive, PositiveShare, Several, Share, Whole
from rush_bench.training.options import Optimisation
from rush_bench.training.seeds import seeded
from rush_bench.training.stage import Context, Stage
from rush_bench.training.validation import evenly_spaced

KNN_IMAGES = 10_000  # training images that vote: beyond it the accuracy moves by less than its own interval


@dataclass(frozen=True)
class ContrastiveSettings(Optimisation):
    """Defaults: RUSH appendix B for the optimiser, its appendix A for the views (S2.1, S1.3)."""

    epochs: int = 1000
    batch_size: Several = 512  # images are each other's negatives
    lr: float = 0.5
    lr_min: float = 0.001  # absolute, as written (sources S5.18)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: Positive = 0.5
    crop_floor: PositiveShare = 0.08  # RandomResizedCrop(size) without further arguments (sources S5.14)
    interpolation: Interpolation = "bilinear"
    flip: Share = 0.5
    jitter: tuple[NonNegative, ...] = (0.4, 0.4, 0.4, 0.1)  # get_color_distortion(s=0.5)
    jitter_p: Share = 0.8
    gray_p: Share = 0.2
    projector_hidden: Whole = 0  # 0: as wide as the features; "two-layer MLP", sizes not given (sources S5.16)
    projector_out: Count = 128
    projector_norm: bool = False  # BatchNorm after the first linear layer (sources S5.16: off)
    knn_every: Count = 25  # epochs between nearest-neighbour accuracies


class ContrastiveStage(Stage):
    """Network and projector under a loss on two views; subclasses write `loss`."""

    name = "pretrain"

    def __init__(self, context: Context, settings: ContrastiveSettings) -> None:
        super().__init__(context)
        self.settings = settings
        self.views = SimCLRViews(
            crop_floor=settings.crop_floor,
            flip=settings.flip,
            jitter=settings.jitter,  # type: ignore[arg-type]
            jitter_p=settings.jitter_p,
            gray_p=settings.gray_p,
            interpolation=settings.interpolation,
        )
        with seeded(self.seed, "projector"):
            self.projector = self.make_projector(self.network.head.in_features)

    def make_projector(self, dim: int) -> nn.Module:
        """g, on features of `dim`."""
        settings = self.settings
        return projector(dim, settings.projector_hidden or dim, settings.projector_out, settings.projector_norm)

    def parameter_groups(self) -> list[nn.Parameter]:
        """Encoder and projector; the linear head waits for fine-tuning."""
        return [*self.network.encoder.parameters(), *self.projector.parameters()]

    def project(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Projections g(f([x1, x2])) of two views (B, C, H, W), both in one BatchNorm batch: two of (B, D)."""
        with self.autocast():
            u, v = self.projector(self.network.encoder(torch.cat([first, second]))).chunk(2)
        return u, v

    def validates_after(self, epoch: int, epochs: int) -> bool:
        """Every `knn_every` epochs and after the last."""
        return (epoch + 1) % self.settings.knn_every == 0 or epoch + 1 == epochs

    def validate(self) -> dict[str, float]:
        """`knn`: accuracy of the validation split on the features of (at most 10,000) labelled training images."""
        self.eval()
        train, val = self.splits["train"], self.splits["val"]
        bank = evenly_spaced(train, KNN_IMAGES)
        with self.autocast():
            features = [outputs(self.network.encoder, images) for images in (bank, val)]
        return {"knn": knn_accuracy(features[0], bank.labels, features[1], val.labels)}


def projector(inputs: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    """g: a two-layer MLP (RUSH 5.1), (B, inputs) -> (B, outputs)."""
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(inputs, hidden), *between, nn.Linear(hidden, outputs))
