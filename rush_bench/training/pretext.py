"""Adversarial pre-training on tasks that need no labels: rotation, jigsaw and Selfie (Chen et al. 2020b; sources S2.11)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.networks.ensemble import Parallel
from rush_bench.networks.resnet import Encoder
from rush_bench.settings import Count, Range, Share, Whole
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import Optimisation
from rush_bench.training.seeds import derive, seeded
from rush_bench.training.stage import Batch, Context, Stage
from rush_bench.training.transformer import Transformer
from rush_bench.training.validation import accuracy

GRID = 4  # patches a side
PERMUTATIONS = 30  # beside the identity
VALIDATION_IMAGES = 512

# What the network sees, its scores (R, K) as a function of it, and the right answers (R,).
Problem = tuple[Tensor, Callable[[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class TaskSettings(Optimisation):
    """S2.11: rotation and jigsaw."""

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    schedule: Literal["cosine", "steps"] = "cosine"
    warmup_epochs: float = 0.57  # 200 iterations of the 351 that 45,000 images take
    warmup_from: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 3e-4
    padding: Whole = 4
    flip: Share = 0.5


@dataclass(frozen=True)
class SelfieSettings(TaskSettings):
    """S2.11: shifts of 2 pixels and no mirror images; the sizes of the transformer over the patches."""

    epochs: int = 200
    nesterov: bool = True
    weight_decay: float = 1e-4
    padding: int = 2
    flip: float = 0.0
    hidden: Annotated[int, Range(2, GRID**2 - 1)] = 4  # patches to be placed
    dim: Count = 1024
    layers: Count = 12
    heads: Count = 16
    feedforward: Count = 2048
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.1
    double_softmax: bool = False  # as released: probabilities go where the cross-entropy expects logits


class TaskStage(Stage):
    """1/2 (L(x) + L(x')), x' from PGD on L with the network in train(). Subclasses say what the `problem` is.

    `member`: which of an ensemble's encoders learns. The last epoch counts (the paper selects on validation data).
    """

    answer: nn.Module  # what learns beside the encoder, and is thrown away
    weight = 1.0  # of the loss

    def __init__(self, context: Context, settings: TaskSettings, attack: InnerSettings, member: int) -> None:
        super().__init__(context)
        self.settings, self.inner = settings, attack
        ensemble = context.network.encoder
        self.encoder = cast(Encoder, ensemble.members[member] if isinstance(ensemble, Parallel) else ensemble)

    def problem(self, images: Tensor, generator: torch.Generator) -> Problem:
        """A task for images (B, C, H, W) in [0,1]."""
        raise NotImplementedError

    def parameter_groups(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.answer.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        images = pad_crop(batch.images, batch.generator, self.settings.padding, self.settings.flip)
        x, scores, answers = self.problem(images, batch.generator)

        def task_loss(v: Tensor) -> Tensor:
            with self.autocast():
                return F.cross_entropy(scores(v).float(), answers)

        attacked = self.inner.run(self, task_loss, x, batch.generator)
        return self.weight * (task_loss(x) + task_loss(attacked)) / 2

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """`task`: the share of right answers on clean validation images, always the same questions."""
        self.eval()
        images = self.splits["val"].floats(slice(VALIDATION_IMAGES))
        generator = torch.Generator(images.device).manual_seed(derive(self.seed, self.name, "validation"))
        x, scores, answers = self.problem(images, generator)
        with self.autocast():
            return {"task": accuracy(scores(x), answers)}


class Rotation(TaskStage):
    """Which of four quarter turns (Gidaris et al. 2018)."""

    name = "rotation"

    def __init__(self, context: Context, settings: TaskSettings, attack: InnerSettings, member: int) -> None:
        super().__init__(context, settings, attack, member)
        check_square(self.splits["pretrain"].shape)
        with seeded(self.seed, self.name):
            self.answer = nn.Linear(self.encoder.dim, 4)

    def problem(self, images: Tensor, generator: torch.Generator) -> Problem:
        quarter_turns = torch.randint(4, (len(images),), generator=generator, device=generator.device)
        rotations = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
        x = rotations[quarter_turns, torch.arange(len(images), device=images.device)]
        return x, lambda v: self.answer(self.encoder(v)), quarter_turns


class Jigsaw(TaskStage):
    """Which of 31 permutations of the 16 patches (Noroozi and Favaro 2016), the identity in a tenth of the cases."""

    name = "jigsaw"

    def __init__(self, context: Context, settings: TaskSettings, attack: InnerSettings, member: int) -> None:
        super().__init__(context, settings, attack, member)
        check_grid(self.splits["pretrain"].shape)
        with seeded(self.seed, self.name):
            self.answer = nn.Linear(self.encoder.dim, 1 + PERMUTATIONS)
            shuffles = [torch.randperm(GRID**2) for _ in range(PERMUTATIONS)]
        self.orders: Tensor
        self.register_buffer("orders", torch.stack([torch.arange(GRID**2), *shuffles]))

    def problem(self, images: Tensor, generator: torch.Generator) -> Problem:
        u = torch.rand(2, len(images), generator=generator, device=generator.device)
        permutation_index = torch.where(u[0] < 0.1, 0, 1 + (u[1] * PERMUTATIONS).long().clamp_max(PERMUTATIONS - 1))
        pieces = patches(images)
        x = assemble(pieces[torch.arange(len(images), device=images.device)[:, None], self.orders[permutation_index]])
        return x, lambda v: self.answer(self.encoder(v)), permutation_index


class Selfie(TaskStage):
    """Which of the hidden patches belongs at which hidden place (Trinh et al. 2019).

    The encoder without its last stage embeds each patch; a transformer sums up the visible ones; the sum plus the
    embedding of a hidden place is compared with each hidden patch. One choice of what is hidden for the whole batch. The
    loss is the sum over the hidden places, as in the code.
    """

    name = "selfie"

    settings: SelfieSettings

    def __init__(self, context: Context, settings: SelfieSettings, attack: InnerSettings, member: int) -> None:
        super().__init__(context, settings, attack, member)
        check_grid(self.splits["pretrain"].shape)
        self.settings, self.weight = settings, float(settings.hidden)
        dim, stages = settings.dim, self.encoder.stages - 1
        if stages < 1:
            raise BadInput("selfie embeds patches with all stages but the last; give the network at least two")
        with seeded(self.seed, self.name):
            self.embed = nn.Linear(self.encoder.dim // 2, dim)
            self.places = nn.Parameter(0.02 * torch.randn(GRID**2, dim))
            self.start = nn.Parameter(0.02 * torch.randn(1, 1, dim))  # the position whose output is the sum
            self.answer = Transformer(dim, settings.layers, settings.heads, settings.feedforward, settings.dropout)

    def parameter_groups(self) -> list[nn.Parameter]:
        return [*super().parameter_groups(), *self.embed.parameters(), self.places, self.start]

    def problem(self, images: Tensor, generator: torch.Generator) -> Problem:
        count = self.settings.hidden
        order = torch.randperm(GRID**2, generator=generator, device=generator.device)
        hidden, visible = order[:count], order[count:]
        answers = torch.arange(count, device=images.device).repeat(len(images))

        def scores(v: Tensor) -> Tensor:
            small = patches(v).flatten(0, 1)
            h = self.embed(self.encoder(small, stages=self.encoder.stages - 1)).unflatten(0, (len(v), -1))
            sequence = torch.cat([self.start.expand(len(v), -1, -1), h[:, visible] + self.places[visible]], 1)
            queries = self.answer(sequence, generator)[:, :1] + self.places[hidden]
            # Over the square root of the size, as in attention: plain products of 1024 numbers saturate the softmax.
            products = (queries @ h[:, hidden].transpose(1, 2)).flatten(0, 1) / self.settings.dim**0.5
            return products.float().softmax(1) if self.settings.double_softmax else products

        return images, scores, answers


def patches(x: Tensor) -> Tensor:
    """(B, C, H, W) to the patches of a 4 x 4 grid, row by row: (B, 16, C, H / 4, W / 4)."""
    high, wide = x.shape[2] // GRID, x.shape[3] // GRID
    return x.unflatten(3, (GRID, wide)).unflatten(2, (GRID, high)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def assemble(pieces: Tensor) -> Tensor:
    """The inverse of `patches`."""
    return pieces.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def check_square(shape: tuple[int, int, int]) -> None:
    """BadInput for images that a quarter turn gives another shape."""
    if shape[1] != shape[2]:
        raise BadInput(f"images of {shape[1]} x {shape[2]} pixels have no quarter turns; --set size=32 resizes them")


def check_grid(shape: tuple[int, int, int]) -> None:
    """BadInput for images that 4 x 4 patches do not fill."""
    if shape[1] % GRID or shape[2] % GRID:
        raise BadInput(f"images of {shape[1]} x {shape[2]} pixels have no {GRID} x {GRID} patches; --set size=32 resizes them")
