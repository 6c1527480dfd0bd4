import dataclasses
import re

import numpy as np
import pytest
import torch

from rush_bench.datasets import as_images
from rush_bench.datasets.images import channels_first
from rush_bench.errors import BadInput


def pixels_and_labels(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    return random.randint(0, 256, (count, 3, 5, 7)).astype(np.uint8), random.randint(0, 4, count)


@pytest.mark.parametrize("kind", ["numpy nchw", "numpy nhwc", "float nhwc", "torch nchw", "torch float", "bfloat16"])
def test_every_layout_and_type_gives_the_same_images(kind: str) -> None:
    pixels, labels = pixels_and_labels()
    if kind == "bfloat16":  # 0 and 1 alone, which it holds exactly
        pixels = (pixels // 128 * 255).astype(np.uint8)
    given = {
        "numpy nchw": pixels,
        "numpy nhwc": pixels.transpose(0, 2, 3, 1),
        "float nhwc": pixels.transpose(0, 2, 3, 1) / 255,
        "torch nchw": torch.from_numpy(pixels),
        "torch float": torch.from_numpy(pixels).float() / 255,
        "bfloat16": (torch.from_numpy(pixels).float() / 255).bfloat16(),
    }[kind]
    images = as_images(given, labels, classes=["a", "b", "c", "d"])
    assert images.pixels.dtype == torch.uint8 and images.pixels.is_contiguous()
    assert images.shape == (3, 5, 7) and len(images) == 12 and images.classes == ("a", "b", "c", "d")
    assert np.array_equal(images.pixels.numpy(), pixels)
    assert images.labels.tolist() == labels.tolist() and images.labels.dtype == torch.int64
    assert images.index.tolist() == list(range(12))


@pytest.mark.parametrize(("rows", "copies"), [(range(12), 0), ([0, 1, 2, 1], 1), ([3, 3, 3, 5, 5], 3), ([], 0), ([7], 0)])
def test_copies_are_counted_whatever_their_labels(rows, copies: int) -> None:
    pixels, _ = pixels_and_labels()
    images = as_images(pixels, list(range(12)))
    images = dataclasses.replace(
        images, pixels=images.pixels[list(rows)], labels=images.labels[: len(rows)], index=images.index[: len(rows)]
    )
    assert images.copies == copies


def test_gray_images_need_no_channel_axis() -> None:
    pixels = pixels_and_labels()[0][:, 0]
    assert np.array_equal(as_images(pixels, [0] * 12).pixels[:, 0].numpy(), pixels)


def test_the_caller_may_change_their_array_afterwards() -> None:
    pixels, labels = pixels_and_labels()
    images = as_images(pixels, labels)
    before = images.pixels.clone()
    pixels[:] = 0
    assert torch.equal(images.pixels, before)


def test_floats_and_take() -> None:
    pixels, labels = pixels_and_labels()
    images = as_images(pixels, labels)
    assert images.floats().dtype == torch.float32
    assert torch.equal(images.floats(slice(2, 5)), torch.from_numpy(pixels[2:5]).float() / 255)
    some = images.take([7, 3])
    assert some.index.tolist() == [7, 3] and some.labels.tolist() == labels[[7, 3]].tolist()
    assert torch.equal(some.pixels, images.pixels[[7, 3]])
    assert images.take(np.array([1])).index.tolist() == [1] and len(images.take(slice(4))) == 4


def test_digest_follows_pixels_labels_index_and_shape_alone() -> None:
    pixels, labels = pixels_and_labels()
    images = as_images(pixels, labels)
    changed = pixels.copy()
    changed[4, 0, 0, 0] ^= 1
    others = [
        as_images(changed, labels),
        as_images(pixels, np.roll(labels, 1)),
        as_images(pixels.reshape(12, 3, 7, 5), labels),
        images.take([1, 0, *range(2, 12)]),
        images.take(slice(11)),
    ]
    assert len({image.digest for image in [images, *others]}) == 6
    assert as_images(pixels / 255, labels, name="another").digest == images.digest
    assert images.take(list(range(12))).digest == images.digest


def broken(**changes: object) -> tuple[object, object]:
    pixels, labels = pixels_and_labels()
    floats = pixels / 255
    if "pixel" in changes:
        floats[5, 1, 2, 3] = changes["pixel"]
    if "label" in changes:
        labels[6] = changes["label"]
    return floats, labels


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (*broken(pixel=1.5), "image 5 has values from .* to 1.5"),
        (*broken(pixel=-0.01), "image 5 has values from -0.01"),
        (*broken(pixel=np.nan), "image 5 .*outside"),
        (broken()[0] * 255, broken()[1], "image 0 .*divided by 255"),  # type: ignore[operator]
        (*broken(label=4), "image 6 has label 4, outside the 4 classes"),
        (*broken(label=-1), "image 6 has label -1"),
        (broken()[0], [0] * 11, r"shape \(12,\)"),
        (broken()[0], [0.0] * 12, "labels are float64"),
        (np.zeros((12, 3, 5, 7), np.int64), [0] * 12, "images are int64"),
        (np.zeros((12, 4, 5, 7), np.uint8), [0] * 12, "1 or 3 channels"),
        (np.zeros((12, 3, 5, 3), np.uint8), [0] * 12, "NCHW and as NHWC"),
        (np.zeros((0, 3, 5, 5), np.uint8), [], "no images"),
        (np.zeros((12, 10), np.uint8), [0] * 12, r"shape \(12, 10\)"),
        (np.ones((12, 3, 5, 7), np.uint8), [0] * 12, "multiply them by 255"),
        (np.full((12, 3, 5, 7), 16, np.uint8), [0] * 12, r"brightest pixel of 12 images is 16.*255 / 16.*floats in \[0,1\]"),
        (np.full((6, 3, 5, 7), 100, np.uint8), [0] * 6, r"brightest pixel of 6 images is 100"),
        (*broken(pixel=1.00002), r"to 1\.00002, outside"),
        (*broken(pixel=-0.00002), r"from -2e-05"),
    ],
)
def test_bad_arrays_name_what_is_wrong(pixels: object, labels: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        as_images(pixels, labels, classes=["a", "b", "c", "d"])


def test_dark_images_are_taken_where_they_say_so() -> None:
    """A handful, or as floats; and one bright pixel is enough."""
    dark = np.full((12, 3, 5, 7), 40, np.uint8)
    assert as_images(dark[:5], [0] * 5).pixels.max() == 40
    assert as_images(dark / 255, [0] * 12).pixels.max() == 40
    dark[3, 1, 2, 3] = 128
    assert as_images(dark, [0] * 12).pixels.max() == 128


def test_what_rounding_leaves_outside_is_clipped() -> None:
    pixels, labels = pixels_and_labels()
    pixels[0, 0, 0, :2] = 0, 255
    floats = (pixels / 255).astype(np.float32)
    floats[0, 0, 0, :2] = -1e-7, 1.0000001
    assert floats.max() > 1 and as_images(floats, labels).digest == as_images(pixels, labels).digest


LEVELS = np.random.default_rng(0).integers(0, 256, (12, 1, 5, 7)).astype(np.uint8)
LEVELS[0, 0, 0, :2] = 0, 255


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (LEVELS / 255, "save them as (images * 255).round().astype('uint8')"),
        (LEVELS / 255 - 1e-7, "save them as (images * 255).round().astype('uint8')"),
        (LEVELS.astype(np.float64), "save them as images.round().astype('uint8')"),
        (LEVELS.astype(np.float32) - 1e-6, "save them as images.round().astype('uint8')"),
        (LEVELS.astype(np.int64), "save them as images.astype('uint8')"),
        (LEVELS.astype(np.uint16), "save them as images.astype('uint8')"),
        (LEVELS.astype(np.uint16) * 257, "save them as (images // 257).astype('uint8')"),
        (LEVELS > 127, "save them as (images * 255).astype('uint8')"),
        ((LEVELS > 127).astype(np.int32), "save them as (images * 255).astype('uint8')"),
        (LEVELS.astype(np.uint16) * 16, None),
        (LEVELS.astype(np.int16) - 128, None),
        (LEVELS / 127.5 - 1, None),
        (LEVELS / 17, None),
        (np.where(LEVELS > 3, LEVELS / 255, np.nan), None),
        (LEVELS.astype(str), None),
    ],
)
def test_the_advice_for_another_type_gives_the_images_themselves(given: np.ndarray, advice: str | None) -> None:
    """What it says is run; where the type and range leave the scale open, no factor is named."""
    with pytest.raises(BadInput, match=r"^mine: images are .*, not uint8; ") as error:
        channels_first(given, "mine")
    said = str(error.value).partition("; ")[2]
    if advice is None:
        assert said.startswith("bring them to 0 (black) to 255 (white) first")
        return
    assert said == advice
    saved = eval(advice.removeprefix("save them as "), {"images": given})
    binary = given.dtype == bool or given.dtype == np.int32
    assert np.array_equal(channels_first(saved, "mine"), np.where(LEVELS > 127, 255, 0) if binary else LEVELS)
    if given.dtype.kind != "f":
        with pytest.raises(
            BadInput, match=re.escape(f"{given.dtype}; give uint8 (0 to 255) or floating point in [0,1], or {advice}")
        ):
            as_images(given, [0] * 12)
