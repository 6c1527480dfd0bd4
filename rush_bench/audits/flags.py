"""Flags: what a defence does that makes an attack's figures worth little.

AutoAttack's five (Croce and Hein 2020; the checks of its reference implementation) and those of protocol 9. A network in
train mode, one that returns probabilities and one that detaches its input are refused where a `Deterministic` or `Smoothed`
is built; what is looked for here passes those checks, or comes as a `Defense` of the user's own.
"""

import math
import sys
from collections.abc import Sequence
from types import FrameType

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rush_bench.attacks.best import positions
from rush_bench.attacks.health import no_gradient
from rush_bench.audits.finding import Finding, judged, not_run, within_chance
from rush_bench.defenses import Defense, Network
from rush_bench.defenses.body import Body, log_probabilities
from rush_bench.defenses.raw import raw_logits, scores
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream
from rush_bench.records.statistics import clopper_pearson
from rush_bench.threats import Threat

AUTOATTACK = "Croce and Hein 2020, flags of AutoAttack's reference implementation"
# Mean and deviation a channel that training scripts subtract and divide by; of one channel, or of three.
CONSTANTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "0.5 and 0.5": ((0.5,), (0.5,)),
    "MNIST": ((0.1307,), (0.3081,)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0 to 255": ((0.0,), (1 / 255,)),
}


def flags(
    defense: Defense,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    stream: Stream,
    *,
    white_box: ArrayLike | None = None,
    square: ArrayLike | None = None,
    repeats: int | None = None,
) -> list[Finding]:
    """All flags of a defence on images (B, C, H, W) with labels (B,).

    `white_box` and `square` (n,) are accuracies q_i of the images after the worst white-box attack and after Square, from
    records under the same `threat`; `repeats` is how many predictions each q_i is the mean of (None: they are exact).
    """
    return [
        hidden_randomness(defense, images, stream),
        flat_probabilities(defense, images, stream),
        loss_of_the_prediction(defense, images, labels, stream),
        zero_gradients(defense, images, labels, stream),
        square_beats_white_box(threat, white_box, square, repeats),
        gradients_at_inference(defense, images, stream),
        batch_dependence(defense, images, stream),
        other_pixel_range(defense, images, labels, stream),
    ]


def hidden_randomness(defense: Defense, images: Tensor, stream: Stream, calls: int = 5) -> Finding:
    """Whether the output changes between calls though nothing that may change it does.

    A defence with draws=0 is called with streams of several seeds, one with draws > 0 with the same stream: its noise comes
    from the stream alone (protocol 3). The figure is AutoAttack's: the largest L2 distance between outputs of norm 1.
    """
    streams = [stream] * calls
    if defense.deterministic:
        streams = [stream.named(f"call{call}") for call in range(calls)]
    outputs = [_log_probabilities(defense, images, each) for each in streams]
    figure = max(float((first - other).norm(dim=1).max()) for k, first in enumerate(outputs) for other in outputs[:k])
    note = "" if defense.deterministic else f"randomised and says so (draws={defense.draws}): compared on the same draws"
    if figure > 1e-4 and defense.deterministic:
        note = "says draws=0 but is randomised: give it as a Defense with draws > 0 that draws from the stream"
    elif figure > 1e-4:
        note = "randomness besides the stream's: attacks and scores cannot be repeated"
    what = f"largest distance between normalised outputs of {calls} calls on the same input"
    return judged("randomised-output", what, figure, "<=", 1e-4, f"{AUTOATTACK} (check_randomized, alpha)", note=note)


def flat_probabilities(defense: Defense, images: Tensor, stream: Stream) -> Finding:
    """Whether probabilities were taken for logits, which shows at any scale where a network can be looked into.

    Its outputs are then never negative, and add up to the same for every image (softmax), or leave most images with the same
    largest and smallest one (sigmoids). Of a custom defence the softmax of probabilities shows: it never exceeds
    e / (e + K - 1).
    """
    source = "ours: the defect is AutoAttack's flag 'softmax output'"
    bound = math.e / (math.e + defense.classes - 1)
    if isinstance(defense, Network) and defense.body.outputs == "logits":
        found = scores(raw_logits(defense), images, stream, max(defense.draws, 1))
        spread, total = found.amax(1) - found.amin(1), found.sum(1)
        alike = (spread - spread.median()).abs() <= 2e-3 * spread.median()
        same = (total - total.median()).abs() <= 1e-3 * total.median()
        positive = found.amin(1) >= 0
        what = "share of images whose outputs are those of a softmax, or of sigmoids, times a constant"
        own = found / defense.body.gain
        # at the network's own scale a softmax of probabilities stays below a bound, unless a factor hides it
        flat = bool(own.softmax(1).max() <= bound + 1e-4) or bool(spread.median() > 1e3 * defense.body.gain)
        figure = max(float((positive & each).double().mean()) for each in (alike, same)) if flat else 0.0
        return judged("probabilities-for-logits", what, figure, "<=", 0.5, source)
    figure = float(defense.predict(images, stream).probabilities.max())
    note = "no image has a higher one: a softmax over probabilities, or a network sure of nothing" if figure <= bound else ""
    # a softmax of one-hot probabilities reaches the bound up to rounding
    what = "largest mean probability of any class, of which a softmax of probabilities has less"
    return judged("probabilities-for-logits", what, figure, ">=", bound + 1e-4, source, note=note)


def loss_of_the_prediction(defense: Defense, images: Tensor, labels: Tensor, stream: Stream) -> Finding:
    """Whether the loss that attacks climb belongs to the prediction that is scored: exp(-CE) is the probability p_y.

    Gradients of a softmax over probabilities, or of another network than the one that predicts, differ here.
    """
    what = "mean |exp(-CE) - p_y| between the loss under attack and the prediction, on the same draws"
    source = "ours: bfloat16 search stays below; a softmax over probabilities is off by 0.5 and more"
    prediction = defense.predict(images, stream).probabilities.gather(1, labels[:, None])[:, 0]
    try:
        loss = defense.gradient(images, labels, "ce", max(defense.draws, 1), stream).loss
    except RushBenchError as error:  # a gradient that is not finite, which other checks flag
        return not_run("loss-of-the-prediction", what, source, str(error))
    return judged("loss-of-the-prediction", what, float(((-loss).exp() - prediction).abs().mean()), "<=", 0.05, source)


def zero_gradients(defense: Defense, images: Tensor, labels: Tensor, stream: Stream) -> Finding:
    """The share of images without a gradient at the clean point, over the defence's own draws; see `no_gradient`.

    One that is not finite, which a defence may also refuse to give, is none.
    """
    what = "share of images without a gradient, neither of CE nor of the margin of mean logits"
    source = f"{AUTOATTACK} (check_zero_gradients: none)"
    try:
        none, note = no_gradient(defense, images, labels, stream), ""
    except RushBenchError as error:
        if isinstance(error, BadInput):
            raise
        none, note = torch.ones(len(images)), str(error)
    return judged("zero-gradients", what, float(none.double().mean()), "<=", 0.0, source, note=note)


def square_beats_white_box(
    threat: Threat, white_box: ArrayLike | None, square: ArrayLike | None, repeats: int | None = None
) -> Finding:
    """How much accuracy Square takes that white-box attacks left: gradients masked (Croce and Hein 2020, section 5).

    Both are (n,) accuracies q_i. A drop within the error of q_i from `repeats` predictions (2.58 deviations) is none;
    one image of a hundred is within chance of 1 %.
    """
    what = f"accuracy that Square takes from the white-box worst case, {threat.norm} {threat.eps:.4g}"
    source = "ours: 1 %, as a few hundred images cannot tell AutoAttack's 0.2 % of ten thousand (check_square_sr)"
    if white_box is None or square is None:
        missing = "white-box attacks" if white_box is None else "Square"
        return not_run("square-beats-white-box", what, source, f"no records of {missing}; run the attack and audit again")
    before, after = np.asarray(white_box, float), np.asarray(square, float)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise BadInput(f"white_box and square must be (n,) of the same images, not {before.shape} and {after.shape}")
    drop = before - after
    spread = before * (1 - before) + after * (1 - after)
    error = 2.58 * np.sqrt(spread / repeats) if repeats else 0.0
    figure = float(np.where(drop > error, drop, 0.0).mean())
    low, high = clopper_pearson(figure * len(drop), len(drop))
    return within_chance(judged("square-beats-white-box", what, figure, "<=", 0.01, source, low=low, high=high))


def gradients_at_inference(defense: Defense, images: Tensor, stream: Stream) -> Finding:
    """How often one prediction calls autograd: a defence that optimises while it predicts needs an attack through that."""
    codes = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code in codes

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        defense.predict(images[:4], stream.at(positions(stream, len(images))[:4]))
    finally:
        sys.setprofile(before)
    what = "calls of autograd in one prediction"
    return judged("optimises-at-inference", what, float(calls), "<=", 0.0, f"{AUTOATTACK} (check_dynamic: none)")


def batch_dependence(defense: Defense, images: Tensor, stream: Stream) -> Finding:
    """Whether an image's output depends on its neighbours: alone, in reversed order, beside others, with the same draws."""
    what = "largest distance between normalised outputs of an image in different batches, on the same draws"
    source = "ours: ten times AutoAttack's alpha, as other batch sizes take other kernels; BatchNorm in train mode gives 0.1"
    if not defense.draws_per_image:
        why = f"{defense.name} draws inside the network, so that an image's draws are others in another batch"
        return not_run("batch-dependence", what, source, why)
    place = positions(stream, len(images))
    output = _log_probabilities(defense, images, stream.at(place))
    backwards = _log_probabilities(defense, images.flip(0), stream.at(place.flip(0))).flip(0)
    differences = [(output - backwards).norm(dim=1)]
    for row in range(min(4, len(images))):
        own, where = images[row : row + 1], place[row : row + 1]
        negatives = torch.cat([own, 1 - images[:3]])
        for batch, positioned in ((own, where), (negatives, torch.cat([where, place[:3]]))):
            differences.append(
                (output[row : row + 1] - _log_probabilities(defense, batch, stream.at(positioned))[:1]).norm(dim=1)
            )
    return judged("batch-dependence", what, float(torch.cat(differences).max()), "<=", 1e-3, source)


def other_pixel_range(defense: Defense, images: Tensor, labels: Tensor, stream: Stream) -> Finding:
    """How much accuracy rises when the network is fed normalised images or pixels up to 255: normalisation left outside.

    Tries the usual constants, and the mean and deviation of these images; where outputs are not finite the accuracy is 0.
    Needs at least 8 images.
    """
    what = "most that accuracy rises when pixels are shifted and scaled by usual constants"
    source = "ours: 10 points are beyond the chance of 30 images; no network is better on inputs it was not made for"
    if not isinstance(defense, Network):
        why = f"{type(defense).__name__} shows no network to feed; audit it as a Deterministic or Smoothed"
        return not_run("other-pixel-range", what, source, why)
    if len(images) < 8:
        return not_run("other-pixel-range", what, source, f"{len(images)} images are too few; give at least 8")

    def accuracy(mean: Sequence[float], deviation: Sequence[float]) -> float:
        shift, scale = (torch.tensor(values, device=defense.device)[:, None, None] for values in (mean, deviation))

        def rescaled(body: Body, batch: Tensor, exact: bool) -> Tensor:  # noise included
            return log_probabilities(body, (batch - shift) / scale, exact)

        changed = defense.with_body(defense.body.variant(read=rescaled))
        try:
            return float((changed.predict(images, stream).labels == labels).double().mean())
        except RushBenchError:  # outputs that are not finite: the network is not made for these pixels
            return 0.0

    own = (images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).clamp_min(1e-3).tolist())
    fit = {name: pair for name, pair in CONSTANTS.items() if len(pair[0]) in (1, images.shape[1])} | {"these images": own}
    plain, accuracies = accuracy([0.0], [1.0]), {name: accuracy(*pair) for name, pair in fit.items()}
    best = max(accuracies, key=lambda name: accuracies[name])
    note = f"accuracy {plain:.3f} on [0,1], {accuracies[best]:.3f} with the constants of {best}"
    if accuracies[best] - plain > 0.1:
        note += ": put the normalisation into the network"
    return judged("other-pixel-range", what, accuracies[best] - plain, "<=", 0.1, source, note=note)


def _log_probabilities(defense: Defense, images: Tensor, stream: Stream) -> Tensor:
    """Log of the mean probabilities (B, K), each row of norm 1: AutoAttack compares logits so."""
    logs = defense.predict(images, stream).probabilities.clamp_min(1e-30).log()
    return logs / (logs.norm(dim=1, keepdim=True) + 1e-10)
