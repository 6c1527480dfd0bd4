"""From the draws of a randomised defence to one row of scores per image: the three ways an attack may average (protocol 5, T4).

All start from per-draw log-probabilities (B, k, K) and end in scores (B, K) that are log-probabilities again:

- mean probability (the default): log of mean_j p_j, RUSH eq. 7;
- `logits`: mean_j of the logits, normalised. Log-probabilities serve: they are the logits less a constant per image and draw;
- `vote`: log of mean_j softmax(beta z_j), which tends to the share of votes as beta grows; `vote:5` sets beta.

`steep` is the defence's own, of logits that are at least APART apart where the attack began (`steep:5`: of the soft vote, and
at least 5 times as large). Where a softmax gives all classes a share, CE pushes towards the mean of the others
(benchmarks/steepness.py).
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rush_bench.defenses.losses import LOSSES, TARGETED, Loss
from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import parse_number

VOTE_SHARPNESS = 10.0  # protocol 5, T4
SHARPEST = 1e6  # beyond it float32's exponentials leave nothing of a difference
FAINTEST = 1e-30  # of a difference of logits, so that nothing is divided by 0
APART = 20.0  # largest logit less smallest: networks trained at length have so much, adversarially trained ones 2 to 6


@dataclass(frozen=True)
class Aggregation:
    """Averages draws. `sharpness` multiplies the logits of a draw first, one number or one for each image (B, 1, 1); if `late`,
    those of the mean. `geometric` takes the mean of logs, not of shares. `apart`: how far apart the sharpness must take the
    logits of an image (see `sharpened`)."""

    sharpness: float | Tensor = 1.0
    geometric: bool = False
    apart: float = 0.0
    late: bool = False

    @property
    def by_draw(self) -> bool:
        """Whether the mean of the terms is that of the draws' shares, and nothing is done to it."""
        return not self.geometric and not (self.late and self._sharp)

    @property
    def _sharp(self) -> bool:
        return isinstance(self.sharpness, Tensor) or self.sharpness != 1

    def sharpened(self, spread: Tensor) -> "Aggregation":
        """For images whose logits usually are so far apart (B,): sharper where they would be less than `apart` apart."""
        factor = (self.apart / spread.clamp_min(FAINTEST)).clamp_min(self.sharpness)[:, None, None]
        return dataclasses.replace(self, sharpness=factor, apart=0.0)

    def of(self, rows: slice) -> "Aggregation":
        """The same for some of the images."""
        return dataclasses.replace(self, sharpness=self.sharpness[rows]) if isinstance(self.sharpness, Tensor) else self

    def each(self, log_p: Tensor) -> Tensor:
        """Per-draw terms (B, k, K) from per-draw log-probabilities."""
        return (self.sharpness * log_p).log_softmax(-1) if self._sharp and not self.late else log_p

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
        if self.late and self._sharp:
            by = self.sharpness[:, 0] if isinstance(self.sharpness, Tensor) else self.sharpness
            return (by * mean).log_softmax(-1)
        return mean.log_softmax(-1) if self.geometric else mean


MEAN_PROBABILITY = Aggregation()


def steepened(name: str) -> str:
    """CE of logits that are at least APART apart; losses that know no scale, and averages that are named, unchanged."""
    loss, _, averaging = name.partition("@")
    kind, _, number = averaging.partition(":")
    if loss != "ce" or kind not in ("", "vote"):
        return name
    return f"{loss}@steep" if not kind else f"{loss}@steep:{number or VOTE_SHARPNESS}"


def objective_named(name: str, default: Aggregation = MEAN_PROBABILITY, targets: bool = True) -> tuple[Loss, Aggregation]:
    """`ce`, `margin@logits`, `ce@steep`, `margin-to@vote:5`: the loss and the aggregation; a wrong name is a BadInput.

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
    if kind in ("vote", "steep"):
        sharpness = parse_number(number) if number else VOTE_SHARPNESS if kind == "vote" else 1.0
        if not 0 < sharpness <= SHARPEST:
            raise BadInput(
                f"loss {name!r}: the sharpness of the soft vote must be above 0, at most {SHARPEST:g}; write {loss}@{kind}:10"
            )
        if kind == "vote" or number:
            return known[loss], Aggregation(sharpness=sharpness, apart=APART * (kind == "steep"))
        return known[loss], dataclasses.replace(default, apart=APART)
    raise unknown_name("aggregation", averaging, ["probability", "logits", "vote", "steep"])
