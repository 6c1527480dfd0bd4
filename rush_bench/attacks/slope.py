"""A gradient held against differences of what it is the gradient of: at one image, near it and along the path of an attack.

Every figure is free of the scale of the logits. Of a network of ours the logits themselves are compared, since differences of
float32 log-probabilities vanish where logits are tiny. A network that computes in 16 bits is judged by larger changes, which
its rounding does not hide.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from rush_bench.defenses import Defense, is_network
from rush_bench.defenses.base import UNKNOWN_LOSS
from rush_bench.defenses.losses import cross_entropy, margin_to
from rush_bench.defenses.raw import in_float32, raw_logits, scores
from rush_bench.noise import Stream
from rush_bench.threats import Threat

LEAST = math.log(1e-30) + 1e-3  # of a log-probability: what is smaller counts as 1e-30
DRAWS, STEPS = 8, 4  # draws held fixed at most, steps of the walk (eps/4 each)
# Changes of a pixel. Fine ones lie below a grey level (1/255) and above float32's rounding; the smaller one meets fewer kinks
# of a ReLU network, the larger one less rounding, so the better of both counts. The coarse one is a step of an attack, where
# an input that was shattered into tiny waves no longer follows its gradient. (At 0.01, honest ResNets reach an error of 0.5.)
FINE, COARSE = (2e-4, 1e-3), 0.005
# The same of a network that computes in 16 bits: bfloat16 keeps 8 bits of a pixel, so that finer changes are lost or doubled.
FINE_OF_16, COARSE_OF_16 = (0.01, 0.02), 0.01
# A gradient nearly vanishes where all it could do on the way to noise is less than this share of what happens there. Networks
# trained with and without attacks have 2.4 to 300, linear ones at least 1; behind a saturated sigmoid it is 0.001.
VANISHES = 0.1
# A change of the scores by less than this share of them may be rounding. What is left of it in 16 bits, and the kinks that
# larger changes meet, make an error of up to 0.6: there an error counts as so much of itself.
ROUNDING, ROUNDING_OF_16, COUNTS_OF_16 = 40 * torch.finfo(torch.float32).eps, 0.08, 0.3


class Slope:
    """One image's scores as a function of x, on fixed draws: a difference of two classes' scores, and its gradient.

    The difference is that of the likeliest other class and the label, both chosen at the image: without kinks of its
    own, and linear in the logits. A defence that knows no targeted loss is asked for CE.
    """

    def __init__(self, defense: Defense, image: Tensor, label: Tensor, stream: Stream) -> None:
        self.defense, self.image, self.stream = defense, image, stream
        self.draws = max(1, min(defense.draws, DRAWS) if is_network(defense) else defense.draws)
        self.raw, self.precise = raw_logits(defense), in_float32(defense)
        with _Widths() as widths:
            first = self.scores(image)
        self.resolution = max(widths.coarsest, torch.finfo(torch.float32).eps)
        self.in_16_bits = widths.coarsest > torch.finfo(torch.float32).eps
        self.sizes, self.coarse = (FINE_OF_16, COARSE_OF_16) if self.in_16_bits else (FINE, COARSE)
        self.rounding = ROUNDING_OF_16 if self.in_16_bits else ROUNDING
        other = first.scatter(1, label[:, None], -torch.inf).argmax(1)
        self.name, self.labels = scale_free(defense, "margin-to"), torch.stack([label, other], 1)
        self.value: Callable[[Tensor, Tensor], Tensor] = margin_to
        try:
            self.here = self.gradient(image)
        except UNKNOWN_LOSS:
            self.name, self.labels, self.value = "ce", label, cross_entropy
            self.here = self.gradient(image)

    def gradient(self, x: Tensor, defense: Defense | None = None) -> Tensor:
        """(1, C, H, W), what an attack gets: of the network that searches, or of another form of the defence."""
        return (defense or self.defense).gradient(x, self.labels, self.name, self.draws, self.stream).gradient

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
        """The relative error at x of the gradient in float32, or COUNTS_OF_16 times that of what an attack gets in 16 bits,
        whichever is more: a search in bfloat16 is no fault of the defence. NaN if unknown."""
        found = self._error(self.gradient(x, self.precise), x, step, stream) * (COUNTS_OF_16 if self.in_16_bits else 1)
        if self.precise is self.defense:
            return found
        return max(found, COUNTS_OF_16 * self._error(self.gradient(x), x, step, stream), key=known)

    def _error(self, g: Tensor, x: Tensor, step: float, stream: Stream) -> float:
        """The relative error of a gradient at x: the mean over random directions, or half of that of an attack's step; NaN if
        unknown.

        Directions: signs on all pixels, on an eighth of them, on a grid of 4 x 4 patches, and of the gradient itself. Of the
        step half counts, as that much is curvature: a network that follows its gradient reaches 0.3, a shattered input 1.
        """
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
        return max(figures, key=known)

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
        told = most > self.rounding * compared.abs().amax()
        if not is_network(self.raw):  # a probability that float32 rounds to next to 0 has no logarithm to compare with
            told &= (compared > LEAST).all(1).view(2, -1).all(0)
        return torch.where(told, (analytic - numeric).abs() / most, torch.nan)

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


class _Widths(TorchFunctionMode):
    """Inside, `coarsest` is the resolution of the coarsest floating-point numbers that an operation gave."""

    coarsest = 0.0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_iter(outputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)
        return outputs


def scale_free(defense: Defense, loss: str) -> str:
    """A loss on mean logits, where the defence has those: it does not saturate."""
    return f"{loss}@logits" if is_network(defense) else loss


def known(error: float) -> float:
    """NaN below every number."""
    return -1.0 if error != error else error


def _at_edge(x: Tensor) -> Tensor:
    return (x == 0) | (x == 1)
