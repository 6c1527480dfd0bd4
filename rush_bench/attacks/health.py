"""Whether gradients are true: zero where something matters, or another slope than differences of predictions show.

A gradient attack is worth what its gradients are. A few images are looked at (see `slope`), for about fifty forward rows (times
draws) per image.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rush_bench.attacks.slope import LEAST, Slope, known, scale_free
from rush_bench.defenses import Defense, is_network
from rush_bench.defenses.samplers import positions
from rush_bench.noise import Stream
from rush_bench.threats import Threat

LOOKED = 8  # images
# Relative error of an image's gradient that is too much. Piecewise linear networks reach 0.06, with max-pooling 0.12, a
# search in bfloat16 0.15 on most images; wrong signs on a tenth of the pixels give 0.5 and more, a detached third 0.3.
UNTRUE = 0.2
VARIED = 16  # images of which is asked whether the scores of classes stand still, and whether they are ever other ones
FEW = 0.25  # of the images looked at may be beyond: a kink, or a gradient that cancels, is nobody's fault


@dataclass(frozen=True)
class Health:
    """Per image (B,), NaN where it was not looked at or float32 cannot tell.

    `zero`: whether no loss has a gradient at the image (bool). `error`: relative error of directional derivatives, the most of
    all points looked at: 0 is exact, 1 as good as no gradient (one that nearly vanishes too, or most classes have none), 2 the
    reverse. `frozen`: share of pixels at 0 or 1 whose gradient is exactly 0 though the prediction's scores depend on them
    (torch's clamp at its edge), from 0 to 1.
    """

    zero: Tensor
    error: Tensor
    frozen: Tensor

    @property
    def untrue(self) -> float:
        """The share of images whose gradient is another than it should be; 0 where no more than FEW of those looked at are."""
        looked = self.error[~self.error.isnan()]
        share = float((looked > UNTRUE).double().mean()) if len(looked) else 0.0
        return share if share > FEW else 0.0


def health(
    defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream, *, draws: int = 0, looked: int = LOOKED
) -> Health:
    """The gradients of a defence at images (B, C, H, W) with labels (B,); the first `looked` are followed on a path.

    `draws` of a gradient, 0 for the defence's own m. The defence's counters stay as they were.
    """
    passes = dataclasses.replace(defense.passes) if hasattr(defense, "passes") else None
    stream = stream.at(positions(stream, len(images)))
    zero = no_gradient(defense, images, labels, stream, draws)
    error = torch.full((len(images),), torch.nan, dtype=torch.float64)
    frozen = error.clone()
    mute: Tensor | None = None
    for k in range(min(looked, len(images))):
        own = stream.at(positions(stream, len(images))[k : k + 1])
        slope = Slope(defense, images[k : k + 1], labels[k : k + 1], own)
        frozen[k] = slope.frozen()
        points, step = slope.path(threat), slope.step(threat)
        errors = [slope.error(x, step, own.named(f"directions{n}")) for n, x in enumerate(points)]
        if mute is None:
            mute = _mute(slope, images[:VARIED], stream)
        none = not zero[k] and (slope.vanishes() or (k < len(mute) and bool(mute[k])))
        error[k] = max([1.0 if none else torch.nan, *errors], key=known)
    if passes is not None:
        defense.passes.forwards, defense.passes.backwards = passes.forwards, passes.backwards
    return Health(zero, error, frozen)


def drawn(stream: Stream, count: int) -> Tensor:
    """All positions of a batch in an order that is drawn image by image: of its first images one may know little."""
    return stream.at(positions(stream, count)).named("looked").uniform(count, 1, (1,)).flatten().argsort()


def no_gradient(defense: Defense, images: Tensor, labels: Tensor, stream: Stream, draws: int = 0) -> Tensor:
    """Which images (B,) have no gradient of CE and none of the margin of mean logits, which does not saturate."""
    draws = draws or max(defense.draws, 1)
    zero = _none(defense.gradient(images, labels, "ce", draws, stream).gradient)
    if zero.any():
        zero = zero & _none(defense.gradient(images, labels, scale_free(defense, "margin"), draws, stream).gradient)
    return zero.cpu()


def _none(gradient: Tensor) -> Tensor:
    """NaN is no gradient either."""
    return ~(gradient.flatten(1).abs().amax(1) >= torch.finfo(torch.float32).tiny)


def _mute(slope: Slope, images: Tensor, stream: Stream) -> Tensor:
    """At which of these images (B, C, H, W) half or more of the classes besides the likeliest stand still; (B,) bool.

    Their scores, the same under every small change of the image, tell an attack nowhere to go, though the gradient is exact:
    all classes but the winner were set to 0, or a ReLU cuts them. None is where a quarter of the runners-up or fewer stand
    still, as an attack needs no others, or where the winner does too, as nothing is known of scores so coarse. A class that is
    masked to the same score everywhere is left out. Classes that move together (behind a log-softmax) stand still as well.
    So do images of which the winner alone is at a bound, see `_bounded`.
    """
    place = stream.images
    assert place is not None
    sizes, rows = [*slope.sizes, slope.coarse], []
    for k, x in enumerate(images.split(1)):
        own = stream.at(place[k : k + 1])
        signs = torch.where(own.named("mute").uniform(1, 1, tuple(x.shape[1:]), x.device)[0] < 0.5, -1.0, 1.0)
        rows.append(slope.scores(torch.cat([x, *((x + by * signs).clamp(0, 1) for h in sizes for by in (h, -h))]), own))
    scores = torch.stack(rows)  # (B, 1 + moves, K)
    here, changes = scores[:, 0], scores[:, 1:] - scores[:, :1]
    first, second = here.topk(2, 1).indices.unbind(1)
    every = torch.arange(here.shape[1], device=here.device)
    others = every != first[:, None]
    if not is_network(slope.raw) or slope.raw.body.outputs == "probabilities":
        others &= here > LEAST
    found = torch.zeros(len(images), dtype=torch.bool, device=here.device)
    for together in (False,) if slope.in_16_bits else (False, True):
        tiny = slope.resolution * here.abs().amax(1, keepdim=True) if together else torch.zeros_like(here[:, :1])
        shift = changes.median(2, keepdim=True).values if together else torch.zeros_like(changes[:, :, :1])
        still = (changes - shift).abs().amax(1) <= tiny
        level = here - here.median(1, keepdim=True).values if together else here
        varies = level.amax(0) - level.amin(0) > 2 * slope.resolution * here.abs().amax(0)
        counted = others & varies
        mute = counted.any(1) & ~still.gather(1, first[:, None])[:, 0]
        mute &= 2 * (still & counted).sum(1) >= counted.sum(1)
        runner_up = (still & counted).gather(1, second[:, None])[:, 0]
        if float(runner_up.double().mean()) > FEW:
            found |= mute
        if not together:
            found |= _bounded(here, still, first, second)
    return found.cpu()


def _bounded(here: Tensor, still: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of which images (B,) the winner stands still at a bound, as behind clamp(max=8), while the runner-up moves.

    How sure the network is there no gradient tells. Scores (B, K) whose winner is always 0 are taken relative to it, and those
    that a softmax normalised have a bound that the others share: neither hides anything.
    """
    winner, bound = here.gather(1, first[:, None])[:, 0], here.max()
    if here.logsumexp(1).abs().max() < 1e-3 or (here.amax(1) == 0).all():
        return torch.zeros_like(winner, dtype=torch.bool)
    alone = still.gather(1, first[:, None])[:, 0] & ~still.gather(1, second[:, None])[:, 0]
    return alone & (winner == bound)
