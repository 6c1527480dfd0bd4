"""Whether a defence of somebody's own answers by its stream alone, and for each image by itself.

Networks are asked when a defence is made of them (`rush_bench.defenses.probe`); a class with a `predict` of its own is asked
here, with a few of the images that it is to be measured on, before anything is.
"""

import torch
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.defenses import Defense, Prediction, is_network
from rush_bench.defenses.owner import undisturbed
from rush_bench.defenses.probe import differ
from rush_bench.errors import BadInput
from rush_bench.noise import Stream

FEW, FEWER = 8, 4  # images; the second where a prediction averages many draws, in which a draw from elsewhere shows at once
APART = 0.01  # mean distance in total variation that a batch of another size or order may leave, by its rounding


def check_answers(defense: Defense, data: Images) -> None:
    """Refuse a defence whose predictions are no function of the image and the stream; one that fails, fails in its cells."""
    if is_network(defense):
        return
    passes = defense.passes
    before = passes.forwards, passes.backwards
    try:
        with torch.no_grad(), undisturbed(torch.device(defense.device)):
            complaint = _complaint(defense, data)
    except Exception:  # anybody's code
        return
    finally:
        passes.forwards, passes.backwards = before
    if complaint:
        raise BadInput(f"{defense.name}: {complaint}")


def _complaint(defense: Defense, data: Images) -> str | None:
    count = min(FEW if defense.draws <= FEW else FEWER, len(data))
    first, others = list(range(count)), [k % len(data) for k in range(count, 2 * count)]
    whole = _ask(defense, data, first)
    if _differ(whole, _ask(defense, data, first)) or _differ(whole, _ask(defense, data, first)):
        return (
            "the same images and the same stream gave other predictions; take its random numbers from the stream alone, as in "
            "stream.uniform(len(images), draws, (how_many,), images.device), and what it remembers of earlier calls out"
        )
    if defense.deterministic and _differ(whole, _ask(defense, data, first, seed=1)):
        return "draws = 0 says that it draws nothing, but another stream gave other predictions; set draws to its votes"
    if not defense.draws_per_image or count < 2:
        return None
    half = count // 2
    # in a batch of the same size, at the same place, an image is rounded alike: whatever differs comes from its neighbours
    beside = _ask(defense, data, first[:half] + others[half:])
    if _differ(_rows(whole, half), _rows(beside, half)) or all(
        _by_company(defense, data, batch, seed) for batch, seed in ((first, 0), (others, 1))
    ):
        return (
            "its prediction for an image depends on the other images of the batch, on their number or its place among them; "
            "make it a function of the image and of the stream's numbers for it (stream.images are the positions). Where only "
            "its draws depend on the batch, set draws_per_image = False"
        )
    return None


def _by_company(defense: Defense, data: Images, batch: list[int], seed: int) -> bool:
    """Whether images have other predictions in another order, or without the others, by more than rounding."""
    whole, reverse = _ask(defense, data, batch, seed), _ask(defense, data, batch[::-1], seed)
    parts = [(batch[:1], slice(0, 1)), (batch[1:3], slice(1, 3))]
    found = [(Prediction(reverse.labels.flip(0), reverse.votes.flip(0), reverse.probabilities.flip(0)), slice(None))]
    found += [(_ask(defense, data, rows, seed), where) for rows, where in parts]
    return any(
        bool((part.labels != whole.labels[where]).any())
        or float((part.probabilities - whole.probabilities[where]).abs().sum(1).mean()) / 2 > APART
        for part, where in found
    )


def _ask(defense: Defense, data: Images, rows: list[int], seed: int = 0) -> Prediction:
    part = data.take(rows)
    images: Tensor = part.floats().to(defense.device)
    found = defense.predictions(images, Stream(seed, "answers", part.index), 1)
    scores = None if found.scores is None else found.scores[0]
    return Prediction(found.labels[0], found.votes[0], found.probabilities[0], scores)


def _differ(first: Prediction, second: Prediction) -> bool:
    """Whether two predictions for the same rows of batches of one size are others."""
    return not torch.equal(first.labels, second.labels) or differ(first.logs, second.logs)


def _rows(prediction: Prediction, count: int) -> Prediction:
    scores = None if prediction.scores is None else prediction.scores[:count]
    return Prediction(prediction.labels[:count], prediction.votes[:count], prediction.probabilities[:count], scores)
