"""The best x' of each image so far, judged on draws held apart from those of the search (protocol A4)."""

import torch
from torch import Tensor

from rush_bench.defenses import Defense
from rush_bench.defenses.smoothed import positions as positions
from rush_bench.noise import Stream


class Kept:
    """Takes candidates, keeps the best of each image. The held-apart draws are the same for all: candidates meet in pairs.

    `best` (B, C, H, W) starts as the images; the first candidate replaces them, whatever it is worth. `value` (B,) is what
    the best is worth to the attacker, `broken` (B,) bool whether none of its held-apart draws was right: for a deterministic
    defence that it is misclassified, for a randomised one, with 64 draws, that a single draw is right less than once in 21
    times (one-sided 95 %) and a vote over many next to never. An image that is broken may leave the search.
    """

    def __init__(self, defense: Defense, images: Tensor, labels: Tensor, stream: Stream, draws: int) -> None:
        self.defense, self.labels, self.stream = defense, labels, stream.named("select")
        self.positions = positions(stream, len(images))
        self.repeats = 1 if defense.deterministic else -(-draws // defense.draws)
        self.best, self.value = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
        self.broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def offer(self, points: Tensor, where: Tensor | None = None) -> None:
        """Candidates (n, C, H, W) for the images at positions `where` (n,) of the batch, each at most once; None is all."""
        where = torch.arange(len(points), device=points.device) if where is None else where
        value, right = self._judge(points, where)
        better = value > self.value[where]
        rows = where[better]
        self.best[rows], self.value[rows], self.broken[rows] = points[better], value[better], right[better] == 0

    def standing(self) -> Tensor:
        """Positions of the images that are not broken."""
        return (~self.broken).nonzero()[:, 0]

    def _judge(self, points: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """What each point is worth, higher is better for the attacker, and how many of its draws were right."""
        labels, stream = self.labels[where], self.stream.at(self.positions[where.cpu()])
        total = torch.zeros(len(points), self.defense.classes, device=points.device)
        votes = torch.zeros_like(total)
        for k in range(self.repeats):
            prediction = self.defense.predict(points, stream.skip(k * max(self.defense.draws, 1)))
            total += prediction.probabilities / self.repeats
            votes += prediction.votes
        # A prediction of one draw errs when that draw errs; one of many, when another class gathers more.
        several = self.defense.draws != 1
        shares = _worth(votes / votes.sum(1, keepdim=True), labels, several) + _worth(total, labels, several)
        # where all of these are saturated, the log still tells near from far
        logs = total.clamp_min(1e-30).log()
        return shares / 2 + 1e-4 * _worth(logs, labels, True), votes.gather(1, labels[:, None])[:, 0]


def _worth(scores: Tensor, labels: Tensor, several: bool) -> Tensor:
    true = scores.gather(1, labels[:, None])
    if not several:
        return -true[:, 0]
    return (scores.scatter(1, labels[:, None], -torch.inf).max(1, keepdim=True).values - true)[:, 0]
