"""The same classifier at another scale of its logits, so that no probe depends on the scale that a network happens to have."""

from torch import Tensor

from rush_bench.attacks.health import raw_logits, scores
from rush_bench.defenses import Defense, Network
from rush_bench.noise import Stream

SPREAD = 20.0  # largest less smallest logit of trained networks, where float32's softmax neither saturates nor rounds


def usual_scale(defense: Defense, images: Tensor, stream: Stream) -> Defense:
    """The defence with logits whose median spread on images (B, C, H, W) is SPREAD; its predictions are the same.

    A defence that averages probabilities is another one at another scale, and one that shows no logits has none to scale: both
    come back as they are.
    """
    if not isinstance(defense, Network) or defense.body.outputs != "logits":
        return defense
    one_draw = defense.deterministic and defense.averaged == 1
    if not (one_draw or defense.by_vote or defense.averaging.geometric):
        return defense
    logits = scores(raw_logits(defense), images, stream, 1)
    spread = float((logits.amax(1) - logits.amin(1)).median())
    return defense.with_body(defense.body.variant(gain=SPREAD / spread)) if spread > 0 else defense
