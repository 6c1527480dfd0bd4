"""What a defence decides by, before a softmax rounds it."""

import torch
from torch import Tensor

from rush_bench.defenses.base import Defense
from rush_bench.defenses.body import blocks
from rush_bench.defenses.smoothed import Network, is_network
from rush_bench.noise import Stream


def raw_logits(defense: Defense) -> Defense:
    """The same defence with logits in place of log-probabilities; itself where it is not made of a network of ours, or predicts
    otherwise than the network does."""
    if not is_network(defense):
        return defense
    return defense.with_body(defense.body.variant(read=lambda body, batch, exact: body.outcome(batch, exact=exact)))


def in_float32(defense: Defense) -> Defense:
    """The same defence, its search in float32; itself where it is not made of a network of ours."""
    if not isinstance(defense, Network) or defense.precision == "float32":
        return defense
    return defense.with_body(defense.body.variant(precision="float32"))


def scores(raw: Defense, points: Tensor, stream: Stream, draws: int) -> Tensor:
    """What judges, (P, K) in float64: mean logits of a network of ours (`raw_logits`), else the log of the mean probability."""
    if not is_network(raw):
        return raw.predict(points, stream).logs.double()
    forward = raw.sampler.forward(raw.body, stream, len(points))
    draws = raw.averaged if raw.deterministic else draws
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for i, j in blocks(len(points), draws, raw.body.block(draws)):
            part = forward(points[i].to(raw.device), i, j, True).double().sum(1) / draws
            rows[i.start] = rows[i.start] + part if i.start in rows else part
    return torch.cat(list(rows.values())).clone()
