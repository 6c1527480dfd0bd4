"""Defences that draw at random themselves: in a transform before the network, or inside the network."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.datasets.views import VIEW_NUMBERS, SimCLRViews
from rush_bench.defenses.aggregate import MEAN_PROBABILITY, Aggregation
from rush_bench.defenses.body import Body
from rush_bench.defenses.calls import check_draws
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.owner import device_of, undisturbed, weights_digest
from rush_bench.defenses.probe import SHAPE, differ, edges_like, images_like, shape_hint
from rush_bench.defenses.samplers import NetworkSampler, Sampler, StreamTransform, TransformSampler
from rush_bench.defenses.smoothed import Network, check_votes
from rush_bench.errors import BadInput, unknown_name
from rush_bench.noise import Stream

PlainTransform = Callable[[Tensor], Tensor]  # images (B, C, H, W) to images, random by torch's global generators
Average = Literal["vote", "probability", "logits"]
PROBE = Stream(0, "probe")


@dataclasses.dataclass(frozen=True)
class RandomViews:
    """A transform: random augmentations, the draws of image i and draw j keyed as noise is, by (seed, purpose, i, j).

    With `average="logits"` it is the transformation-smoothed inference of RoCL (Kim et al. 2020; sources S2.5).
    """

    views: SimCLRViews = dataclasses.field(default_factory=SimCLRViews)

    def __call__(self, images: Tensor, stream: Stream, draws: int) -> Tensor:
        """(B, C, H, W) to (B, k, C, H, W); differentiable almost everywhere (see `SimCLRViews.view`)."""
        u = stream.uniform(len(images), draws, (VIEW_NUMBERS,), images.device)
        copies = images[:, None].expand(-1, draws, -1, -1, -1).flatten(0, 1)
        return self.views.view(copies, u.flatten(0, 1).T).unflatten(0, (len(images), draws))


class Randomised(Network):
    """A network whose prediction is random, and the vote over `votes` draws of it. Two kinds:

    - `transform(images, stream, draws) -> copies (B, k, C, H, W)`: random pre-processing before a deterministic network. All
      its randomness must come from the stream, as in `stream.uniform(len(images), draws, (2,), images.device)`, so that
      what image i and draw j get depends on nothing else. Gradients go through it; where a step of it has none, give it one
      in the backward pass (BPDA).
    - `transform(images) -> images`, a function or a torchvision transform, or no `transform` and a network that draws in its
      `forward` (stochastic activation pruning, dropout left in train mode, Bayesian layers): random by torch's global
      generators. Every call runs on these seeded from (seed, purpose, images, draw) and leaves the global state as it was.
      The draws are rows of one batch where rows draw apart: what an image gets then depends on its batch and on how draws
      are cut into blocks, so a repeated run is the same, another batch size is not. Where the rows of a call share a draw,
      even in part (one `randint`, one mask, one JPEG quality a call), each image and draw is a call of
      its own: votes and gradients then average separate draws, and no two images share one, as intervals assume.
      A bank runs image by image, so it is a function of the image alone.

    `average`: `vote` counts the labels of the draws, `probability` and `logits` take the label of their mean, which is then
    what attacks see too. `plain` is the network without its randomness, which the transfer attack starts from (default:
    the network without the transform). Other options as for Deterministic. A transform's identity in the records is its
    name and, of a dataclass, its fields, of a module its weights: rename a function when you change it.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> def scaled(images, stream, draws):  # each draw of an image at a brightness of its own
        ...     u = stream.uniform(len(images), draws, (1, 1, 1), images.device)
        ...     return images[:, None] * (0.8 + 0.2 * u)
        >>> rb.Randomised(net, transform=scaled, votes=4, shape=(1, 8, 8), name="scaled")
        Randomised(scaled, 4 votes, 1x8x8 to 10 classes)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        transform: StreamTransform | PlainTransform | None = None,
        votes: int = 1,
        average: Average = "vote",
        plain: nn.Module | None = None,
        name: str | None = None,
        about: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_votes(votes)
        if average not in ("vote", "probability", "logits"):
            raise unknown_name("average", average, ["vote", "probability", "logits"])
        name = name or f"{type(network).__name__.lower()}@{votes}"
        facts = {"random": "the network's own" if transform is None else describe(transform), "average": average}
        shape, device = tuple(options.get("shape", SHAPE)), torch.device(options.get("device") or device_of(network))
        streamed: Any = transform if transform is not None and takes_stream(transform) else None
        if streamed is not None:
            check_transform(streamed, shape, device)
            body = Body(network, before=lambda images: streamed(images, PROBE, 1).flatten(0, 1), **options)
            counted = streamed.counted(body.passes) if isinstance(streamed, Chain) else streamed
            sampler: Sampler = TransformSampler(counted, facts, plain)
        else:
            if transform is not None:
                plain = network if plain is None else plain
                network = Transformed(transform, network)
                check_plain(network.transform, shape, device)
            body = Body(network, random=True, **options)
            with undisturbed(body.device):
                apart = check_draws(body, body.shape)
            body.passes.forwards = 0
            sampler = NetworkSampler(apart, facts, plain)
        averaging = Aggregation(geometric=True) if average == "logits" else MEAN_PROBABILITY
        voting: dict[str, Any] = {"averaging": averaging, "by_vote": average == "vote"}
        super().__init__(body, sampler, name=name, draws=votes, about=about, **voting)


class Transformed(nn.Module):
    """A network behind a plain transform."""

    def __init__(self, transform: Any, network: nn.Module) -> None:
        super().__init__()
        self.transform, self.network = transform, network

    def forward(self, images: Tensor) -> Any:
        return self.network(self.transform(images))


def takes_stream(transform: Callable[..., Tensor]) -> bool:
    """Whether a transform is called with (images, stream, draws), and not with images alone; BadInput where it is neither."""
    try:
        given = inspect.signature(transform.forward if isinstance(transform, nn.Module) else transform).parameters.values()
    except ValueError:  # one that is written in C
        return False
    places = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.name == "stream" for p in places):
        return True
    needed = [p.name for p in places if p.default is p.empty]
    if len(needed) in (0, 1):
        return False
    if len(needed) != 3:
        raise BadInput(
            f"a transform takes (images), or (images, stream, draws), not ({', '.join(needed)}); wrap it in such a function"
        )
    return True


def check_transform(transform: StreamTransform, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a transform that does not return copies, draws elsewhere than from its stream, or looks at its batch."""
    images = torch.cat([images_like(shape, device, 3)[1:], edges_like(shape, device)[:1]])
    with torch.no_grad(), undisturbed(device):
        first, second = (_transformed(transform, images, PROBE, 3) for _ in range(2))
        if not isinstance(first, Tensor) or first.ndim != 5 or first.shape[:2] != (3, 3):
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise BadInput(f"the transform must return copies (B, draws, C, H, W), here (3, 3, C, H, W), not {got}")
        if differ(first.flatten(2), second.flatten(2)):
            raise BadInput(
                "the transform draws elsewhere than from its stream: the same stream gave other copies; take its random "
                "numbers from stream.uniform(len(images), draws, (how_many,), images.device)"
            )
        alone = [_transformed(transform, images[k : k + 1], PROBE.at(torch.tensor([k])), 3) for k in range(3)]
        later = _transformed(transform, images, PROBE.skip(1), 2)
    if differ(first.flatten(2), torch.cat(alone).flatten(2)) or differ(first[:, 1:].flatten(2), later.flatten(2)):
        raise BadInput(
            "what the transform makes of an image depends on its batch or on how many draws are asked for; take a number of "
            "its own for each image and draw: stream.uniform(len(images), draws, (how_many,), images.device)"
        )


def check_plain(transform: PlainTransform, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a plain transform that does not return images."""
    images = images_like(shape, device)
    with torch.no_grad(), undisturbed(device):
        out = _transformed(transform, images)
    if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(images):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise BadInput(
            f"the transform must return images (B, C, H, W), here {tuple(images.shape)}, not {got}"
            f"{shape_hint(images.shape[1:])}"
        )


def _transformed(transform: Callable[..., Any], images: Tensor, *rest: Any) -> Any:
    try:
        return transform(images.clone(), *rest)
    except Exception as error:  # anybody's code
        raise BadInput(
            f"the transform fails on float32 images {tuple(images.shape)} in [0,1]: {type(error).__name__}: {error}"
            f"{shape_hint(images.shape[1:])}"
        ) from error


def describe(transform: Callable[..., Tensor]) -> dict[str, Any]:
    """A transform as plain values, for a record's key: its name, the fields of a dataclass, the weights of a module."""
    kind = transform if hasattr(transform, "__qualname__") else type(transform)
    fields: dict[str, Any] = dataclasses.asdict(transform) if dataclasses.is_dataclass(transform) else {}
    if isinstance(transform, nn.Module):
        fields = {"weights": weights_digest(transform)}
    return {"transform": f"{kind.__module__}.{kind.__qualname__}", **fields}


TRANSFORMS = {"views": "random crops, mirror images and colours, as in contrastive pre-training"}


def transform_from(spec: Mapping[str, Any]) -> StreamTransform:
    """The transform of a card, `{"name": "views", "crop_floor": 0.08, ...}`: the fields of SimCLRViews."""
    settings = dict(spec)
    if (name := settings.pop("name", None)) not in TRANSFORMS:
        raise unknown_name("transform", str(name), TRANSFORMS)
    if "jitter" in settings:
        settings["jitter"] = tuple(settings["jitter"])
    return RandomViews(SimCLRViews(**settings))
