"""Pseudo-labels by k-means: on features of our own encoder, or read from a file (sources S2.4, S2.12)."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.errors import BadInput
from rush_bench.files import pickled_labels
from rush_bench.training.seeds import derive

ITERATIONS = 50


@torch.no_grad()
def kmeans(points: Tensor, count: int, seed: int, iterations: int = ITERATIONS) -> Tensor:
    """Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007): the cluster of each point, int64 (N,).

    points (N, D). Stops after `iterations`, or when nothing moves. An empty cluster takes the point farthest from its own
    centre. The draws come from the seed alone. BadInput for more clusters than points.
    """
    if not 1 <= count <= len(points):
        raise BadInput(f"{count} clusters of {len(points)} images; give at most as many clusters as images")
    generator = torch.Generator().manual_seed(derive(seed, "kmeans", count))
    centres = points[_first_centres(points, count, generator)].clone()
    label = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        distance, nearest = _nearest(points, centres)
        if torch.equal(nearest, label):
            break
        label = nearest
        sizes = torch.bincount(label, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        centres = sums / sizes.clamp_min(1).unsqueeze(1)
        empty = torch.nonzero(sizes == 0).flatten()
        centres[empty] = points[distance.topk(max(1, len(empty))).indices[: len(empty)]]
    return label


def _first_centres(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Indices of k-means++ centres: each drawn with a probability in proportion to its squared distance to the last."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen, squared_distance = [first], (points - points[first]).square().sum(1)
    for _ in range(count - 1):
        weights = squared_distance.double().cpu()
        uniform = torch.ones_like(weights).index_fill_(0, torch.tensor(chosen), 0)  # where all that is left coincides
        index = int(torch.multinomial(weights if float(weights.sum()) > 0 else uniform, 1, generator=generator))
        chosen.append(index)
        squared_distance = torch.minimum(squared_distance, (points - points[index]).square().sum(1))
    return chosen


def _nearest(points: Tensor, centres: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centre, up to rounding, and which it is: (N,) each."""
    squared_norms = centres.square().sum(1)
    parts = [(squared_norms - 2 * part @ centres.T).min(1) for part in points.split(chunk)]
    return torch.cat([p.values for p in parts]) + points.square().sum(1), torch.cat([p.indices for p in parts])


def pseudo_labels(features: Tensor, counts: Iterable[int], seed: int) -> dict[str, Tensor]:
    """A clustering of the features (N, D) for each count of clusters: `{"10": int64 (N,), ...}`."""
    return {str(count): kmeans(features.float(), count, seed) for count in counts}


def read_pseudo_labels(path: Path, counts: Iterable[int], images: Images, least: int, most: int | None) -> dict[str, Tensor]:
    """Labels of the images from an `.npz` file with an integer array `pseudo_train_K` for each K of `counts`.

    Arrays are in the order of the official training split, which has `least` to `most` images (None: not known);
    `images.index` chooses. BadInput for a file that cannot be read, a missing array, another length, or labels outside 0..K-1.
    """
    if path.suffix in (".pkl", ".pickle"):
        raise pickled_labels(path)
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no .npz file of plain arrays"
        raise BadInput(
            f"pseudo-label file {path} cannot be read: {reason}; give an .npz with one array pseudo_train_K for each K"
        ) from error
    chosen = {}
    for count in counts:
        name = f"pseudo_train_{count}"
        if name not in arrays:
            raise BadInput(f"pseudo-label file {path} has no array {name!r}; it has {', '.join(arrays) or 'none'}")
        labels = arrays[name]
        right_length = labels.ndim == 1 and least <= len(labels) <= (len(labels) if most is None else most)
        if labels.dtype.kind not in "iu" or not right_length:
            raise BadInput(
                f"{path}: {name} is {labels.dtype} of shape {labels.shape}; {images.name} needs one integer for each of "
                f"its {least}{'' if most == least else ' or more'} training images, in the official order"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            raise BadInput(f"{path}: {name} has label {labels[wrong[0]]} for image {wrong[0]}; give 0 to {count - 1}")
        selected = labels.astype(np.int64)[images.index.cpu().numpy()]
        chosen[str(count)] = torch.from_numpy(selected).to(images.labels.device)
    return chosen
