"""Whether records are of the defence at hand: the key of a cell has a network's weights, but not the code around them.

A JPEG layer and a layer that kills gradients have no weights, so two networks may share a key. Beside the first records of a
defence on a data set lies what it did with a few of its images; a defence of that key which does something else is refused.

These are the first IMAGES, then one image of each class that is not among them, up to OTHERS: an edit may touch one class
alone. The first are compared in probabilities, in the scores of all classes (one that is masked has lost them on images of the
others, too) and in gradients; the rest in probabilities alone. An edit that touches other images only cannot be seen: whoever
edits the code of a network gives another folder.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.defenses import Defense
from rush_bench.defenses.base import UNKNOWN_LOSS
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.files import digest, read_json, write_json
from rush_bench.noise import Stream

IMAGES = 8
OTHERS = 24  # at most; spread over the classes where there are more
DIRECTIONS = 16  # that a gradient is kept by: its products with fixed random signs
# What another device, batch size or precision of the search moves: probabilities by 1e-4, so their logs by as much of 1;
# the gradient's norm by a tenth and its direction, in bfloat16, to a cosine of 0.98.
APART = 0.01  # mean distance in total variation
LOGS_APART = 0.02  # mean distance of log(p + FLOOR), as a share of its range: what total variation misses of sure networks
FLOOR = 1e-3
SCORES_APART = (
    0.1  # median distance of a class's log-probability, as a share of how far it is from the best to the median class
)
TINY = 1e-3  # and what more that distance may be, where all classes are nearly as likely
LEAST = 1e-30  # of a probability, for its logarithm: what older files hold in place of scores
FADED = 0.5  # of the gradient's norm, mean over the images
TURNED = 0.8  # cosine of the gradient with what it was, mean over the images
HALVES = 3.0  # times the distance between two halves of the draws, where a defence's draws are others on another device

Array = NDArray[np.float64]


class Changed(BadInput):
    """The defence does not do what one of the same key did, of which there are records."""


def sample_of(data: Images) -> Images:
    """The images by which a defence on this data is known: the first IMAGES, then the first of each class not among them."""
    labels = data.labels.tolist()
    first = {label: k for k, label in reversed(list(enumerate(labels)))}
    others = sorted(first.keys() - set(labels[:IMAGES]))
    if len(others) > OTHERS:
        others = [others[k * len(others) // OTHERS] for k in range(OTHERS)]
    return data.take([*range(min(IMAGES, len(data))), *sorted(first[label] for label in others)])


def check_behaviour(folder: Path, defense: Defense, sample: Images) -> None:
    """Compare a defence with what `<folder>/behaviour` has under its identity, or write that down; Changed if it differs.

    The first IMAGES of the sample have one file, as in folders from before 2026-11-27, and the others another.
    Whatever a defence raises on the sample goes through: then nothing can be said of its records.
    """
    _check_part(folder, defense, sample.take(slice(0, IMAGES)), gradients=True)
    if len(sample) > IMAGES:  # too few for the direction of a gradient, which bfloat16 turns, and more than their cost is worth
        _check_part(folder, defense, sample.take(slice(IMAGES, None)), gradients=False)


def _check_part(folder: Path, defense: Defense, part: Images, gradients: bool) -> None:
    path = Path(folder) / "behaviour" / f"{digest([defense.identity(), part.digest])[:16]}.json"
    now = _behaviour(defense, part, gradients)
    if not path.exists():
        write_json(path, {"defense": defense.name, **now})
        return
    before = read_json(path)
    try:
        differs, known = difference(before, now), before["defense"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Changed(f"{path} is damaged ({error!r}); delete it, and the records of {defense.name} with it") from error
    if differs:
        raise Changed(
            f"{defense.name} does not do what {known!r} did, of which {folder} has records under the same key: "
            f"{differs} differ. Code was changed that has no weights (a layer, a transform, a Defense); give another folder "
            f"with --out, or delete the old records and {path.name} in {path.parent}"
        )


def _behaviour(defense: Defense, sample: Images, gradients: bool) -> dict[str, Any]:
    """What a defence does with a few images, JSON-able; its passes are not counted.

    `probabilities` (B, K), where it draws inside its network of eight predictions (`halves`: of four and four); `scores`, the
    log-probabilities (B, K) where they follow from logits; `gradient`, the norms of that of CE (B,), and `margin`, the margin's
    own as products (B, DIRECTIONS); None without a gradient, or where that was not asked for.
    """
    images, labels = sample.floats().to(defense.device), sample.labels.to(defense.device)
    stream, passes = Stream(0, "behaviour", sample.index), (defense.passes.forwards, defense.passes.backwards)
    times = 1 if defense.draws_per_image else 8
    predictions = [defense.predict(images, stream.skip(k * defense.draws)) for k in range(times)]
    stacked = torch.stack([each.probabilities for each in predictions]).to(torch.float64).cpu()
    found: dict[str, Any] = {"probabilities": stacked.mean(0).tolist()}
    body = getattr(defense, "body", None)  # probabilities may be 0 or a hair more: their logarithms are far apart
    if gradients and all(each.scores is not None for each in predictions) and getattr(body, "outputs", "") != "probabilities":
        logs = torch.stack([each.logs.to(torch.float64).cpu() for each in predictions]).logsumexp(0) - math.log(times)
        found["scores"] = logs.clamp_min(-1e30).tolist()  # JSON has no infinity
    if not defense.draws_per_image:
        found |= {"halves": [stacked[k::2].mean(0).tolist() for k in (0, 1)], "where": _where(defense)}
    if not gradients:
        defense.passes.forwards, defense.passes.backwards = passes
        return found | {"gradient": None}
    try:
        ce, margin = (
            defense.gradient(images, labels, loss, max(defense.draws, 1), stream).gradient for loss in ("ce", "margin")
        )
        found["gradient"] = ce.flatten(1).norm(dim=1).tolist()
        if defense.draws_per_image:  # on other draws the direction is another
            found["margin"] = _products(margin)
    except (RushBenchError, RuntimeError, *UNKNOWN_LOSS):
        found["gradient"] = None
    defense.passes.forwards, defense.passes.backwards = passes
    return found


def _where(defense: Defense) -> str:
    """On what a network that draws from torch's global generator draws the same."""
    return f"{defense.device.type}, torch {torch.__version__}"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words; empty where nothing does."""
    first, second = (np.asarray(each["probabilities"], float) for each in (before, now))
    if first.shape != second.shape:
        return "its classes"
    other_draws = before.get("where") != now.get("where")
    spreads = [_distances(*np.asarray(each["halves"], float)) for each in (before, now) if other_draws]
    allowed = np.array([APART, LOGS_APART]) + HALVES * np.max([*spreads, np.zeros(2)], axis=0)
    if not np.all(_distances(first, second) <= allowed):
        return "probabilities"
    if not other_draws and _scores_apart(before, now):
        return "scores of classes"
    if (before["gradient"] is None) != (now["gradient"] is None):
        return "gradients"
    if now["gradient"] is None:
        return ""
    sizes = [float(np.mean(np.asarray(each["gradient"], float))) for each in (before, now)]
    if min(sizes) < FADED * max(sizes):
        return "sizes of gradients"
    if (
        "margin" in before
        and "margin" in now
        and not _cosine(*(np.asarray(each["margin"], float) for each in (before, now))) >= TURNED
    ):
        return "directions of gradients"
    return ""


def _scores_apart(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a class's scores are others: of most images, since rounding may move those of one.

    Where one file is older than scores, both are taken from the probabilities.
    """
    given = [each["scores"] for each in (before, now) if "scores" in each]
    if not given:
        return False
    if len(given) == 1:
        given = [np.log(np.maximum(np.asarray(each["probabilities"], float), LEAST)) for each in (before, now)]
    first, second = (np.asarray(each, float) for each in given)
    spread = min(float(np.median(each.max(1) - np.median(each, axis=1))) for each in (first, second))
    apart = np.median(np.abs(first - second), axis=0)  # by class
    return not np.all(apart <= TINY + SCORES_APART * spread)


def _products(gradient: Tensor) -> list[list[float]]:
    """A gradient (B, C, H, W) by its products with fixed random signs (B, DIRECTIONS)."""
    flat = gradient.flatten(1).double().cpu()
    stream = Stream(0, "behaviour/directions", torch.zeros(1, dtype=torch.int64))
    signs = (stream.uniform(1, DIRECTIONS, (flat.shape[1],))[0].double() - 0.5).sign()
    return (flat @ signs.T).nan_to_num(0, 0, 0).tolist()


def _distances(first: Array, second: Array) -> Array:
    """Mean distance of probabilities (B, K) in total variation, and of their floored logs as a share of the range."""
    logs = np.abs(np.log(first + FLOOR) - np.log(second + FLOOR)).mean() / np.log(1 / FLOOR)
    return np.array([np.abs(first - second).sum(1).mean() / 2, logs])


def _cosine(first: Array, second: Array) -> float:
    """Mean cosine between rows; 1 where both are zero, 0 where one is."""
    sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    same = ~(first.any(1) | second.any(1))
    return float(np.mean(np.where(same, 1.0, (first * second).sum(1) / np.where(sizes > 0, sizes, 1.0))))
