"""Pre-activation networks (He et al. 2016b): BatchNorm and activation stand before each convolution.

WideResNet (Zagoruyko and Komodakis 2016), Free-m's WRN-32-10 (sources S2.6), PreAct-ResNet-18 with SiLU (S2.9) and
ResNet-50v2 (S2.11) are one encoder in several styles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.networks.resnet import Normalise, Projection, initialise

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "silu": nn.SiLU,
    "leaky": partial(nn.LeakyReLU, 0.1, inplace=True),
}
SHORTCUTS = ("conv1x1", "conv3x3", "pool")
LEVEL = 1 / 255  # one of TensorFlow's pixel units


@dataclass(frozen=True)
class Style:
    """What tells the networks apart.

    shortcut, where a block changes the shape: `conv1x1` of the activated input, `conv3x3` of the raw one, or `pool`:
    average pooling and channels of zeros, of the raw input but in the first block. same: at stride 2 one row and one
    column of padding, below and at the right (TensorFlow and JAX). stem_norm: BatchNorm and activation after the stem.
    shortcut_norm: BatchNorm after `conv1x1`. final_norm: BatchNorm and activation before the pooling.
    """

    bottleneck: bool = False
    activation: str = "relu"
    shortcut: str = "conv1x1"
    same: bool = False
    stem_norm: bool = False
    shortcut_norm: bool = False
    final_norm: bool = True


class SameConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 over sides of even length, padded as TensorFlow's and JAX's `SAME`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 2, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class PoolShortcut(nn.Module):
    """Average pooling and zeros on both sides of the channels: (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class PreActBlock(nn.Module):
    """(BN, activation, convolution) twice, or three times in a bottleneck, plus the shortcut.

    (B, in, H, W) -> (B, out, H/stride, W/stride); a bottleneck has out / 4 channels within.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, style: Style, first: bool = False) -> None:
        super().__init__()
        middle = outputs // 4 if style.bottleneck else outputs
        self.bottleneck, self.act = style.bottleneck, ACTIVATIONS[style.activation]()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(middle)
        # BatchNorm after a convolution goes into it; the first has none before it
        self.folds: tuple[tuple[str, str], ...] = (("conv1", "bn2"),)
        if style.bottleneck:
            self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
            self.conv2, self.bn3 = conv3x3(middle, middle, stride, style.same), nn.BatchNorm2d(middle)
            self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
            self.folds += (("conv2", "bn3"),)
        else:
            self.conv1 = conv3x3(inputs, outputs, stride, style.same)
            self.conv2 = conv3x3(outputs, outputs, 1, style.same)
        changes = stride != 1 or inputs != outputs
        self.activated = changes and (style.shortcut == "conv1x1" or (style.shortcut == "pool" and first))
        self.shortcut = shortcut(inputs, outputs, stride, style) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(x))
        side = self.shortcut(y if self.activated else x)
        y = self.conv2(self.act(self.bn2(self.conv1(y))))
        if self.bottleneck:
            y = self.conv3(self.act(self.bn3(y)))
        return y + side


def conv3x3(inputs: int, outputs: int, stride: int, same: bool) -> nn.Conv2d:
    """A 3x3 convolution whose output has 1 / stride of the side."""
    return SameConv(inputs, outputs) if same and stride == 2 else nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def shortcut(inputs: int, outputs: int, stride: int, style: Style) -> nn.Module:
    """The way past a block that changes the shape."""
    if style.shortcut == "pool":
        return PoolShortcut(inputs, outputs, stride)
    if style.shortcut == "conv3x3":
        return conv3x3(inputs, outputs, stride, style.same)
    if style.shortcut_norm:
        return Projection(inputs, outputs, stride)
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class PreActEncoder(nn.Module):
    """Images (B, C, H, W) in [0,1] -> features (B, dim): normalise, 3x3 stem, stages, global average pool.

    blocks: how many in each stage; width: channels of the first, doubled in each one after it, four times that at the
    end of bottlenecks. standardise: each image by its own mean and deviation in place of `mean` and `std`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        style: Style,
        *,
        stem_width: int = 16,
        channels: int = 3,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        standardise: bool = False,
        padding: int = 1,
    ) -> None:
        super().__init__()
        self.normalise = Standardise() if standardise else Normalise(mean, std) if mean else nn.Identity()
        self.style, self.act = style, ACTIVATIONS[style.activation]()
        self.conv1 = nn.Conv2d(channels, stem_width, 3, 1, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width) if style.stem_norm else nn.Identity()
        self.folds = (("conv1", "bn1"),) if style.stem_norm else ()
        inputs = stem_width
        for stage, count in enumerate(blocks, start=1):
            outputs = width * 2 ** (stage - 1) * (4 if style.bottleneck else 1)
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            layer = [
                PreActBlock(inputs if k == 0 else outputs, outputs, stride, style, first=stage == 1 and k == 0)
                for k, stride in enumerate(strides)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
            inputs = outputs
        self.bn = nn.BatchNorm2d(inputs) if style.final_norm else nn.Identity()
        self.stages, self.dim = len(blocks), inputs
        initialise(self)

    def forward(self, images: Tensor, stages: int | None = None) -> Tensor:
        """`stages`: pool what the first so many leave, fewer channels and no last BatchNorm; None: all of them."""
        x = self.conv1(self.normalise(images))
        if self.style.stem_norm:
            x = self.act(self.bn1(x))
        for stage in range(1, (self.stages if stages is None else stages) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        if self.style.final_norm and stages in (None, self.stages):
            x = self.act(self.bn(x))
        return x.mean((2, 3))


class Standardise(nn.Module):
    """Each image by its own mean and standard deviation, as TensorFlow's per_image_standardization of 0..255 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var((1, 2, 3), correction=0, keepdim=True)
        return (x - x.mean((1, 2, 3), keepdim=True)) / variance.clamp_min(LEVEL**2 / x[0].numel()).sqrt()
