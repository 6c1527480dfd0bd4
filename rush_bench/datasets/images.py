"""`Images`: a data set in memory, 8 bits a value, checked once when it is made."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rush_bench.errors import BadInput

CHANNELS = (1, 3)
ROUNDING = 1e-5  # what floats may lie outside [0,1]: undoing a normalisation in float32 leaves a hundredth of that
DARK, HANDFUL = 128, 5  # more images than these, none with a pixel so bright, are hardly of 255 levels


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one split.

    pixels: uint8 (N, C, H, W), contiguous. labels: int64 (N,), -1 where the split has none. index: int64 (N,), the
    position of each image in the official split, which names the image for ever (evaluation noise is keyed by it).
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    classes: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"Images({self.name}, {self.split}, {len(self)} of {size}, {len(self.classes)} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def size(self) -> int | tuple[int, int]:
        """The side of square images, (H, W) of others: what `load_dataset` takes and a network's card says."""
        _, height, width = self.shape
        return height if height == width else (height, width)

    def floats(self, positions: Any = slice(None)) -> Tensor:
        """Images as float32 in [0,1], (B, C, H, W); `positions` is whatever indexes a tensor's first axis."""
        return self.pixels[positions].to(torch.float32).div_(255)

    def take(self, positions: Any) -> "Images":
        """The same data set with these rows only, in this order; `positions` is a slice, a list, an array or a tensor."""
        if not isinstance(positions, slice):
            positions = torch.as_tensor(positions, device=self.pixels.device)
        parts = {key: getattr(self, key)[positions] for key in ("pixels", "labels", "index")}
        return dataclasses.replace(self, **parts)

    def to(self, device: torch.device | str) -> "Images":
        """The same data set with its tensors on a device."""
        return dataclasses.replace(
            self, pixels=self.pixels.to(device), labels=self.labels.to(device), index=self.index.to(device)
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over shape, pixels, labels and index: equal digests are equal data."""
        sha256 = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels, self.index):
            array = tensor.cpu().contiguous().numpy()
            sha256.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
        return sha256.hexdigest()

    @cached_property
    def copies(self) -> int:
        """How many images have the pixels of one before them: an interval takes each as one more that was drawn."""
        if not len(self):
            return 0
        rows = np.ascontiguousarray(self.pixels.cpu().numpy()).reshape(len(self), -1)
        return len(self) - len(np.unique(rows.view(f"V{rows.shape[1]}")))


def as_images(
    pixels: Any, labels: Any, *, classes: Sequence[str] | None = None, name: str = "mine", split: str = "test"
) -> Images:
    """Images of the user's own, from numpy arrays or torch tensors.

    pixels: uint8, or floating point in [0,1]; (N, C, H, W), (N, H, W, C) or (N, H, W), with 1 or 3 channels. Floating
    point is rounded to 8 bits (a change of at most 1/510), and what lies outside [0,1] by rounding alone is clipped. labels:
    integers (N,), 0 to classes - 1; `classes` defaults to the numbers up to the largest label. `name` and `split` are what
    tables call them. Raises BadInput that names the first image at fault, and for uint8 images that are not of 0 to 255.

    Examples:
        >>> import numpy as np, rush_bench as rb
        >>> rb.as_images(np.zeros((3, 8, 8)), [0, 1, 1], classes=["cat", "dog"], name="pets")
        Images(pets, test, 3 of 1x8x8, 2 classes)
    """
    array, targets = _to_numpy(pixels, name), _to_numpy(labels, name)
    given = array.dtype
    array = channels_first(array if given == np.uint8 else _eight_bits(array, name), name)
    if given == np.uint8:
        check_levels(array, name)
    if classes is None and targets.dtype.kind in "iu" and targets.size:
        classes = [str(k) for k in range(int(targets.max()) + 1)]
    targets = check_labels(targets, len(array), tuple(classes or ()), name)
    return Images(
        pixels=torch.from_numpy(np.array(array, order="C")),
        labels=torch.from_numpy(targets),
        index=torch.arange(len(array)),
        classes=tuple(classes or ()),
        name=name,
        split=split,
    )


def channels_first(array: np.ndarray, origin: str) -> np.ndarray:
    """A view (N, C, H, W) of uint8 images, 0 to 255, in NCHW, NHWC or NHW order; else a BadInput naming `origin`."""
    if array.dtype != np.uint8:
        raise BadInput(f"{origin}: images are {array.dtype}, not uint8; {_to_save_as(array)}")
    if array.ndim == 3:
        array = array[:, None]
    first, last = (array.ndim == 4 and array.shape[axis] in CHANNELS for axis in (1, 3))
    if not (first or last):
        raise BadInput(
            f"{origin}: images have shape {array.shape}; give (N, C, H, W), (N, H, W, C) or (N, H, W) with 1 or 3 channels"
        )
    if first and last:
        raise BadInput(f"{origin}: shape {array.shape} can be read as NCHW and as NHWC; give images larger than 3 pixels")
    if 0 in array.shape:
        raise BadInput(f"{origin}: shape {array.shape} holds no images; give at least one")
    if array.max() == 1:
        raise BadInput(f"{origin}: images are uint8 of 0 and 1 alone, nearly black at 255 levels; multiply them by 255")
    return array if first else array.transpose(0, 3, 1, 2)


def check_levels(array: np.ndarray, origin: str) -> None:
    """Refuse uint8 images that are hardly of 255 levels, but for a handful."""
    if len(array) > HANDFUL and 0 < (most := int(array.max())) < DARK:
        raise BadInput(
            f"{origin}: the brightest pixel of {len(array)} images is {most}, and uint8 has white at 255; scale them, such as "
            f"(images * (255 / {most})).round().astype('uint8'), or give rb.as_images floats in [0,1]: images / {most}, or "
            "images / 255 where they are so dark"
        )


def check_labels(labels: np.ndarray, count: int, classes: tuple[str, ...], origin: str) -> np.ndarray:
    """Labels as int64 (N,), one per image and each a class; anything else is a BadInput that names the image."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise BadInput(
            f"{origin}: labels are {labels.dtype} of shape {labels.shape}; give one integer per image, shape ({count},)"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise BadInput(
            f"{origin}: image {wrong[0]} has label {labels[wrong[0]]}, outside the {len(classes)} classes "
            f"(0 to {len(classes) - 1}); correct the label or give all classes"
        )
    return labels.astype(np.int64)


def _to_numpy(values: Any, origin: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise BadInput(
            f"{origin}: images and labels are no arrays ({error}); give (pixels, labels), images of one shape"
        ) from error


def _to_save_as(array: np.ndarray) -> str:
    """How to save images of another type as uint8, by type and range: the wrong factor wraps around, unseen afterwards."""
    numbers = array.dtype.kind in "biuf" and array.size
    low, high = (array.min(), array.max()) if numbers else (-1, -1)
    rounded = ".round()" if array.dtype.kind == "f" else ""
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return f"save them as (images * 255){rounded}.astype('uint8')"
    if low >= -ROUNDING and DARK <= high <= 255:
        return f"save them as images{rounded}.astype('uint8')"
    if array.dtype == np.uint16 and high >= DARK * 257:  # less may be of 10 or 12 bits
        return "save them as (images // 257).astype('uint8')"
    return f"bring them to 0 (black) to 255 (white) first, then save them as images{rounded}.astype('uint8')"


def _eight_bits(array: np.ndarray, origin: str) -> np.ndarray:
    if array.dtype.kind != "f":
        raise BadInput(
            f"{origin}: images are {array.dtype}; give uint8 (0 to 255) or floating point in [0,1], or {_to_save_as(array)}"
        )
    flat = array.reshape(array.shape[0] if array.ndim and array.size else 1, -1)
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~((flat >= -ROUNDING) & (flat <= 1 + ROUNDING)).all(axis=-1))
    if len(wrong):
        low, high = flat[wrong[0]].min(), flat[wrong[0]].max()
        raise BadInput(
            f"{origin}: image {wrong[0]} has values from {low:.8g} to {high:.8g}, outside [0,1]; "
            "give pixels before any normalisation, divided by 255 if they are 0 to 255"
        )
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
