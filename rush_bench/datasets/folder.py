"""A folder of images, one folder per class, as torchvision's `ImageFolder` has it: `path/cat/1.png`.

With folders `train` and `test` (or `val`) inside it has these parts, both with the classes of `train`, of which `test` need
not have all; without, all of it is `test`. So does a folder `test` (or `val`) that is given itself, beside its `train`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets.source import Part, Source
from rush_bench.errors import BadInput

DEPTHS = {"L": 1, "LA": 1, "1": 1, "RGB": 3, "RGBA": 3, "P": 3, "CMYK": 3, "YCbCr": 3}  # PIL's modes of 8 bits, to channels


def folder_source(path: Path) -> Source:
    """The data set in a folder; its name is the folder's."""
    return Source(path.resolve().name, lambda part, folder: read_folder(path, part))


def read_folder(path: Path, part: str) -> Part | None:
    """One part ("train", "test") of the folder, every image in memory; None for "unlabelled".

    Raises BadInput that names the folder or the file at fault.
    """
    if part == "unlabelled":
        return None
    splits = {"train": ("train",), "test": ("test", "val")}
    root = next((path / name for name in splits[part] if (path / name).is_dir()), None)
    if root is None and part == "train":
        raise BadInput(
            f"{path} has no folder `train`; training needs {path / 'train'} and {path / 'test'}, a folder per class each"
        )
    root = root or path
    if root == path and (path / "train").is_dir():
        raise BadInput(f"{path} has a folder `train` and neither `test` nor `val`; name one of them so")
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes

    beside = path if root != path or path.name not in splits["test"] else path.resolve().parent
    named = beside / "train" if (beside / "train").is_dir() else root  # whose classes a label counts
    try:
        classes, number = find_classes(named)
        found = ImageFolder(str(root), allow_empty=root != named)
    except (FileNotFoundError, OSError) as error:
        raise BadInput(f"{root} is no folder of images, one folder per class: {' '.join(str(error).split())}") from error
    if unknown := [name for name in found.classes if name not in number]:
        raise BadInput(f"{root} has classes that {named} has not: {', '.join(unknown)}; call the folders alike")
    if not found.samples:
        raise BadInput(f"{root} holds no images")
    pixels = stack([_pixels(file) for file, _ in found.samples], root)
    labels = [number[found.classes[label]] for _, label in found.samples]
    return Part(pixels, np.asarray(labels), tuple(classes), str(root))


def eight_bits(picture: Any, origin: object) -> np.ndarray:
    """A PIL image as uint8 (H, W) or (H, W, 3); BadInput for one of another depth."""
    if picture.mode not in DEPTHS:
        raise BadInput(f"{origin} has {picture.mode} pixels, not 8 bits; save it as L or RGB")
    return np.asarray(picture.convert("L" if DEPTHS[picture.mode] == 1 else "RGB"))


def stack(images: list[np.ndarray], origin: object) -> np.ndarray:
    """Images of one shape as one array; where some are grey and some are not, the grey ones get three channels."""
    if len({image.ndim for image in images}) > 1:
        images = [np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image for image in images]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise BadInput(f"{origin} has images of {len(shapes)} shapes, {shapes[0]} and {shapes[-1]}; resize them to one")
    return np.stack(images)


def _pixels(file: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return eight_bits(picture, file)
    except OSError as error:
        raise BadInput(f"{file} cannot be read as an image ({error}); remove it or save it again") from error
