"""Learning from a share of the labels after pre-training: a clean teacher, then robust distillation (sources S2.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets import Images
from rush_bench.datasets.splits import ranked
from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.features import outputs
from rush_bench.networks import Classifier, build, routed, single_route
from rush_bench.networks.routes import CARRIED
from rush_bench.settings import NonNegative, Positive, Settings, Share
from rush_bench.training.inner import InnerSettings
from rush_bench.training.losses import cross_entropy_to, kl
from rush_bench.training.options import file_setting
from rush_bench.training.seeds import permutation
from rush_bench.training.stage import Batch, Context, Plan
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage


@dataclass(frozen=True)
class SemiSettings(Settings):
    """Which images have labels: a stratified share of ours, or those of a file, as the authors' `train0.01_idx.npy`."""

    index: str = file_setting()  # .npy: positions in the official training split, as many as label_share says


@dataclass(frozen=True)
class TeacherSettings(SupervisedSettings):
    """S2.3, stage 2: the clean route, fine-tuned on the labelled images; an epoch is one pass over them."""

    epochs: int = 100
    batch_size: int = 128
    milestones: tuple[float, ...] = (39, 59)  # 40 and 60, one epoch early as in all of ACL's code
    weight_decay: float = 2e-4


@dataclass(frozen=True)
class DistilSettings(SupervisedSettings):
    """S2.3, stage 3. `batch_size` counts unlabelled images: n_u / 225 at 1 % of the labels, 225 = n_u / 180 at 10 %."""

    epochs: int = 15
    batch_size: int = 198
    lr: float = 0.1
    milestones: tuple[float, ...] = (4, 9)  # 5 and 10, one epoch early
    weight_decay: float = 5e-4
    alpha: Share = 0.5  # weight of the teacher on labelled images
    temperature: Positive = 1.0
    beta: NonNegative = 6.0
    attack: InnerSettings = field(default_factory=InnerSettings)


class TeacherStage(SupervisedStage):
    """Cross-entropy on the labelled images, from the clean route; its best epoch goes to `carried["teacher"]`."""

    name = "teacher"

    def __init__(self, context: Context, settings: TeacherSettings) -> None:
        super().__init__(context, settings)
        self.teacher = build(self.network.spec)
        self.network.requires_grad_(False)

    def prepare(self, fresh: bool) -> None:
        if fresh:
            both = routed(build(self.network.spec).encoder, 2, place=1)
            both.load_state_dict(self.carried[CARRIED])
            self.teacher.encoder.load_state_dict(single_route(both, 0).state_dict())
            nn.init.zeros_(self.teacher.head.weight)
            nn.init.zeros_(self.teacher.head.bias)

    def evaluated_network(self) -> Classifier:
        return self.teacher

    def loss(self, batch: Batch) -> Tensor:
        with self.autocast():
            return F.cross_entropy(self.teacher(self.inputs(batch)).float(), batch.labels)

    def finish(self) -> None:
        self.network.requires_grad_(True)
        assert self.best is not None
        self.carried["teacher"] = {key: value.clone() for key, value in self.best.items()}


class DistilStage(SupervisedStage):
    """Labelled and unlabelled images in one step, attacked at the label or at what the teacher says of them, un-augmented."""

    name = "distil"

    settings: DistilSettings

    def __init__(self, context: Context, settings: DistilSettings) -> None:
        super().__init__(context, settings, settings.attack)
        self.settings, self.labelled = settings, context.splits["labelled"]
        unlabelled = len(context.splits["unlabelled"])
        self.labelled_per_step = max(1, round(len(self.labelled) * settings.batch_size / unlabelled))  # n_l / 225
        self.steps = max(1, unlabelled // settings.batch_size)

    def prepare(self, fresh: bool) -> None:
        teacher = build(self.network.spec).to(self.labelled.labels.device).eval()
        teacher.load_state_dict(self.carried["teacher"])
        with self.autocast():  # its logits (N, K), made once
            self.teacher_logits = {name: outputs(teacher, self.splits[name]) for name in ("labelled", "unlabelled")}
        if fresh:
            nn.init.zeros_(self.network.head.weight)
            nn.init.zeros_(self.network.head.bias)

    def begin_epoch(self, epoch: int) -> None:
        self.train()
        order = permutation(len(self.labelled), self.seed, self.name, "labelled", epoch)
        self.order = order.to(self.labelled.labels.device)

    def augmented(self, x: Tensor, batch: Batch) -> Tensor:
        if self.settings.augment != "crop_flip":
            return x
        return pad_crop(x, batch.generator, self.settings.padding, self.settings.flip)

    def loss(self, batch: Batch) -> Tensor:
        """[(1 - a) sum CE(x'_l, y) + a T^2 sum KD(x'_l) + T^2 sum KD(x'_u)] / (n_l + n_u) + beta KL(p(x) || p(x')).

        a = 1/2, T = 1, beta = 6; KD: cross-entropy to the teacher's softmax at T. A labelled image weighs as an unlabelled one.
        """
        settings, first = self.settings, batch.step % self.steps * self.labelled_per_step
        chosen = torch.arange(first, first + self.labelled_per_step, device=self.order.device) % len(self.order)
        indices = self.order[chosen]
        labels, count = self.labelled.labels[indices], self.labelled_per_step
        x = self.augmented(torch.cat([self.labelled.floats(indices), batch.images]), batch)
        teacher_logits = torch.cat([self.teacher_logits["labelled"][indices], self.teacher_logits["unlabelled"][batch.indices]])
        target = torch.cat([labels, teacher_logits[count:].argmax(1)])
        attacked = settings.attack.run(self, lambda v: F.cross_entropy(self.logits(v), target), x, batch.generator)
        clean, robust = self.logits(x), self.logits(attacked)
        temperature = settings.temperature
        distilled = cross_entropy_to(robust / temperature, (teacher_logits / temperature).softmax(1)) * temperature**2
        distilled[:count] *= settings.alpha
        supervised = (1 - settings.alpha) * F.cross_entropy(robust[:count], labels, reduction="sum")
        return (supervised + distilled.sum()) / len(x) + settings.beta * kl(clean, robust).mean()  # the last as in `trades`


def label_splits(splits: Mapping[str, Images], share: float, index: str) -> dict[str, Images]:
    """`labelled`, `unlabelled` and `val`, from `train` and `val` and a share of the training images or a file of them."""
    if index:
        return splits_from_file(splits["train"], splits["val"], share, Path(index))
    return splits_from_share(splits["train"], share)


def splits_from_file(train: Images, val: Images, share: float, path: Path) -> dict[str, Images]:
    """The images at the file's positions are labelled, wherever our splits have them; what is labelled leaves `val`.

    BadInput for a file that is no list of distinct positions, names images that are not at hand, or more or fewer than the
    share of the training images.
    """
    try:
        chosen = np.load(path.expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"semi.index={path} cannot be read ({error}); give a .npy file of positions") from error
    if (
        not isinstance(chosen, np.ndarray)
        or chosen.ndim != 1
        or chosen.dtype.kind not in "iu"
        or len(np.unique(chosen)) < len(chosen)
    ):
        raise BadInput(f"semi.index={path} is no list of distinct positions in the official training split")
    expected = round(share * len(train))
    if len(chosen) != expected:
        raise BadInput(
            f"semi.index={path} has {len(chosen)} positions, label_share={share:g} of {len(train)} images are {expected}; "
            f"--set label_share={len(chosen) / len(train):.6g}"
        )
    both = {split: np.isin(images.index.cpu().numpy(), chosen) for split, images in (("train", train), ("val", val))}
    if sum(int(found.sum()) for found in both.values()) < len(chosen):
        raise BadInput(
            f"semi.index={path} names images that are not among the {len(train) + len(val)} at hand; leave n_train out"
        )
    parts = [images.take(np.flatnonzero(found)) for images, found in zip((train, val), both.values(), strict=True)]
    return {
        "labelled": concatenated(*parts),
        "unlabelled": train.take(np.flatnonzero(~both["train"])),
        "val": val.take(np.flatnonzero(~both["val"])),
    }


def concatenated(first: Images, second: Images) -> Images:
    """The images of both, as a part of the first's split."""
    pixels, labels, index = (torch.cat([getattr(first, key), getattr(second, key)]) for key in ("pixels", "labels", "index"))
    return replace(first, pixels=pixels, labels=labels, index=index)


def splits_from_share(images: Images, share: float) -> dict[str, Images]:
    """`labelled`, a fixed stratified share of the images, and `unlabelled`, the rest. BadInput where a class has none."""
    count = round(share * len(images))
    labels = images.labels.cpu().numpy()
    chosen = np.sort(ranked(labels, len(images), seed=0)[:count])
    missing = np.setdiff1d(labels, labels[chosen])
    if len(missing):
        raise BadInput(
            f"label_share={share:g} of {len(images)} images leaves class {images.classes[missing[0]]!r} without a label; "
            f"give at least {len(np.unique(labels)) / len(images):.2g}"
        )
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    return {"labelled": images.take(chosen), "unlabelled": images.take(rest)}


def semi_supervised_plans(teacher: TeacherSettings, distil: DistilSettings) -> list[Plan]:
    """Stages 2 and 3 of ACL's semi-supervised setting."""
    return [
        Plan("teacher", "labelled", teacher, lambda context: TeacherStage(context, teacher), labelled=True),
        Plan("distil", "unlabelled", distil, lambda context: DistilStage(context, distil)),
    ]
