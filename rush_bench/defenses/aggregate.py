"""From the draws of a randomised defence to one row of scores per image: the three ways an attack may average (protocol 5, T4).

All start from per-draw log-probabilities (B, k, K) and end in scores (B, K) that are log-probabilities again:

- mean probability (the default): log of mean_j p_j, RUSH eq. 7;
- `logits`: mean_j of the logits, normalised. Log-probabilities serve: they are the logits less a constant per image and draw;
- `vote`: log of mean_j softmax(beta z_j), which tends to the share of votes as beta grows; `vote:5` sets beta.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rush_bench.defenses.losses import LOSSES, TARGETED, Loss
from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import parse_number

VOTE_SHARPNESS = 10.0  # protocol 5, T4


@dataclass(frozen=True)
class Aggregation:
    """Averages draws. `sharpness` multiplies the logits of a draw first; `geometric` takes the mean of logs, not of shares."""

    sharpness: float = 1.0
    geometric: bool = False

    def each(self, log_p: Tensor) -> Tensor:
        """Per-draw terms (B, k, K) from per-draw log-probabilities."""
        return log_p if self.sharpness == 1 else (self.sharpness * log_p).log_softmax(-1)

    def total(self, each: Tensor) -> Tensor:
        """Sum over draws (B, K), of terms or, in the log domain, of their exponentials."""
        return each.sum(1) if self.geometric else each.logsumexp(1)

    def join(self, total: Tensor, more: Tensor) -> Tensor:
        """The total of two blocks of draws."""
        return total + more if self.geometric else torch.logaddexp(total, more)

    def mean(self, total: Tensor, draws: int) -> Tensor:
        """The mean over `draws` draws, not yet normalised: its slope in a term is `share`."""
        return total / draws if self.geometric else total - math.log(draws)

    def share(self, each: Tensor, mean: Tensor, draws: int) -> Tensor:
        """d mean / d term: (B, k, K), without autograd."""
        if self.geometric:
            return torch.full_like(each, 1 / draws)
        return (each - mean[:, None]).exp() / draws

    def scores(self, mean: Tensor) -> Tensor:
        """Log-probabilities (..., K) from the mean."""
        return mean.log_softmax(-1) if self.geometric else mean


MEAN_PROBABILITY = Aggregation()


def steepened(name: str, by: float) -> str:
    """CE of logits multiplied by a number, if that is not 1 and they are averaged as shares; other losses unchanged."""
    loss, _, averaging = name.partition("@")
    kind, _, number = averaging.partition(":")
    if by == 1 or loss != "ce" or kind not in ("", "vote", "probability"):
        return name
    sharpness = 1.0 if kind != "vote" else float(number or VOTE_SHARPNESS)
    return f"{loss}@vote:{by * sharpness!r}"


def objective_named(name: str, default: Aggregation = MEAN_PROBABILITY, targets: bool = True) -> tuple[Loss, Aggregation]:
    """`ce`, `margin@logits`, `dlr@vote`, `margin-to@vote:5`: the loss and the aggregation; a wrong name is a BadInput.

    `default` is the aggregation of a name without one; without `targets` a loss that needs a target is wrong too.
    """
    loss, _, averaging = name.partition("@")
    known = LOSSES | (TARGETED if targets else {})
    if loss not in known:
        raise unknown_name("loss", loss, known)
    kind, _, number = averaging.partition(":")
    if kind in ("", "probability") and not number:
        return known[loss], MEAN_PROBABILITY if kind else default
    if kind == "logits" and not number:
        return known[loss], Aggregation(geometric=True)
    if kind == "vote":
        sharpness = parse_number(number) if number else VOTE_SHARPNESS
        if not (math.isfinite(sharpness) and sharpness > 0):
            raise BadInput(f"loss {name!r}: the sharpness of the soft vote must be above 0; write {loss}@vote:10")
        return known[loss], Aggregation(sharpness=sharpness)
    raise unknown_name("aggregation", averaging, ["probability", "logits", "vote"])
