"""ResNets (He et al. 2016) with the CIFAR stem, of basic blocks or bottlenecks; parameter names as in torchvision."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, addcmul, nn, tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = Projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN plus the shortcut, then ReLU; out / 4 channels within.

    (B, in, H, W) -> (B, out, H/stride, W/stride). The stride is the 3x3 convolution's, as in torchvision.
    """

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = Projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class Projection(nn.Sequential):
    """The 1x1 convolution and BatchNorm of a shortcut that changes the shape."""

    folds = (("0", "1"),)

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Encoder(nn.Module):
    """Images (B, C, H, W) in [0,1] -> features (B, dim): normalise, stem, four stages, global average pool.

    CIFAR stem: 3x3 stride 1, no pooling (sources S1.2); `imagenet`: 7x7 stride 2 and max-pool (96x96 STL-10);
    `cifar-linear`: without the ReLU, as lightly's benchmarks take their ResNet apart.
    """

    folds = (("conv1", "bn1"),)

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        channels: int = 3,
        stem: str = "cifar",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        padding: int = 1,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std) if mean else nn.Identity()
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, width, *((7, 2, 3) if large else (3, 1, padding)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.linear_stem = stem == "cifar-linear"
        if self.linear_stem:
            self.act = nn.Identity()  # a defence's digest is taken of the modules' names: another network
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs, block = width, Bottleneck if bottleneck else BasicBlock
        for stage, count in enumerate(blocks, start=1):
            outputs = width * 2 ** (stage - 1) * (4 if bottleneck else 1)
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            layer = [block(inputs if k == 0 else outputs, outputs, s) for k, s in enumerate(strides)]
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
            inputs = outputs
        self.stages, self.dim = len(blocks), inputs
        initialise(self)

    def forward(self, images: Tensor, stages: int | None = None) -> Tensor:
        """`stages`: pool what the first so many leave, fewer channels; None: all of them."""
        x = self.bn1(self.conv1(self.normalise(images)))
        x = self.pool(x if self.linear_stem else F.relu(x, inplace=True))
        for stage in range(1, (self.stages if stages is None else stages) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


def initialise(encoder: nn.Module) -> None:
    """He et al. 2015, over the fan-out; BatchNorm starts from torch's initial values."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Normalise(nn.Module):
    """(x - mean) / std per channel. The constants live in the spec, not among the weights."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.constants = f"mean={list(mean)}, std={list(std)}"

    def extra_repr(self) -> str:  # a defence's digest is taken of this: other constants, another defence
        return self.constants

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


class Affine(nn.Module):
    """An eval-mode BatchNorm as x * scale + shift: its input gradient needs no activation kept."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.detach().reshape(1, -1, 1, 1))
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale).detach().reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


def fold_batchnorm(network: nn.Module) -> None:
    """Fold BatchNorm into the convolution before it, in place, in eval mode. Classes state their pairs in `folds`.

    Those that stand before an activation with no convolution before them become `Affine`.
    """
    for module in list(network.modules()):
        for conv, norm in getattr(module, "folds", ()):
            convolution, batchnorm = module.get_submodule(conv), module.get_submodule(norm)
            assert isinstance(convolution, nn.Conv2d) and isinstance(batchnorm, nn.BatchNorm2d)
            setattr(module, conv, fuse_conv_bn_eval(convolution, batchnorm))
            setattr(module, norm, nn.Identity())
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, Affine(child))
