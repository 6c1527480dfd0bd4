"""What published networks do to their inputs first (sources S1.7): constants by name, from the file, or by rule."""

import re
from collections.abc import Sequence
from pathlib import Path

from rush_bench.defenses.published.reading import Tensors
from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import parse_number

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std by channel, of pixels in [0,1]; empty: none
CENTRE = (0.4914, 0.4822, 0.4465)
BY_NAME: dict[str, Constants] = {
    "none": ((), ()),
    "cifar10": (CENTRE, (0.247, 0.243, 0.261)),  # DeACL
    "deepmind": (CENTRE, (0.2471, 0.2435, 0.2616)),  # Rebuffi et al. 2021; their CIFAR-100 is the next
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "solo": (CENTRE, (0.247, 0.2435, 0.2616)),  # solo-learn's augmentations of CIFAR-10
    "solo-stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "cohen": (CENTRE, (0.2023, 0.1994, 0.201)),  # locuslab/smoothing
    "centre": (CENTRE, (1.0, 1.0, 1.0)),  # SmoothAdv's usual
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "halves": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1,1]
}
MEAN_PIXEL = 0.473  # of CIFAR-10's test set
# SmoothAdv's runs that start from ImageNet or use unlabelled images have Cohen's layer, all others centre only (S4.1).
EXTRA = {
    r"imagenet": "ImageNet at 32 x 32 (by the name of the file's folder)",
    r"self[_-]?training": "500k Tiny Images with pseudo-labels (by the name of the file's folder)",
}


def parse(text: str) -> Constants:
    """`imagenet`, `centre`, ... or `0.49,0.48,0.45/0.25,0.24,0.26`, means and deviations by channel."""
    if "/" not in text:
        if text not in BY_NAME:
            raise unknown_name("normalisation", text, BY_NAME)
        return BY_NAME[text]
    parts = text.split("/")
    if len(parts) != 2:
        raise BadInput(f"--normalise {text}: give decimals, means/deviations by channel, such as 0.5,0.5,0.5/0.25,0.25,0.25")
    mean, std = (tuple(float(parse_number(value)) for value in part.split(",")) for part in parts)
    return mean, std


def in_file(own: Tensors, keys: tuple[str, str], title: str) -> Constants:
    """Mean and std that the file states under these keys; they are taken out of `own`."""
    given = [own.pop(key, None) for key in keys]
    if given[0] is None or given[1] is None:
        raise BadInput(f"{title}: {keys[0]} and {keys[1]} are missing, without which its inputs are unknown")
    return tuple(given[0].flatten().tolist()), tuple(given[1].flatten().tolist())


def smoothadv_extra(file: Path) -> str | None:
    """The extra data that the folders of SmoothAdv's checkpoint name; None where they name none."""
    path = file.as_posix().lower()
    return ", ".join(data for word, data in EXTRA.items() if re.search(word, path)) or None


def by_recipe(recipe: str, file: Path) -> tuple[str, str]:
    """Cohen's or SmoothAdv's constants by name, and the note that says why these (they are not in the file)."""
    if recipe == "cohen":
        return "cohen", "normalisation is not in the file: that of locuslab/smoothing was taken; --normalise says otherwise"
    name = "cohen" if smoothadv_extra(file) else "centre"
    why = "names ImageNet or self-training" if name == "cohen" else "names neither ImageNet nor self-training"
    return name, (
        f"normalisation is not in the file: {name!r} was taken, for the path {why} (SmoothAdv centres only, but in "
        "those runs it divides by Cohen's deviations as well); --normalise says otherwise"
    )


def check(mean: Sequence[float], std: Sequence[float]) -> None:
    """S4.2: a guard against constants for 0..255 and against normalising twice."""
    if len(mean) != len(std):
        raise BadInput(f"normalisation mean {list(mean)} and std {list(std)} differ in length; give one of each a channel")
    if not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std, strict=True)):
        raise BadInput(f"normalisation mean {list(mean)}, std {list(std)} are not for images in [0,1]; divide them by 255")
    centre = [(MEAN_PIXEL - m) / s for m, s in zip(mean, std, strict=True)]
    if len(centre) == 3 and any(abs(value) > 0.5 for value in centre):  # grey images may be dark, as digits are
        raise BadInput(
            f"normalisation mean {list(mean)}, std {list(std)} moves a mean pixel to {centre}; "
            "these are not for images in [0,1]"
        )
