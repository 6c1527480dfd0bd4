"""The parts of a DDPM (Ho et al. 2020), scaled down: its schedule, and the U-Net that predicts the noise in an image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.errors import BadInput

GROUPS = 4


def linear_schedule(times: int) -> Tensor:
    """Alpha-bars (T,) float64 of Ho et al.'s linear betas, 1e-4 to 0.02 over 1000 times (section 4), scaled to fewer.

    With betas times 1000 / T (Nichol and Dhariwal's code) the last state holds as little of the image whatever T is.
    """
    if times < 21:  # beta would reach 1
        raise BadInput(f"timesteps={times} is too few for the linear schedule; give 21 or more, such as 100")
    return (1 - torch.linspace(1e-4, 0.02, times, dtype=torch.float64) * (1000 / times)).cumprod(0)


class UNet(nn.Module):
    """Noisy images (B, C, H, W), about [-1,1], and their times (B,) int64 from 0 -> the noise in them (B, C, H, W).

    One residual block a level on the way down and up, one in the middle, group normalisation, swish, and the sinusoidal
    embedding of the time added in each block, as in appendix B; there are no attention layers and no dropout, which its
    images of 32 x 32 have. H and W must be divisible by 2 ** (levels - 1). No image meets another: rows are independent.
    """

    def __init__(self, channels: int, width: int = 8, multipliers: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        if width % GROUPS:
            raise BadInput(f"diffusion.width={width} must be a multiple of {GROUPS}, the groups of its normalisation")
        widths, time = [width * factor for factor in multipliers], 4 * width
        below, above = [width, *widths[:-1]], [*widths[1:], widths[-1]]
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = _conv(channels, width)
        self.down = nn.ModuleList(Block(i, o, time) for i, o in zip(below, widths, strict=True))
        self.shrink = nn.ModuleList(_conv(w, w, stride=2) for w in widths[:-1])
        self.middle = Block(widths[-1], widths[-1], time)
        self.up = nn.ModuleList(Block(i + o, o, time) for i, o in zip(above, widths, strict=True))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.out = _silent(_conv(width, channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(embedding(t, self.width).to(x.dtype))
        x, kept = self.stem(x), list[Tensor]()
        for level, block in enumerate(self.down):
            x = block(self.shrink[level - 1](x) if level else x, time)
            kept.append(x)
        x = self.middle(x, time)
        for level in reversed(range(len(kept))):
            if x.shape[2:] != kept[level].shape[2:]:
                x = F.interpolate(x, scale_factor=2.0)
            x = self.up[level](torch.cat([x, kept[level]], 1), time)
        return self.out(F.silu(self.norm(x)))


class Block(nn.Module):
    """norm-swish-conv, plus the time, norm-swish-conv, plus the shortcut. (B, in, H, W), (B, time) -> (B, out, H, W)."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, outputs), _silent(_conv(outputs, outputs))
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


def embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the times (B,) at frequencies from 1 to 1/10000 (Vaswani et al. 2017): (B, width), width even."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / max(1, half - 1)))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts at zero, so that a fresh block is its shortcut and a fresh network says 0 (Ho et al.'s code)."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer
