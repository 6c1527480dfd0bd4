"""Whether any `Defense` is one and the same for the attack and the judge, early and late: figures for the audit."""

import torch
from torch import Tensor

from rush_bench.defenses.base import Defense
from rush_bench.defenses.smoothed import positions
from rush_bench.noise import Stream


def modes_apart(defense: Defense, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
    """How far the probability of the label that the gradient's loss implies is from the predicted one, per image (B,).

    Both on the same draws, the defence's own number of them, one image at a time: rounding and a search in bfloat16 aside
    it is 0, for `gradient` promises the loss of the mean probability. Not counted as passes.
    """
    place, before = positions(stream, len(images)), (defense.passes.forwards, defense.passes.backwards)
    apart = []
    for row in range(len(images)):
        own, label, at = images[row : row + 1], labels[row : row + 1], stream.at(place[row : row + 1])
        judged = defense.predict(own, at).probabilities.gather(1, label[:, None])[:, 0]
        attacked = (-defense.gradient(own, label, "ce", max(defense.draws, 1), at).loss).exp()
        apart.append((judged - attacked).abs())
    defense.passes.forwards, defense.passes.backwards = before
    return torch.cat(apart)


def drift(defense: Defense, images: Tensor, labels: Tensor, stream: Stream, calls: int = 64) -> Tensor:
    """How far predictions (B,) are, in total variation, from the same ones on the same draws `calls` calls earlier.

    Between them lie predictions and gradients in turn, of one image each. Not counted as passes.
    """
    before = defense.passes.forwards, defense.passes.backwards
    first = defense.predict(images, stream).probabilities
    for call in range(calls):
        row = slice(call // 2 % len(images), call // 2 % len(images) + 1)
        if call % 2:
            defense.gradient(images[row], labels[row], "ce", 1, stream.named("drift").at(None))
        else:
            defense.predict(images[row], stream.named("drift").at(None))
    late = defense.predict(images, stream).probabilities
    defense.passes.forwards, defense.passes.backwards = before
    return (first - late).abs().sum(1) / 2
