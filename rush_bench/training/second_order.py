"""Convolutions and train-mode BatchNorm whose second derivatives cost what they must.

torch's own second derivative of a convolution always has the weights' part, by a slow route, and that of BatchNorm is some
fifty operations. Both are linear maps in the incoming gradient, with the first derivative's own kernels for an adjoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
INPUT_ONLY, WEIGHT_ONLY = [True, False, False], [False, True, False]  # which derivatives of a convolution
Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups


class FastSecondDerivatives(TorchFunctionMode):
    """Within it, conv2d without a bias and BatchNorm on batch statistics are those below; the values stay the same.

    What was computed within may be differentiated outside. Everything else is torch's.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = function is torch.conv2d and len(args) == 7 and args[2] is None  # as nn.Conv2d calls it
        if plain and all(isinstance(part, tuple) for part in args[3:6]):
            x, weight, _, stride, padding, dilation, groups = args
            return Convolution.apply(*cast_as_autocast(x, weight), (stride, padding, dilation, False, [0, 0], groups))
        if function is F.batch_norm and uses_batch_statistics(args[0], kwargs):
            return BatchNorm.apply(args[0], kwargs["weight"], kwargs["bias"], *args[1:3], kwargs["momentum"], kwargs["eps"])
        return function(*args, **kwargs)


def uses_batch_statistics(x: Tensor, settings: dict[str, Any]) -> bool:
    """On batch statistics, with a scale and a shift; of one value a channel torch says what is wrong."""
    several = x.numel() > x.shape[1]
    return settings["training"] and several and settings["weight"] is not None and settings["bias"] is not None


def cast_as_autocast(*tensors: Tensor) -> list[Tensor]:
    """As autocast does to the arguments of a convolution, where it is on; it does not see into a `Function`."""
    device = tensors[0].device.type
    on = torch.is_autocast_enabled(device)
    return [tensor.to(torch.get_autocast_dtype(device)) if on else tensor for tensor in tensors]


class Convolution(torch.autograd.Function):
    """x (B, C, H, W), weight (K, C / groups, h, w): x * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return aten.convolution(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        image = ConvolutionBack.apply(g, weight, x, ctx.geometry) if ctx.needs_input_grad[0] else None
        weight_wanted = ctx.needs_input_grad[1]
        kernel = aten.convolution_backward(g, x, weight, None, *ctx.geometry, WEIGHT_ONLY)[1] if weight_wanted else None
        return image, kernel, None


class ConvolutionBack(torch.autograd.Function):
    """The derivative in x, which is linear in g and in the weights, and takes no more of x than its shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        return aten.convolution_backward(g, x, weight, None, *geometry, INPUT_ONLY)[0]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        back = aten.convolution(u, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
        weight_wanted = ctx.needs_input_grad[1]
        kernel = aten.convolution_backward(g, u, weight, None, *ctx.geometry, WEIGHT_ONLY)[1] if weight_wanted else None
        return back, kernel, None, None


class BatchNorm(torch.autograd.Function):
    """Normalise each channel of x (B, C, ...) by the batch, times weight (C,), plus bias (C,); running statistics move.

    The gradients in weight and bias cannot be differentiated again (they require no gradient).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, scale = aten.native_batch_norm(x, weight, bias, running_mean, running_variance, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        image, *others = BatchNormBack.apply(g, x, weight, mean, scale, ctx.eps)
        return image, *(others if learns else (None, None)), None, None, None, None


class BatchNormBack(torch.autograd.Function):
    """With n = (x - mean) s and s = 1 / sqrt(variance + eps), averages over a channel: the derivatives in x, weight and bias.

    That in x is w s P g, where P g = g - <g> - n <g n> is a symmetric map. Hence for u, with T = sum u P g:
    in g      w s P u, the same kernel
    in w      s T
    in x      -w s^2 (<g n> P u + <u n> P g) - w s^2 T n / N,  by dn = s P and ds/dx = -s^2 n / N
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        image, along, total = back(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, image, along, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(along, total)
        return image, along, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, scale, image, g_along, g_total = ctx.saved_tensors
        image_u, u_along, u_total = back(u, x, weight, mean, scale, ctx.eps)
        count = x.numel() / len(weight)  # N
        between = (u * g).sum([0, *range(2, x.dim())], dtype=weight.dtype)
        inner = between - (u_total * g_total + u_along * g_along) / count  # T
        n = -weight * scale.square() * inner / count  # the factor of n
        shape = (-1, *[1] * (x.dim() - 2))
        parts = [factor.to(x.dtype).view(shape) for factor in (-scale * g_along / count, -scale * u_along / count, n * scale)]
        in_x = (x - mean.to(x.dtype).view(shape)).mul_(parts[2]).addcmul_(image_u, parts[0]).addcmul_(image, parts[1])
        return image_u, in_x, scale * inner, None, None, None


def back(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first derivative's kernel: w s P g, the sum of g n and the sum of g."""
    return aten.native_batch_norm_backward(g, x, weight, None, None, mean, scale, True, eps, [True, True, True])
