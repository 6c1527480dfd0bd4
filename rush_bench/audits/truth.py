"""Whether what is attacked is what is judged: gradients true, predictions the same with and without them and in later calls.

Also whether the images have a say at all, without which no attack has an effect.
"""

import contextlib

import torch
from torch import Tensor

from rush_bench.attacks.best import positions
from rush_bench.attacks.health import FEW, UNTRUE, Health, drawn, health
from rush_bench.audits.finding import Finding, judged, not_run
from rush_bench.defenses import Defense
from rush_bench.errors import RushBenchError
from rush_bench.noise import Stream
from rush_bench.threats import Threat

OURS = "ours: what is attacked must be what is judged"
NO_GRADIENT = (RushBenchError, RuntimeError)  # none is there, or one that is not finite
LOOKED = 16  # images whose gradients are followed
CALLS = 500  # between the two looks at what a defence answers
SAME = 0.05  # of the spread of the scores: beyond what another precision makes of them


def truth(
    defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream, calls: int = CALLS
) -> list[Finding]:
    """These checks of a defence on images (B, C, H, W) with labels (B,)."""
    return [
        depends_on_image(defense, images, stream),
        *true_gradient(defense, images, labels, threat, stream),
        same_under_gradients(defense, images, labels, stream),
        same_in_later_calls(defense, images, labels, stream, calls),
    ]


def depends_on_image(defense: Defense, images: Tensor, stream: Stream) -> Finding:
    """Whether predictions change when the images are exchanged for others while the draws stay the same.

    Labels, votes or scores: the logarithms of the probabilities, whose changes are measured by their spread.
    """
    what = "share of images whose prediction changes when the images are shuffled or inverted, with the same draws"
    before = defense.predict(images, stream)
    changed = torch.zeros(len(images), dtype=torch.bool, device=before.labels.device)
    # inverted too: a single image has none to be exchanged for, and neighbours may be alike
    for others in (images.roll(1, 0), 1 - images):
        after = defense.predict(others, stream)
        changed |= (before.labels != after.labels) | (before.votes != after.votes).any(1)
        changed |= _apart(_scores(before.probabilities), _scores(after.probabilities)) > 1e-3
    source = "ours: otherwise there is nothing for an attack to change"
    return judged("depends-on-image", what, float(changed.double().mean()), ">=", 0.01, source)


def true_gradient(defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> list[Finding]:
    """The gradient against differences of predictions, and pixels that it leaves out; see `rush_bench.attacks.health`."""
    what = f"share of images whose gradient is off by more than {UNTRUE:.0%} from differences of the predictions"
    frozen_what = "mean share of pixels at 0 or 1 that matter and have a gradient of exactly 0"
    source = f"ours: a few may be off by chance (ReLU's kinks, {FEW:.0%} of {LOOKED}); Athalye et al. 2018, section 3"
    some = drawn(stream, len(images))[:LOOKED]
    own, there = stream.at(positions(stream, len(images))[some]), some.to(images.device)
    try:
        found: Health = health(defense, images[there], labels[there], threat, own, looked=LOOKED)
    except NO_GRADIENT as error:
        return [judged("true-gradient", what, 1.0, "<=", FEW, source, note=f"it gives none: {error}")]
    known = found.error[~found.error.isnan()]
    if 2 * len(known) < len(found.error):
        why = f"float32 tells the differences of {len(known)} of {len(found.error)} images from rounding"
        return [not_run("true-gradient", what, source, why)]
    share, note = float((known > UNTRUE).double().mean()), f"median error {float(known.median()):.3f}"
    frozen = float(found.frozen.nanmean())
    advice = "pixels do not leave 0 or 1 by its gradient: leave clamping to the attack" if frozen > 0.05 else ""
    return [
        judged("true-gradient", what, share, "<=", FEW, source, note=note),
        judged("frozen-pixels", frozen_what, frozen, "<=", 0.05, "ours: torch's clamp at its edge, since 2.14", note=advice),
    ]


def same_under_gradients(defense: Defense, images: Tensor, labels: Tensor, stream: Stream, count: int = 8) -> Finding:
    """Whether the scores that a gradient is taken of are those of the prediction, on the same draws, image by image.

    A defence whose gradients carry no scores has its loss compared alone; see `rush_bench.audits.flags.loss_of_the_prediction`.
    """
    what = "share of images whose scores differ between the prediction and the gradient, on the same draws"
    different = []
    for k in range(min(count, len(images))):
        own, image = stream.at(positions(stream, len(images))[k : k + 1]), images[k : k + 1]
        try:
            with_gradient = defense.gradient(image, labels[k : k + 1], "ce", max(defense.draws, 1), own).scores
        except NO_GRADIENT as error:
            return not_run("same-under-gradients", what, OURS, f"no gradient: {error}")
        if with_gradient is None:
            return not_run("same-under-gradients", what, OURS, f"the gradients of {defense.name} carry no scores")
        without = defense.predict(image, own).probabilities
        different.append(float(_apart(_scores(without), _scores(with_gradient.exp()))) > SAME)
    return judged("same-under-gradients", what, sum(different) / len(different), "<=", 0.0, OURS)


def same_in_later_calls(defense: Defense, images: Tensor, labels: Tensor, stream: Stream, calls: int = CALLS) -> Finding:
    """Whether predictions on the same draws are the same after `calls` further calls, for gradients and predictions in turn."""
    what = f"share of images whose prediction is another after {calls} calls, on the same draws"
    before = defense.predict(images, stream)
    place = positions(stream, len(images))
    for call in range(calls):
        row = slice(call // 2 % len(images), call // 2 % len(images) + 1)
        own = stream.at(place[row]).skip(call)
        if call % 2:
            with contextlib.suppress(*NO_GRADIENT):
                defense.gradient(images[row], labels[row], "ce", 1, own)
        else:
            defense.predict(images[row], own)
    after = defense.predict(images, stream)
    apart = _apart(_scores(before.probabilities), _scores(after.probabilities)) > SAME
    share = float(((before.labels != after.labels) | apart).double().mean())
    return judged("same-in-later-calls", what, share, "<=", 0.0, OURS)


def _scores(probabilities: Tensor) -> Tensor:
    """Log-probabilities (B, K) less their mean, where float32 still tells them apart."""
    logs = probabilities.double().clamp_min(1e-30).log()
    return logs - logs.mean(1, keepdim=True)


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """The largest difference of two rows of scores (B, K), in units of the larger spread of the two; (B,)."""
    spread = torch.stack([first.amax(1) - first.amin(1), second.amax(1) - second.amin(1)]).amax(0)
    return (first - second).abs().amax(1) / spread.clamp_min(1e-300)
