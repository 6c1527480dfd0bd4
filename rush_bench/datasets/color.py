"""Colour jitter and gray for batches of images in [0,1], (B, C, H, W); see `views` for the conventions.

Brightness, contrast and saturation are all blends, clamp(f x + (1 - f) base), with base 0, the mean of gray, or gray.
So one blend whose base each image chooses serves all three in any order. Hue may fall before, between or after them:
three blends run before it and three after, and each image leaves three of the six out (f = 1 changes nothing).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rush_bench.errors import BadInput

BRIGHTNESS, CONTRAST, SATURATION = range(3)
JITTER_NUMBERS = 9  # uniform numbers that the jitter of an image takes


class JitterDraws(NamedTuple):
    """What jitter does to each image.

    factors (3, B): of brightness, contrast and saturation. hue (B,): shift in turns. order (3, B): which of the three
    comes first, second, third. hue_at (B,): how many of them come before hue. applied (B,): bool, False leaves the
    image as it is.
    """

    factors: Tensor
    hue: Tensor
    order: Tensor
    hue_at: Tensor
    applied: Tensor


def color_jitter(
    x: Tensor,
    generator: torch.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    p: float = 0.8,
) -> Tensor:
    """Colour jitter with probability p, an own order and own factors for each image.

    The law is that of torchvision's RandomApply([ColorJitter(...)], p). Images of one channel have no colour: their
    brightness and contrast change alone, as in torchvision.
    """
    if x.shape[1] not in (1, 3):
        raise BadInput(f"colour jitter takes 1 or 3 channels, not {x.shape[1]}")
    draws = jitter_draws(len(x), generator, (brightness, contrast, saturation, hue), p)
    return apply_jitter(x, JitterDraws(*(d.to(x.device) for d in draws)), with_hue=hue > 0)


def jitter_draws(batch: int, generator: torch.Generator, strengths: tuple[float, float, float, float], p: float) -> JitterDraws:
    """Draws for a batch: factors from U(max(0, 1 - s), 1 + s), hue from U(-s, s), every order of the four as likely."""
    return jitter_from(torch.rand(JITTER_NUMBERS, batch, generator=generator, device=generator.device), strengths, p)


def jitter_from(u: Tensor, strengths: tuple[float, float, float, float], p: float) -> JitterDraws:
    """`jitter_draws` from uniform numbers (JITTER_NUMBERS, B) in [0,1)."""
    factors = torch.stack([u[k] * (1 + s - max(0.0, 1 - s)) + max(0.0, 1 - s) for k, s in enumerate(strengths[:3])])
    hue = u[3] * (2 * strengths[3]) - strengths[3]
    return JitterDraws(factors, hue, u[4:7].argsort(0), (u[7] * 4).floor_(), u[8] < p)


def apply_jitter(x: Tensor, draws: JitterDraws, with_hue: bool = True) -> Tensor:
    """Jitter (B, C, H, W) as drawn. `with_hue=False` leaves hue out for the whole batch."""
    with_hue = with_hue and x.shape[1] == 3
    factors, order = draws.factors.gather(0, draws.order), draws.order
    if with_hue:
        before = torch.arange(3, device=x.device).unsqueeze(1) < draws.hue_at
        factors = torch.where(torch.cat([before, ~before]), factors.repeat(2, 1), 1)
        order = order.repeat(2, 1)
    # clamp(f x + on_gray gray + on_mean mean(gray)), each factor (slots, B, 1, 1, 1)
    rest = 1 - factors
    parts = (factors, rest * (order == SATURATION), rest * (order == CONTRAST))
    slots = list(zip(*(part.to(x.dtype)[..., None, None, None].unbind(0) for part in parts), strict=True))
    out = x
    for slot, (factor, on_gray, on_mean) in enumerate(slots):
        if with_hue and slot == 3:
            out = shift_hue(out, draws.hue.to(x.dtype).view(-1, 1, 1))
        luma = gray(out)
        base = torch.addcmul(luma * on_gray, luma.mean((2, 3), keepdim=True), on_mean)
        out = torch.addcmul(base, out, factor).clamp_(0, 1)
    return torch.where(draws.applied.view(-1, 1, 1, 1), out, x)


def gray(x: Tensor) -> Tensor:
    """ITU-R 601 luma with torchvision's coefficients, (B, 1, H, W); an image of one channel is its own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of (B, 3, H, W) by `turns`, broadcast over (B, H, W), with value and saturation (HSV) kept.

    The way back from HSV is the closed form channel = v - v s min(k, 4 - k, 1), at least 0, with
    k = (n + 6 h) mod 6 and n = 5, 3, 1 for red, green, blue; v s is the spread between largest and smallest channel.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    spread = value - x.amin(1)
    # Six times the hue, from the sector of the largest channel; a gray pixel has spread 0 and any hue will do.
    from_red, from_green = value == red, value == green
    sector = torch.where(from_red, green - blue, torch.where(from_green, blue - red, red - green))
    offset = torch.where(from_red, 0, torch.where(from_green, 2, 4))
    hue = sector.div_(spread.clamp_min(1e-12)).add_(offset).add_(turns * 6)
    n = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue.unsqueeze(1) + n).remainder_(6)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value.unsqueeze(1) - share.mul_(spread.unsqueeze(1))


def random_gray(x: Tensor, generator: torch.Generator, p: float = 0.2) -> Tensor:
    """Turn each image gray with probability p, all channels kept (torchvision's RandomGrayscale)."""
    chosen = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < p
    return torch.where(chosen.view(-1, 1, 1, 1), gray(x), x)
