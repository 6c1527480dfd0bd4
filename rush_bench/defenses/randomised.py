"""Defences that draw at random themselves: in a transform before the network, or inside the network."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.datasets.views import VIEW_NUMBERS, SimCLRViews
from rush_bench.defenses.aggregate import MEAN_PROBABILITY, Aggregation
from rush_bench.defenses.base import Defense
from rush_bench.defenses.body import differ, own_generators, weights_digest
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.smoothed import Deterministic, Forward, _Random, everyone, positions
from rush_bench.errors import BadInput, unknown_name
from rush_bench.noise import Stream

# images (B, C, H, W), a stream, k -> copies (B, k, C', H', W'), for draws 0..k-1 of the stream
Transform = Callable[[Tensor, Stream, int], Tensor]
Average = Literal["vote", "probability", "logits"]
PROBE = Stream(0, "probe")


@dataclasses.dataclass(frozen=True)
class RandomViews:
    """A transform: random augmentations, the draws of image i and draw j keyed as noise is, by (seed, purpose, i, j).

    With `average="logits"` it is the transformation-smoothed inference of RoCL (Kim et al. 2020; recipes R2.5).
    """

    views: SimCLRViews = dataclasses.field(default_factory=SimCLRViews)

    def __call__(self, images: Tensor, stream: Stream, draws: int) -> Tensor:
        """(B, C, H, W) to (B, k, C, H, W); differentiable almost everywhere (see `SimCLRViews.view`)."""
        u = stream.uniform(len(images), draws, (VIEW_NUMBERS,), images.device)
        copies = images[:, None].expand(-1, draws, -1, -1, -1).flatten(0, 1)
        return self.views.view(copies, u.flatten(0, 1).T).unflatten(0, (len(images), draws))


class Randomised(_Random):
    """A network whose prediction is random, and the vote over `votes` draws of it. Two kinds:

    - `transform(images, stream, draws) -> copies (B, k, C, H, W)`: random pre-processing before a deterministic network. All
      its randomness must come from the stream, as in `stream.uniform(len(images), draws, (2,), images.device)`, so that
      what image i and draw j get hangs on nothing else. Gradients go through it; where a step of it has none, give it one
      in the backward pass (BPDA).
    - no `transform`: the network itself draws from torch's global generator in `forward` (stochastic activation pruning,
      dropout left in train mode, Bayesian layers). Every call runs on that generator seeded from (seed, purpose, images,
      draw) and leaves the global state as it was. There the noise of an image depends on its batch and on how draws are
      cut into blocks: a repeated run is the same, another batch size is not. A bank runs image by image, so it is a
      function of the image alone.

    `average`: `vote` counts the labels of the draws, `probability` and `logits` take the label of their mean, which is then
    what attacks see too. `plain` is the network without its randomness, which the transfer attack starts from (default:
    the network without the transform). Other options as for Deterministic. A transform's identity in the records is its
    name and, of a dataclass, its fields, of a module its weights: rename a function when you change it.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        transform: Transform | None = None,
        votes: int = 1,
        average: Average = "vote",
        plain: nn.Module | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if votes < 1:
            raise BadInput("Randomised takes at least 1 vote")
        if average not in ("vote", "probability", "logits"):
            raise unknown_name("average", average, ["vote", "probability", "logits"])
        self.transform, self.draws, self.average, self.plain = transform, votes, average, plain
        self.how = Aggregation(geometric=True) if average == "logits" else MEAN_PROBABILITY
        self.hard, self.keyed = average == "vote", transform is not None
        self.options = {key: value for key, value in options.items() if key != "about"}
        before = None
        if transform is not None:
            device = options.get("device") or next((p.device for p in network.parameters()), "cpu")
            check_transform(transform, tuple(options.get("shape", (3, 32, 32))), device)

            def before(images: Tensor) -> Tensor:
                return transform(images, PROBE, 1).flatten(0, 1)

        name = name or f"{type(network).__name__.lower()}@{votes}"
        super().__init__(network, name=name, before=before, random=transform is None, **options)
        if isinstance(transform, Chain):
            self.transform = transform.counted(self.passes)
        if transform is None:
            self._check_network()

    def identity(self) -> dict[str, Any]:
        how = describe(self.transform) if self.transform is not None else "the network's own"
        return {**super().identity(), "random": how, "average": self.average}

    def base(self) -> Defense:
        """`plain`, or the network without its transform, as a deterministic defence."""
        plain = self.body.network if self.plain is None and self.transform is not None else self.plain
        if plain is None:
            raise BadInput(
                f"{self.name} draws inside its network, so its base is not known; give the network without its randomness "
                "as Randomised(..., plain=...), or give the transfer attack another source"
            )
        return Deterministic(plain, name=f"{self.name}-base", about=self.about, **self.options)

    def _forward(self, stream: Stream, batch: int) -> tuple[Forward, int]:
        images = positions(stream, batch)

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            own, count = stream.at(images[i]).skip(j.start), j.stop - j.start
            if self.transform is not None:
                return self._fold(self.transform(x, own, count), exact)
            return self._seeded(x, own, count, exact)

        return forward, self.draws

    def _banked(self, size: int, seed: int) -> Forward:
        bank, rows = everyone(seed), self.body.rows

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            if self.transform is not None:
                return self._fold(self.transform(x, bank.skip(j.start), j.stop - j.start), exact)
            # One image a call, its draws in pieces that start at multiples of `rows`: the same for every batch and block.
            pieces = [(start, min(start + rows, j.stop) - start) for start in range(j.start, j.stop, rows)]
            each = [
                torch.cat([self._seeded(image, bank.skip(start), count, exact) for start, count in pieces], 1)
                for image in x.split(1)
            ]
            return torch.cat(each)

        return forward

    def _seeded(self, x: Tensor, stream: Stream, draws: int, exact: bool) -> Tensor:
        """Log-probabilities (B, k, K) of a network that draws from the global generator."""
        with own_generators(self.device, seed_of(stream)):
            return self._fold(x[:, None].expand(-1, draws, -1, -1, -1), exact)

    def _check_network(self) -> None:
        """Refuse a network whose draws a seed of torch's global generator does not decide, and one that draws nothing."""
        images = torch.full((2, *self.shape), 0.5, device=self.device)
        with torch.inference_mode():
            one, two = (self._seeded(images, PROBE, 4, True) for _ in range(2))
            moved = any(not torch.equal(one, self._seeded(images, PROBE.skip(4 * k), 4, True)) for k in range(1, 9))
        self.passes.forwards = 0
        if differ(one, two):
            raise BadInput(
                "the network draws from elsewhere than torch's global generator (numpy, random, a generator of its own), so "
                "its numbers could not be made again; draw with torch.rand and the like, or pass a transform that draws from "
                "its stream"
            )
        if not moved:
            raise BadInput(
                "the network draws nothing: other seeds gave the same logits; use Deterministic(network), or put the layers "
                "that are to draw in train mode, as in network.dropout.train()"
            )


def seed_of(stream: Stream) -> int:
    """A seed for a generator, from all that a stream is: seed, purpose, images and first draw."""
    images = b"" if stream.images is None else stream.images.to(torch.int64).numpy().tobytes()
    text = f"{stream.seed}\0{stream.purpose}\0{stream.first_draw}\0".encode()
    return int.from_bytes(hashlib.sha256(text + images).digest()[:8], "little") >> 1


def check_transform(transform: Transform, shape: tuple[int, ...], device: torch.device | str) -> None:
    """Refuse a transform that does not return copies, or draws elsewhere than from its stream."""
    images = torch.full((2, *shape), 0.5, device=device)
    with torch.inference_mode(), own_generators(torch.device(device)):
        one, two = (transform(images, PROBE, 3) for _ in range(2))
    if not isinstance(one, Tensor) or one.ndim != 5 or one.shape[:2] != (2, 3):
        got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        raise BadInput(f"the transform must return copies (B, draws, C, H, W), here (2, 3, C, H, W), not {got}")
    if differ(one, two):
        raise BadInput(
            "the transform draws elsewhere than from its stream: the same stream gave other copies; take its random numbers "
            "from stream.uniform(len(images), draws, (how_many,), images.device)"
        )


def describe(transform: Transform) -> dict[str, Any]:
    """A transform as plain values, for a record's key: its name, the fields of a dataclass, the weights of a module."""
    kind = transform if hasattr(transform, "__qualname__") else type(transform)
    fields: dict[str, Any] = dataclasses.asdict(transform) if dataclasses.is_dataclass(transform) else {}
    if isinstance(transform, nn.Module):
        fields = {"weights": weights_digest(transform)}
    return {"transform": f"{kind.__module__}.{kind.__qualname__}", **fields}


TRANSFORMS = {"views": "random crops, mirror images and colours, as in contrastive pre-training"}


def transform_from(spec: Mapping[str, Any]) -> Transform:
    """The transform of a card, `{"name": "views", "crop_floor": 0.08, ...}`: the fields of SimCLRViews."""
    settings = dict(spec)
    if (name := settings.pop("name", None)) not in TRANSFORMS:
        raise unknown_name("transform", str(name), TRANSFORMS)
    if "jitter" in settings:
        settings["jitter"] = tuple(settings["jitter"])
    return RandomViews(SimCLRViews(**settings))
