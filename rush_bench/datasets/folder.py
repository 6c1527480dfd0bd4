"""A folder of images, one folder per class, as torchvision's `ImageFolder` has it: `path/cat/1.png`.

With folders `train` and `test` (or `val`) inside it has these parts, both with the classes of `train`, of which `test` need
not have all; without, all of it is `test`. So does a folder `test` (or `val`) that is given itself, beside its `train`.
The parts may have their usual other names, such as `Train` or `test_set`. What begins with a dot is left out.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.datasets.source import Part, Source
from rush_bench.errors import BadInput

DEPTHS = {"L": 1, "LA": 1, "1": 1, "RGB": 3, "RGBA": 3, "P": 3, "CMYK": 3, "YCbCr": 3}  # PIL's modes of 8 bits, to channels
PARTS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}
NOUN = r"([ _-]?(set|split|data|images?))?"  # what often follows them: test_set, trainset, "Training data"
LAYOUT = "train/<class>/*.png and test/<class>/*.png"
ORIENTATION = 0x0112  # EXIF's tag; from 2 to 8 the picture is to be turned or mirrored


def folder_source(path: Path) -> Source:
    """The data set in a folder; its name is the folder's."""
    return Source(path.resolve().name, lambda part, folder: read_folder(path, part))


def read_folder(path: Path, part: str) -> Part | None:
    """One part ("train", "test") of the folder, every image in memory; None for "unlabelled".

    Raises BadInput that names the folder or the file at fault.
    """
    if part == "unlabelled":
        return None
    train = _part(path, "train")
    root = train if part == "train" else _part(path, "test") or _part(path, "val")
    if root is None and part == "train":
        raise BadInput(
            f"{path} has no folder `train`; training needs {path / 'train'} and {path / 'test'}, a folder per class each"
        )
    if root is None and train:
        raise BadInput(f"{path} has a folder `{train.name}` and neither `test` nor `val`; name one of them so")
    root = root or path
    full = path.resolve()
    given_itself = root == path and part_of_name(full.name) in ("test", "val")
    named = (_part(full.parent, "train") if given_itself else train) or root  # whose classes a label counts
    classes = tuple(folder.name for folder in _folders(named))
    if unknown := [folder.name for folder in _folders(root) if folder.name not in classes]:
        raise BadInput(f"{root} has classes that {named} has not: {', '.join(unknown)}; call the folders alike")
    found = _files(root, classes, may_lack=root != named)
    pixels = stack([_pixels(file) for file, _ in found], root)
    return Part(pixels, np.asarray([label for _, label in found]), classes, str(root))


def part_of_name(name: str) -> str | None:
    """The part that a folder of this name usually holds ("train", "test", "val"), in whatever capitals; None for another."""
    return next((part for part, words in PARTS.items() if re.fullmatch(f"({'|'.join(words)}){NOUN}", name.lower())), None)


def _part(path: Path, part: str) -> Path | None:
    """The folder in `path` that holds the part."""
    folders = _folders(path)
    parts = [folder for folder in folders if part_of_name(folder.name)]
    if len(parts) == 1 < len(folders) and parts[0].name not in PARTS:
        return None  # a class that is called so, as `valid` beside `invalid`
    named = [folder for folder in parts if part_of_name(folder.name) == part]
    if len(named) > 1:
        raise BadInput(f"{path} has {named[0].name} and {named[1].name}, either of which may be `{part}`; rename one of them")
    return named[0] if named else None


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, by name."""
    try:
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        return sorted(folders, key=lambda folder: folder.name)
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a folder of images ({error.strerror}); correct that") from error


def _files(root: Path, classes: tuple[str, ...], may_lack: bool) -> list[tuple[str, int]]:
    """Files and their labels, in torchvision's order."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def is_image(file: str) -> bool:
        hidden = any(name.startswith(".") for name in Path(file).relative_to(root).parts)
        return file.lower().endswith(IMG_EXTENSIONS) and not hidden

    number = {name: label for label, name in enumerate(classes)}
    found = make_dataset(root, number, is_valid_file=is_image, allow_empty=True) if classes else []
    for name, label in number.items():
        places = {Path(file).parent for file, of in found if of == label}
        if len(places) > 1 and root / name not in places:
            raise BadInput(
                f"{root / name} holds no images, only folders of them, so that it is hardly a class; name the folders {LAYOUT}"
            )
        if not places and not may_lack:
            raise BadInput(
                f"{root} is no folder of images, one folder per class: {name} holds none ({', '.join(IMG_EXTENSIONS)}); "
                "remove it or give it images"
            )
    if not found:
        raise BadInput(f"{root} is no folder of images, one folder per class: it holds none; name the folders {LAYOUT}")
    return found


def eight_bits(picture: Any, origin: object) -> np.ndarray:
    """A PIL image as uint8 (H, W) or (H, W, 3); BadInput for one of another depth, or that is transparent somewhere."""
    if picture.mode not in DEPTHS:
        raise BadInput(f"{origin} has {picture.mode} pixels, not 8 bits; save it as L or RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA") if picture.mode != "LA" else picture
        if picture.getchannel("A").getextrema()[0] < 255:
            raise BadInput(
                f"{origin} is transparent in places, which leaves its colours there open; put it on a background first "
                "(PIL.Image.alpha_composite) and save it as L or RGB"
            )
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
            pixels = eight_bits(picture, file)  # loads it, by which PIL turns a TIFF upright
            if picture.getexif().get(ORIENTATION) in range(2, 9):
                raise BadInput(
                    f"{file} is to be turned or mirrored by its EXIF orientation, which some programs do and some do not; "
                    "apply it (PIL.ImageOps.exif_transpose) and save the image again"
                )
            return pixels
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{file} cannot be read as an image ({error}); remove it or save it again") from error
