"""`as_data`: what people have at hand, where it can mean one thing only, as `Images`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

from rush_bench.datasets.folder import eight_bits, stack
from rush_bench.datasets.images import Images, as_images
from rush_bench.datasets.loading import load_dataset
from rush_bench.errors import BadInput

ASKED_TWICE = 20  # images; that many mirrored at random stay undetected once in a million times
KINDS = (
    'rb.load_dataset("cifar10", split="test", n=1000), (x, y), a TensorDataset, a DataLoader or Dataset of (image, label), a '
    "registered name, or the path of an .npz file or of a folder of images"
)


def as_data(data: Any) -> Images:
    """Test images from `Images`, (pixels, labels), a Dataset or DataLoader of (image, label), a name or a path.

    A name or path is the whole test split. A DataLoader is its data set in the order of that, whether it shuffles or not.
    Errors: BadInput for anything else, and where the images are random, of several shapes or outside [0,1].
    """
    if isinstance(data, Images):
        return data
    if isinstance(data, str | Path):
        return load_dataset(str(data), "test")
    if isinstance(data, tuple | list) and len(data) == 2:
        return as_images(*data)
    if isinstance(data, TensorDataset):
        if len(data.tensors) != 2:
            raise BadInput(f"data= takes a TensorDataset of images and labels, not of {len(data.tensors)} tensors")
        return as_images(*data.tensors)
    if isinstance(data, DataLoader):
        batches = data.batch_sampler
        sampler = data.sampler if batches is None else batches.sampler if type(batches) is BatchSampler else batches
        if type(sampler) not in (SequentialSampler, RandomSampler) or len(sampler) != len(data.dataset):  # type: ignore[arg-type]
            raise BadInput(
                f"this DataLoader takes its images by a {type(sampler).__name__}; pass a data set that has just those, as "
                "in torch.utils.data.Subset(dataset, positions)"
            )
        if data.collate_fn not in (default_collate, default_convert):
            raise BadInput(
                "this DataLoader makes its batches by a collate_fn of its own; pass a data set whose items are what it makes"
            )
        return as_data(data.dataset)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return _collected(data)
    raise BadInput(f"data= takes {KINDS}; not {'nothing' if data is None else type(data).__name__}")


def _collected(data: Any) -> Images:
    """The images of a data set whose items are (image, label), PIL or tensor."""
    name = type(data).__name__.lower()
    if not len(data):
        raise BadInput(f"{name} has no images")
    if not (isinstance(data[0], tuple | list) and len(data[0]) == 2):
        raise BadInput(f"the items of {name} must be (image, label); wrap it in a Dataset whose items are so")
    for position in range(min(ASKED_TWICE, len(data))):
        first, again = (_array(data[position][0], name) for _ in range(2))
        if not np.array_equal(first, again):
            raise BadInput(f"{name} gave two images at one position: leave augmentation out of its transform")
    items = [data[position] for position in range(len(data))]
    pixels = stack([_array(image, name) for image, _ in items], name)
    try:
        labels = np.asarray([int(label) for _, label in items])
        if parts := [label for (_, label), number in zip(items, labels, strict=True) if float(label) != number]:
            raise ValueError(f"{parts[0]} is not")
    except (TypeError, ValueError) as error:
        raise BadInput(f"the labels of {name} must be whole numbers, one per image ({error})") from error
    classes = getattr(data, "classes", None)
    known = isinstance(classes, list | tuple) and len(classes) > labels.max()
    return as_images(pixels, labels, classes=[str(label) for label in classes] if known and classes else None, name=name)


def _array(image: Any, name: str) -> np.ndarray:
    if isinstance(image, Tensor | np.ndarray):
        return torch.as_tensor(image).numpy(force=True)
    if hasattr(image, "convert"):  # PIL's
        return eight_bits(image, name)
    raise BadInput(f"the images of {name} are {type(image).__name__}; give tensors, arrays or PIL images")
