"""Random views of images: whole batches on their device, each image with its own draw, no host sync, few launches.

Images are floating point in [0,1], (B, C, H, W), in and out. Randomness comes from the generator alone. Every function
is split into what is drawn (`*_draws`) and what is done with it, so that either can be checked against torchvision,
whose laws these are. torchvision works on 8-bit PIL images and rounds after every step; here nothing is rounded.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rush_bench.datasets.color import JITTER_NUMBERS, apply_jitter, color_jitter, gray, jitter_from, random_gray
from rush_bench.errors import BadInput

Interpolation = Literal["bilinear", "bicubic"]
TRIES = 10  # of RandomResizedCrop, before it falls back to the centre
CROP_NUMBERS = 2 * TRIES + 3  # uniform numbers that a crop and flip takes
VIEW_NUMBERS = CROP_NUMBERS + JITTER_NUMBERS + 1  # and a whole view
RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop


class CropDraws(NamedTuple):
    """Boxes of whole pixels, held as float32, and who is mirrored.

    start (2, B): top and left. length (2, B): height and width. flip (B,): bool.
    """

    start: Tensor
    length: Tensor
    flip: Tensor


@dataclass(frozen=True)
class SimCLRViews:
    """The SimCLR family of views: crop, flip, colour jitter, gray, in this order (RUSH paper, appendix A).

    No blur and no normalisation; RUSH's noise comes after it, from the recipe. The crop floor is RUSH's and RoCL's .08;
    ACL has .1 with bicubic interpolation, AdvCL .2 (sources S1.3). `jitter` is brightness, contrast, saturation, hue.
    """

    crop_floor: float = 0.08
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for key in ("flip", "jitter_p", "gray_p"):
            if not 0 <= getattr(self, key) <= 1:
                raise BadInput(f"{key} {getattr(self, key)} is a probability; give a number from 0 to 1")
        if not 0 < self.crop_floor <= 1:
            raise BadInput(f"crop_floor {self.crop_floor} is a share of the image's area; give a number in (0, 1]")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise BadInput(f"jitter {self.jitter} must be brightness, contrast, saturation (>= 0) and hue (0 to 0.5)")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise BadInput(f"interpolation {self.interpolation!r}: choose bilinear or bicubic")

    @classmethod
    def for_dataset(cls, name: str) -> "SimCLRViews":
        """The views that suit a data set: a mirrored digit is another sign, and a small crop of one is none."""
        return cls(crop_floor=0.3, flip=0.0, gray_p=0.0) if name == "digits" else cls()

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each image: (B, C, H, W) in [0,1] to the same."""
        x = random_resized_crop(x, generator, scale=(self.crop_floor, 1.0), flip=self.flip, interpolation=self.interpolation)
        x = color_jitter(x, generator, *self.jitter, p=self.jitter_p)
        return random_gray(x, generator, p=self.gray_p) if self.gray_p else x

    def view(self, x: Tensor, u: Tensor) -> Tensor:
        """The same from uniform numbers (VIEW_NUMBERS, B) in [0,1): whoever keys them by image can draw a view again.

        Differentiable in x almost everywhere: a crop is linear, the colours are piecewise smooth, and clamped to [0,1].
        """
        crop, jitter, last = u.split((CROP_NUMBERS, JITTER_NUMBERS, 1))
        height, width = x.shape[-2:]
        boxes = crop_from(crop, height, width, (self.crop_floor, 1.0), RATIO, self.flip)
        x = crop_and_resize(x, boxes, (height, width), self.interpolation)
        x = apply_jitter(x, jitter_from(jitter, self.jitter, self.jitter_p), with_hue=self.jitter[3] > 0)
        return torch.where((last[0] < self.gray_p).view(-1, 1, 1, 1), gray(x), x)


def random_resized_crop(
    x: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = RATIO,
    size: int | None = None,
    flip: float = 0.5,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """A random box of each image, resized to `size` square (None: as the image), mirrored with probability `flip`.

    The law is that of torchvision's RandomResizedCrop followed by RandomHorizontalFlip.
    """
    if not x.is_floating_point():
        raise BadInput(f"views take floating point images in [0,1], not {x.dtype}; use Images.floats()")
    height, width = x.shape[-2:]
    draws = crop_draws(len(x), height, width, generator, scale, ratio, flip)
    side = (height, width) if size is None else (size, size)
    return crop_and_resize(x, CropDraws(*(d.to(x.device) for d in draws)), side, interpolation)


def crop_draws(
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> CropDraws:
    """Boxes as RandomResizedCrop draws them: the first of ten tries that fits, else the largest central box."""
    u = torch.rand(CROP_NUMBERS, batch, generator=generator, device=generator.device)
    return crop_from(u, height, width, scale, ratio, flip)


def crop_from(
    u: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float
) -> CropDraws:
    """`crop_draws` from uniform numbers (CROP_NUMBERS, B) in [0,1)."""
    full = torch.linspace(height, width, 2, device=u.device).unsqueeze(1)  # (2, 1), made on the device
    area, low, high = height * width, math.log(ratio[0]) / 2, math.log(ratio[1]) / 2
    root = (u[:TRIES] * (area * (scale[1] - scale[0])) + area * scale[0]).sqrt_()
    aspect = (u[TRIES : 2 * TRIES] * (high - low) + low).exp_()  # the square root of width / height
    tries = torch.stack([root / aspect, root * aspect]).round_()  # (2, tries, B)
    fits = (tries <= full.unsqueeze(1)).all(0)
    if area * scale[0] * min(ratio[0], 1 / ratio[1]) < 0.5:  # only then can a side round to 0
        fits &= (tries > 0).all(0)
    found, first = fits.max(dim=0)  # the first of equals
    central = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    length = torch.where(
        found,
        tries.gather(1, first.expand(2, 1, -1)).squeeze(1),
        torch.linspace(*central, 2, device=u.device).unsqueeze(1),
    )
    free = full - length
    start = torch.where(found, (u[-3:-1] * (free + 1)).floor_(), free.div(2, rounding_mode="floor"))
    return CropDraws(torch.minimum(start, free), length, u[-1] < flip)  # float32 can round u * n up to n


def crop_and_resize(x: Tensor, draws: CropDraws, side: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Cut each box out, then resize it: (B, C, H, W) to (B, C, *side).

    A resize is linear and separable, so it is one matrix for the rows and one for the columns of each image. Weights
    are PIL's, which are torchvision's with antialias=True: a triangle, or the cubic with a = -0.5, stretched where the
    image shrinks; pixels outside the box get none and the rest are scaled to sum to 1. (antialias=False is the same
    for bilinear enlarging, but has a = -0.75 for bicubic.) Bicubic overshoots are clamped to [0,1], as 8 bits do.
    """
    height, width = x.shape[-2:]
    ratio = draws.length / torch.linspace(*side, 2, device=x.device).unsqueeze(1)
    # Both axes at once, padded to the longer: (2, B, out, in). First where each output pixel looks, within its box.
    centre = torch.arange(0.5, max(side), device=x.device) * ratio.unsqueeze(-1)
    mirrored = draws.length[1].unsqueeze(-1) - centre[1]
    centre[1] = torch.where(draws.flip.unsqueeze(-1), mirrored, centre[1])
    pixel = torch.arange(0.5, max(height, width), device=x.device) - draws.start.unsqueeze(-1)
    inside = (pixel > 0) & (pixel < draws.length.unsqueeze(-1))
    distance = (pixel.unsqueeze(-2) - centre.unsqueeze(-1)).abs_().div_(ratio.clamp_min(1)[..., None, None])
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    weights = weights.mul_(inside.unsqueeze(-2))
    weights = weights.div_(weights.sum(-1, keepdim=True)).to(x.dtype)
    vertical, horizontal = weights[0, :, : side[0], :height], weights[1, :, : side[1], :width]
    half = torch.bmm(x.reshape(len(x), -1, width), horizontal.transpose(1, 2))
    result = torch.matmul(vertical.unsqueeze(1), half.view(len(x), -1, height, side[1]))
    return result.clamp_(0, 1)


def pad_crop(x: Tensor, generator: torch.Generator, padding: int = 4, flip: float = 0.5) -> Tensor:
    """Shift each image by up to `padding` pixels over a black border, then mirror it with probability `flip`.

    The law is that of RandomCrop(size, padding) followed by RandomHorizontalFlip.
    """
    u = torch.rand(3, len(x), generator=generator, device=generator.device).to(x.device)
    shifts = (u[:2] * (2 * padding + 1)).floor_().clamp_max_(2 * padding).long()
    return shift_and_flip(x, shifts[0], shifts[1], u[2] < flip, padding)


def shift_and_flip(x: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """The window at (top, left), each int64 (B,), of the image inside its black border, mirrored where `flip`."""
    batch, channels, height, width = x.shape
    border = torch.nn.functional.pad(x, (padding,) * 4)
    column = torch.arange(width, device=x.device)
    columns = torch.where(flip.unsqueeze(1), width - 1 - column, column) + left.unsqueeze(1)
    ys = torch.arange(height, device=x.device) + top.unsqueeze(1)
    where = (ys.unsqueeze(2) * border.shape[-1] + columns.unsqueeze(1)).view(batch, 1, -1)
    return border.flatten(2).gather(2, where.expand(-1, channels, -1)).view_as(x)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min_(0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5: 1.5 d^3 - 2.5 d^2 + 1 up to 1, -0.5 d^3 + 2.5 d^2 - 4 d + 2 up to 2, then 0."""
    d = distance.clamp_max(2)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d <= 1, near, far)
