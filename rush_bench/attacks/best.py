"""The best x' of each image so far, judged on draws separate from those of the search (protocol 4)."""

import torch
from torch import Tensor

from rush_bench.defenses import Defense
from rush_bench.defenses.samplers import positions as positions
from rush_bench.devices import wide
from rush_bench.noise import Stream

ENOUGH = 64  # held-apart draws, none of them right: a single draw is right less than once in 21 times (one-sided 95 %)
HOPELESS = 0.05  # with fewer, the mean probability of the label of an image that may leave


class BestSoFar:
    """Keeps the best candidate of each image. The held-apart draws are the same for all candidates: comparisons are paired.

    `points` (B, C, H, W) starts as the images; the first candidate replaces them, whatever its value. `value` (B,) is the
    attacker's value of the best, `broken` (B,) bool whether it is misclassified by a deterministic defence; for a
    randomised one, whether none of its held-apart draws was right and, where these are few, their mean probability of the label
    is below 5 %: a single draw is right about that seldom, and a vote over many next to never. It may leave the search.
    """

    def __init__(self, defense: Defense, images: Tensor, labels: Tensor, stream: Stream, draws: int) -> None:
        self.defense, self.labels, self.stream = defense, labels, stream.named("select")
        self.positions = positions(stream, len(images))
        self.repeats = 1 if defense.deterministic else -(-draws // defense.draws)
        # float64: what tells two points apart may be tiny
        self.points = images.clone()
        self.value = torch.full((len(images),), -torch.inf, device=images.device, dtype=wide(images.device))
        self.broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.everyone = torch.arange(len(images), device=images.device)
        self._placed = self.everyone, self.positions

    def offer(self, points: Tensor, where: Tensor | None = None) -> None:
        """Candidates (n, C, H, W) for the images at positions `where` (n,) of the batch, each at most once; None is all."""
        where = self.everyone if where is None else where
        self.take(points, where, *self._judge(points, where))

    def take(self, points: Tensor, where: Tensor, value: Tensor, broken: Tensor | bool = False) -> None:
        """Candidates that were judged already: what each is worth (n,), and whether it breaks its image."""
        better = value > self.value[where]
        # all rows are written: how many are better is not for the host to wait for
        self.points[where] = torch.where(better[:, None, None, None], points, self.points[where])
        self.value[where] = torch.where(better, value.to(self.value), self.value[where])
        self.broken[where] = torch.where(better, broken, self.broken[where])

    def standing(self) -> Tensor:
        """Positions of the images that are not broken."""
        return (~self.broken).nonzero()[:, 0]

    def places(self, where: Tensor) -> Tensor:
        """Positions in their data set, on the CPU, of the images at these positions of the batch (n,).

        The last answer is kept, so that the host does not wait for it at every step.
        """
        if where is not self._placed[0]:
            self._placed = where, self.positions[where.cpu()]
        return self._placed[1]

    def _judge(self, points: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """What each point is worth, higher is better for the attacker, and whether it breaks its image."""
        labels, stream = self.labels[where], self.stream.at(self.places(where))
        predictions = self.defense.predictions(points, stream, self.repeats, exact=self.defense.deterministic)
        total, votes = predictions.probabilities.mean(0), predictions.votes.sum(0)
        # A prediction of one draw errs when that draw errs; one of many, when another class gathers more.
        several = self.defense.draws != 1
        shares = _attack_value(votes / votes.sum(1, keepdim=True), labels, several) + _attack_value(total, labels, several)
        # where all of these are saturated or rounded, the log still tells near from far
        near = _attack_value(predictions.logs.logsumexp(0), labels, True)
        right, confidence = (scores.gather(1, labels[:, None])[:, 0] for scores in (votes, total))
        broken = right == 0
        if 0 < self.repeats * self.defense.draws < ENOUGH:
            broken &= confidence < HOPELESS
        return shares / 2 + 1e-4 * near / (1 + near.abs()), broken


def _attack_value(scores: Tensor, labels: Tensor, several: bool) -> Tensor:
    true = scores.gather(1, labels[:, None])
    if not several:
        return -true[:, 0]
    return (scores.scatter(1, labels[:, None], -torch.inf).max(1, keepdim=True).values - true)[:, 0]
