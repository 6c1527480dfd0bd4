"""Square attack (Andriushchenko et al. 2020), for randomised defences too: random squares, no gradient, predictions alone.

The loss of a query is a mean over draws, and no image is called broken on one lucky pass (auto-attack issues 15 and 56). A
query and the best point so far are compared on the same draws; every `redraw` queries both draws and the best point's loss
are renewed, or else the luckiest loss would never be beaten again.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import judging_rows
from rush_bench.defenses import Defense
from rush_bench.defenses.losses import margin
from rush_bench.noise import Stream
from rush_bench.settings import Count, PositiveShare
from rush_bench.threats import Threat

NAMES = {"square": "Square, 5000 queries, without gradients; the loss of a query is a mean over 20 draws"}

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: where the squares' area halves (section 3)
AHEAD = 50  # queries whose random numbers are made at once: on a small network they cost as much as the network


@dataclass(frozen=True)
class Square(Attack):
    """`queries` per image, each a mean over `draws` draws (whole predictions of the defence; 1 if deterministic).

    Without `whole` a query takes no more than these draws where one prediction has more votes; what is found is judged by
    whole ones all the same. `area` is the first share of the image that a square covers (0.8 as in AutoAttack).
    `select_draws` held-apart draws judge the point of every renewal; with `stop`, an image that is broken (see `BestSoFar`)
    leaves the search there, and as soon as it is misclassified by a deterministic defence.
    """

    climbs: ClassVar[bool] = False
    drawn: ClassVar[tuple[str, ...]] = ("draws", "redraw", "select_draws", "whole")
    later: ClassVar[dict[str, Any]] = {"whole": True}

    queries: Count = 5000
    draws: Count = 20
    area: PositiveShare = 0.8
    redraw: Count = 100
    select_draws: Count = 64
    stop: bool = True
    whole: bool = True

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        return self._search(defense, images, labels, threat, stream, None)

    def go_on(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream, found: Tensor) -> Tensor:
        return self._search(defense, images, labels, threat, stream, found)

    def _search(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream, found: Tensor | None
    ) -> Tensor:
        """From stripes or from what other attacks `found`, whichever has the higher loss, image by image."""
        kept = BestSoFar(defense, images, labels, stream, self.select_draws)
        kind = _LInf if threat.norm == "linf" else _L2
        asked = defense if self.whole else defense.of_votes(min(self.draws, defense.draws))
        repeats = 1 if defense.deterministic else -(-self.draws // asked.draws)
        span = repeats * max(asked.draws, 1)

        def loss(points: Tensor) -> Tensor:
            """Margin of the log of the mean probability, (n,)."""
            noise = own.named("draws").skip(renewed * span)
            return margin(asked.predictions(points, noise, repeats, exact=False).logs.logsumexp(0), truth)

        alive = kept.everyone
        renewed = 0
        own, moves, truth = stream.at(kept.positions), kind(threat, images), labels
        best = moves.start(own.named("start"))
        best_loss, uniform = loss(best), best[:, :0]
        if found is not None:
            kept.offer(found)
            value = loss(found)
            better = value >= best_loss
            best, best_loss = torch.where(better[:, None, None, None], found, best), torch.maximum(value, best_loss)
        for query in range(1, self.queries):
            renew = not defense.deterministic and query % self.redraw == 0
            due = (best, alive) if renew else ()
            if defense.deterministic and self.stop and len(positions := (best_loss > 0).nonzero()[:, 0]):
                due = best[positions], alive[positions]
            if due:
                kept.offer(*due)
                positions = (~kept.broken[alive]).nonzero()[:, 0]
                if self.stop and len(positions) < len(alive):
                    alive, best, best_loss, uniform = (
                        alive[positions],
                        best[positions],
                        best_loss[positions],
                        uniform[positions],
                    )
                    own, moves, truth = stream.at(kept.places(alive)), kind(threat, images[alive]), labels[alive]
                if not len(alive):
                    return kept.points
            if renew:
                renewed += 1
                best_loss = loss(best)
            if (at := (query - 1) % AHEAD) == 0:
                uniform = own.named("moves").skip(query).uniform(len(alive), AHEAD, (moves.numbers(),), images.device)
            share = self.area / 2 ** sum(query * 10_000 // self.queries > h for h in HALVINGS)
            points = moves.move(best, share, uniform[:, at])
            value = loss(points)
            better = value > best_loss
            best = torch.where(better[:, None, None, None], points, best)
            best_loss = torch.where(better, value, best_loss)
        kept.offer(best, alive)
        return kept.points

    def on(self, defense: Defense) -> Attack:
        return dataclasses.replace(self, draws=1, select_draws=1, redraw=1, whole=True) if defense.deterministic else self

    def passes(self, defense: Defense) -> tuple[float, float]:
        looks = 0 if defense.deterministic else (self.queries - 1) // self.redraw
        judged = (looks + 1) * judging_rows(defense, self.select_draws)
        asked = judging_rows(defense, self.draws)
        return (self.queries + looks) * (asked if self.whole or defense.deterministic else min(asked, self.draws)) + judged, 0


@dataclass(frozen=True)
class _LInf:
    """Squares of +-eps around the images (B, C, H, W), one sign per channel (algorithm 2); starts from vertical stripes."""

    threat: Threat
    images: Tensor

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """The least and the most that pixels may be: all that squares are made of, so that nothing is projected again."""
        images, eps = self.images, self.threat.eps
        return self.threat.project(images - eps, images), self.threat.project(images + eps, images)

    def start(self, stream: Stream) -> Tensor:
        _, channels, _, width = self.images.shape
        return self._signed(stream.uniform(len(self.images), 1, (channels, 1, width), self.images.device)[:, 0])

    def numbers(self) -> int:
        """Uniform numbers that a move takes."""
        return 2 + self.images.shape[1]

    def move(self, best: Tensor, share: float, uniform: Tensor) -> Tensor:
        height, width = best.shape[2:]
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        top, left = _corner(uniform[:, 0], height - side), _corner(uniform[:, 1], width - side)
        return torch.where(_window(best, top, left, side)[0], self._signed(uniform[:, 2:, None, None]), best)

    def _signed(self, uniform: Tensor) -> Tensor:
        return torch.where(uniform < 0.5, *self.edges)


@dataclass(frozen=True)
class _L2:
    """Two-sided bumps; each move takes the norm of one window, and what is unused, to another (algorithm 3)."""

    threat: Threat
    images: Tensor

    def start(self, stream: Stream) -> Tensor:
        images = self.images
        batch, channels, height, width = images.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        uniform = stream.uniform(batch, 1, (channels + 1, down, across), images.device)[:, 0]
        bumps = self._bumps(side, uniform[:, 0]).transpose(2, 3).reshape(batch, down * side, across * side)
        signs = _signs(uniform[:, 1:]).repeat_interleave(side, 2).repeat_interleave(side, 3)
        tiles = (down * side, across * side)
        pad = [(size - tile) // 2 for size, tile in zip((height, width), tiles, strict=True)]
        delta = torch.zeros_like(images)
        delta[:, :, pad[0] : pad[0] + tiles[0], pad[1] : pad[1] + tiles[1]] = bumps[:, None] * signs
        return self._scaled(delta)

    def numbers(self) -> int:
        """Uniform numbers that a move takes."""
        return 5 + self.images.shape[1]

    def move(self, best: Tensor, share: float, uniform: Tensor) -> Tensor:
        images = self.images
        batch, channels, height, width = images.shape
        side = max(round(math.sqrt(share * height * width)), 3)
        side = min(side + 1 - side % 2, height, width)
        corners = [_corner(uniform[:, k], (height, width)[k % 2] - side) for k in range(4)]
        there, row, column = _window(images, corners[0], corners[1], side)
        source = _window(images, corners[2], corners[3], side)[0]
        delta = best - images
        norm = (delta * there).square().sum((2, 3), keepdim=True).sqrt()
        pooled = (delta * (there | source)).square().sum((2, 3), keepdim=True)
        unused = (self.threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
        every, row, column = torch.arange(batch, device=images.device), row.clamp(0, side - 1), column.clamp(0, side - 1)
        bump = self._bumps(side, uniform[:, 4])[every[:, None, None], row[:, :, None], column[:, None]]
        new = (bump[:, None] * _signs(uniform[:, 5:])[:, :, None, None] + delta / norm.clamp_min(1e-12)) * there
        new = new / new.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        new = new * (pooled + unused / channels).sqrt()
        return self._scaled(torch.where(there, new, torch.where(source, 0.0, delta)))

    def _scaled(self, delta: Tensor) -> Tensor:
        """To the edge of the ball, then into it and the box."""
        length = self.threat.size(delta).clamp_min(1e-12)[:, None, None, None]
        return self.threat.project(self.images + delta / length * self.threat.eps, self.images)

    def _bumps(self, side: int, uniform: Tensor) -> Tensor:
        """A positive and a negative bump side by side, upright or lying by chance: (*uniform.shape, side, side), norm 1."""
        half = side // 2
        bump = torch.zeros(side, side, device=uniform.device)
        bump[:half], bump[half:] = _bump(half, side, uniform.device), -_bump(side - half, side, uniform.device)
        bump /= bump.norm()
        return torch.where(uniform[..., None, None] < 0.5, bump, bump.T)


def _bump(height: int, width: int, device: torch.device) -> Tensor:
    """Nested rectangles of falling weight around the centre, sum over k of 1/(k+1)^2 (section 4.2): (height, width)."""
    out = torch.zeros(height, width, device=device)
    middle = (height // 2, width // 2)
    for k in range(max(middle) + 1):
        top, left = middle[0] - k, middle[1] - k
        out[max(top, 0) : middle[0] + k + 1, max(left, 0) : middle[1] + k + 1] += 1 / (k + 1) ** 2
    return out / out.norm().clamp_min(1e-12)


def _window(images: Tensor, top: Tensor, left: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels lie in the square of each image (B, 1, H, W); the place in it of each row (B, H) and column (B, W)."""
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) - top[:, None]
    column = torch.arange(width, device=images.device) - left[:, None]
    down, across = (row >= 0) & (row < side), (column >= 0) & (column < side)
    return (down[:, :, None] & across[:, None])[:, None], row, column


def _corner(uniform: Tensor, last: int) -> Tensor:
    """A position from 0 to `last`, each alike."""
    return (uniform * (last + 1)).long().clamp_max(last)


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def make(name: str) -> Any:
    return Square
