"""The same classifier at another scale of its logits, so that no probe depends on the scale that a network happens to have."""

from torch import Tensor

from rush_bench.defenses import Defense, Network
from rush_bench.defenses.aggregate import APART
from rush_bench.defenses.body import usual_spread
from rush_bench.defenses.raw import raw_logits, scores
from rush_bench.noise import Stream


def usual_scale(defense: Defense, images: Tensor, stream: Stream) -> Defense:
    """The defence with logits that are APART apart on images (B, C, H, W), as trained networks have them; the same predictions.

    A defence that averages probabilities is another one at another scale, and one that shows no logits has none to scale: both
    are returned unchanged.
    """
    if not isinstance(defense, Network) or defense.body.outputs != "logits":
        return defense
    one_draw = defense.deterministic and defense.averaged == 1
    if not (one_draw or defense.by_vote or defense.averaging.geometric):
        return defense
    spread = usual_spread(scores(raw_logits(defense), images, stream, 1))
    return defense.with_body(defense.body.variant(by=APART / spread)) if spread > 0 else defense
