"""Whether gradients are true: zero where something matters, or another slope than differences of predictions show.

A gradient attack is worth what its gradients are. Every figure here is free of the scale of the logits. A few images are
looked at, each near itself and along the path of an attack, for about fifty forward rows (times draws) per image. Of a network
of ours the logits themselves are compared, since differences of float32 log-probabilities vanish where logits are tiny. A
network that computes in 16 bits is judged by larger changes, which its rounding does not hide.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from rush_bench.defenses import Defense, Network
from rush_bench.defenses.body import blocks
from rush_bench.defenses.losses import cross_entropy, margin_to
from rush_bench.defenses.samplers import positions
from rush_bench.errors import BadInput
from rush_bench.noise import Stream
from rush_bench.threats import Threat

LOOKED, DRAWS, STEPS = 4, 8, 4  # images looked at, draws held fixed there at most, steps of the walk (eps/4 each)
# Changes of a pixel. Fine ones lie below a grey level (1/255) and above float32's rounding; the smaller one meets fewer kinks
# of a ReLU network, the larger one less rounding, so the better of both counts. The coarse one is a step of an attack, where
# an input that was shattered into tiny waves no longer follows its gradient. (At 0.01, honest ResNets reach an error of 0.5.)
FINE, COARSE = (2e-4, 1e-3), 0.005
# The same of a network that computes in 16 bits: bfloat16 keeps 8 bits of a pixel, so that finer changes are lost or doubled.
FINE_OF_16, COARSE_OF_16 = (0.01, 0.02), 0.01
# Relative error of an image's gradient that is too much. Piecewise linear networks reach 0.06, with max-pooling 0.12, a
# search in bfloat16 0.15 on most images; wrong signs on a tenth of the pixels give 0.5 and more, a detached third 0.3.
UNTRUE = 0.2
# A gradient nearly vanishes where all it could do on the way to noise is less than this share of what happens there. Networks
# trained with and without attacks have 2.4 to 300, linear ones at least 1; behind a saturated sigmoid it is 0.001.
VANISHES = 0.1
# A change of the scores by less than this share of them may be rounding. What is left of it in 16 bits, and the kinks that
# larger changes meet, make an error of up to 0.6: there an error counts as so much of itself.
ROUNDING, ROUNDING_OF_16, COUNTS_OF_16 = 40 * torch.finfo(torch.float32).eps, 0.08, 0.3
LEAST = math.log(1e-30) + 1e-3  # of a log-probability: what is smaller counts as 1e-30
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
        slope = _Slope(defense, images[k : k + 1], labels[k : k + 1], own)
        frozen[k] = slope.frozen()
        points, step = slope.path(threat), slope.step(threat)
        errors = [slope.error(x, step, own.named(f"directions{n}")) for n, x in enumerate(points)]
        if mute is None:
            mute = _mute(slope, images[:VARIED], stream)
        none = not zero[k] and (slope.vanishes() or (k < len(mute) and bool(mute[k])))
        error[k] = max([1.0 if none else torch.nan, *errors], key=_known)
    if passes is not None:
        defense.passes.forwards, defense.passes.backwards = passes.forwards, passes.backwards
    return Health(zero, error, frozen)


def no_gradient(defense: Defense, images: Tensor, labels: Tensor, stream: Stream, draws: int = 0) -> Tensor:
    """Which images (B,) have no gradient of CE and none of the margin of mean logits, which does not saturate."""
    draws = draws or max(defense.draws, 1)
    zero = _none(defense.gradient(images, labels, "ce", draws, stream).gradient)
    if zero.any():
        zero = zero & _none(defense.gradient(images, labels, _scale_free(defense, "margin"), draws, stream).gradient)
    return zero.cpu()


def _none(gradient: Tensor) -> Tensor:
    """NaN is no gradient either."""
    return ~(gradient.flatten(1).abs().amax(1) >= torch.finfo(torch.float32).tiny)


def _scale_free(defense: Defense, loss: str) -> str:
    return f"{loss}@logits" if isinstance(defense, Network) else loss


def scores(raw: Defense, points: Tensor, stream: Stream, draws: int) -> Tensor:
    """What judges, (P, K) in float64: mean logits of a network of ours (`raw_logits`), else the log of the mean probability."""
    if not isinstance(raw, Network):
        return raw.predict(points, stream).logs.double()
    forward = raw.sampler.forward(raw.body, stream, len(points))
    draws = raw.averaged if raw.deterministic else draws
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for i, j in blocks(len(points), draws, raw.body.block(draws)):
            part = forward(points[i].to(raw.device), i, j, True).double().sum(1) / draws
            rows[i.start] = rows[i.start] + part if i.start in rows else part
    return torch.cat(list(rows.values())).clone()


def _known(error: float) -> float:
    """NaN below every number."""
    return -1.0 if error != error else error


class _Slope:
    """One image's scores as a function of x, on fixed draws: a difference of two classes' scores, and its gradient.

    The difference is that of the likeliest other class and the label, both chosen at the image: without kinks of its
    own, and linear in the logits. A defence that knows no targeted loss is asked for CE.
    """

    def __init__(self, defense: Defense, image: Tensor, label: Tensor, stream: Stream) -> None:
        self.defense, self.image, self.stream = defense, image, stream
        self.draws = max(1, min(defense.draws, DRAWS) if isinstance(defense, Network) else defense.draws)
        self.raw = raw_logits(defense)
        with _Widths() as widths:
            first = self.scores(image)
        self.resolution = max(widths.coarsest, torch.finfo(torch.float32).eps)
        self.in_16_bits = widths.coarsest > torch.finfo(torch.float32).eps
        self.sizes, self.coarse = (FINE_OF_16, COARSE_OF_16) if self.in_16_bits else (FINE, COARSE)
        self.rounding = ROUNDING_OF_16 if self.in_16_bits else ROUNDING
        other = first.scatter(1, label[:, None], -torch.inf).argmax(1)
        self.name, self.labels = _scale_free(defense, "margin-to"), torch.stack([label, other], 1)
        self.value: Callable[[Tensor, Tensor], Tensor] = margin_to
        try:
            self.here = self.gradient(image)
        except BadInput:
            self.name, self.labels, self.value = "ce", label, cross_entropy
            self.here = self.gradient(image)

    def gradient(self, x: Tensor) -> Tensor:
        """(1, C, H, W), what an attack gets: of the network that searches."""
        return self.defense.gradient(x, self.labels, self.name, self.draws, self.stream).gradient

    def scores(self, points: Tensor, stream: Stream | None = None) -> Tensor:
        """(P, K), see the function `scores`; `stream` of another image."""
        stream = stream or self.stream
        place = stream.images
        assert place is not None
        if self.defense.draws_per_image:
            return scores(self.raw, points, stream.at(place.expand(len(points))), self.draws)
        # what the network draws depends on its batch: each point is asked for alone, as the gradient is
        return torch.cat([scores(self.raw, point, stream, self.draws) for point in points.split(1)])

    def path(self, threat: Threat) -> list[Tensor]:
        """Points where the gradient is looked at: near the image, at a random start, and where a walk from there ends."""
        near = dataclasses.replace(threat, eps=threat.eps / 4)  # off the ties of equal pixels, where a max-pool has a kink
        x = start = threat.start(self.image, self.stream.named("start"))
        for _ in range(STEPS):
            x = threat.project(x + threat.eps / STEPS * threat.ascend(self.gradient(x)), self.image)
        return [near.start(self.image, self.stream.named("near")), start, x]

    def step(self, threat: Threat) -> float:
        """A pixel's change in a step of an attack."""
        size = threat.eps / 8 if threat.norm == "linf" else threat.eps / 4 / self.image.numel() ** 0.5
        return self.coarse if self.in_16_bits else min(size, self.coarse)

    def error(self, x: Tensor, step: float, stream: Stream) -> float:
        """The relative error at x: the mean over random directions, or half of that of an attack's step; NaN if unknown.

        Directions: signs on all pixels, on an eighth of them, on a grid of 4 x 4 patches, and of the gradient itself. Of the
        step half counts, as that much is curvature: a network that follows its gradient reaches 0.3, a shattered input 1.
        """
        g = self.gradient(x)
        uniform = stream.uniform(1, 4, tuple(x.shape[1:]), x.device)[0]
        signs = torch.where(uniform < 0.5, -1.0, 1.0)
        patches = F.interpolate(signs[2:3, :, :4, :4], x.shape[2:])
        moves = torch.cat([signs[:1], signs[1:2] * (uniform[3:] < 0.125), patches, torch.where(g == 0, signs[:1], g.sign())])
        # a pixel that is frozen at its edge is counted apart
        moves = torch.where(_at_edge(x) & (g == 0), 0.0, moves)
        sizes = [*self.sizes, step]
        up, down = (torch.cat([(x + side * size * moves).clamp(0, 1) for size in sizes]) for side in (1, -1))
        relative = self._relative(g, up, down).unflatten(0, (len(sizes), len(moves)))
        fine = relative[:-1].nan_to_num(torch.inf).amin(0)[:-1]  # the better of both sizes
        fine = fine[fine.isfinite()]
        figures = [float(fine.mean()) if len(fine) else torch.nan, float(relative[-1, -1]) / 2]
        return max(figures, key=_known) * (COUNTS_OF_16 if self.in_16_bits else 1)

    def _relative(self, g: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """|g (up - down) - difference of the values| relative to the larger, or to what a random move is worth; (P,)."""
        moved = up.double() - down.double()
        analytic = (g.double() * moved).flatten(1).sum(1)
        scores = self.scores(torch.cat([up, down]))
        value = self.value(scores, self.labels.expand(len(scores), *self.labels.shape[1:]))
        numeric = value[: len(up)] - value[len(up) :]
        typical = g.double().norm() * moved.flatten(1).norm(dim=1) / g.numel() ** 0.5
        most = torch.stack([analytic.abs(), numeric.abs(), typical]).amax(0)
        compared = scores[:, self.labels[0]] if self.value is margin_to else scores  # not a class that is masked by -1e9
        return torch.where(most > self.rounding * compared.abs().amax(), (analytic - numeric).abs() / most, torch.nan)

    def vanishes(self) -> bool:
        """Whether the gradient at the image is tiny beside what the scores do on the straight way to uniform noise.

        Exact derivatives of outputs that a saturating function squashed (10 sigmoid(z), tanh, exp) are of this kind, at any
        scale. CE's own gradient vanishes on any sure network, and is not asked.
        """
        if self.value is cross_entropy:
            return False
        way = self.stream.named("way").uniform(1, 1, tuple(self.image.shape[1:]), self.image.device)[0] - self.image
        scores = self.scores(self.image + torch.linspace(0, 1, 9, device=way.device)[:, None, None, None] * way)
        label, other = scores[:, self.labels[0]].unbind(1)
        change = float((other - label).max() - (other - label).min())
        possible = float(self.here.double().norm() * way.double().norm())
        told = change > self.rounding * float(torch.maximum(label.abs(), other.abs()).max())
        return told and possible < VANISHES * change < float("inf")

    def frozen(self) -> float:
        """The share of pixels that are frozen at the image; 0 where what they might do is below a tenth of the others.

        Counted are those that get a gradient as soon as all leave the edge a little. Where equal pixels tie in a max-pool, as
        many have none as before: one of a window wins.
        """
        g, x = self.here, self.image
        stuck = _at_edge(x) & (g == 0)
        if not stuck.any() or not g.any():
            return 0.0
        inwards = torch.where(_at_edge(x), torch.where(x > 0.5, -self.sizes[-1], self.sizes[-1]), 0.0)
        uniform = self.stream.named("frozen").uniform(1, 5, tuple(x.shape[1:]), x.device)[0]
        still = _at_edge(x) & (self.gradient(x + uniform[4:] * inwards) == 0)
        thawed = float(stuck.double().mean() - still.double().mean())
        inwards = torch.where(stuck, inwards, 0.0)
        # four ways to tell half of them from the other half: in one their effects may cancel
        half = torch.where(uniform[:4] < 0.5, 0.0, inwards)
        scores = self.scores(torch.cat([x + half, x + inwards - half]))
        value = self.value(scores, self.labels.expand(len(scores), *self.labels.shape[1:]))
        matters = (value[:4] - value[4:]).abs().max()
        expected = g[~stuck].double().square().mean().sqrt() * inwards.double().norm()
        return max(thawed, 0.0) if matters > 0.1 * expected else 0.0


def _mute(slope: _Slope, images: Tensor, stream: Stream) -> Tensor:
    """At which of these images (B, C, H, W) half or more of the classes besides the likeliest stand still; (B,) bool.

    Their scores, the same under every small change of the image, tell an attack nowhere to go, though the gradient is exact:
    all classes but the winner were set to 0, or a ReLU cuts them. None is where a quarter of the runners-up or fewer stand
    still, as an attack needs no others, or where the winner does too, as nothing is known of scores so coarse. A class that is
    masked to the same score everywhere is left out. Classes that move together (behind a log-softmax) stand still as well.
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
    if not isinstance(slope.raw, Network) or slope.raw.body.outputs == "probabilities":
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
    return found.cpu()


class _Widths(TorchFunctionMode):
    """Inside, `coarsest` is the resolution of the coarsest floating-point numbers that an operation gave."""

    coarsest = 0.0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_iter(outputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)
        return outputs


def _at_edge(x: Tensor) -> Tensor:
    return (x == 0) | (x == 1)


def raw_logits(defense: Defense) -> Defense:
    """The same defence with logits in place of log-probabilities; itself where it is not made of a network of ours."""
    if not isinstance(defense, Network):
        return defense
    return defense.with_body(defense.body.variant(read=lambda body, batch, exact: body.outcome(batch, exact=exact)))
