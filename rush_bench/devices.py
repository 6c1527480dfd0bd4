"""Which device a name means, what float32 means on it, and how this process keeps its memory."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from rush_bench.errors import BadInput, first_sentence

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def choose_device(name: str | torch.device) -> torch.device:
    """The torch device of a name; `auto` is CUDA where there is one. A device that cannot be used is a BadInput."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = f"device {str(name)!r} cannot be used here ({first_sentence(error)})"
        raise BadInput(f"{why}; --device auto takes what there is") from error
    return device


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself: a CPU that only pretends to is slower than in float32."""
    if device.type == "cpu":
        return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 is computed in float32: cuDNN's convolutions take TF32 by default, which moves logits by 0.01; matmuls
    take it, on some processors bfloat16, where the user set so. Outside everything is as it was."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.get_float32_matmul_precision()
    kinds = [cudnn.conv, cudnn.rnn]
    before = [kind.fp32_precision for kind in kinds]
    try:  # the older of torch's two ways to say it must agree with the newer, or reading it raises
        older = cudnn.allow_tf32
    except RuntimeError:  # the user has said both
        older = None
    try:
        if older:
            cudnn.allow_tf32 = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        if older:
            cudnn.allow_tf32 = True
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, where it would give it back and take fresh pages; for good.

    A ResNet-18 training step at batch 64 on one CPU core takes 1.96 s in place of 2.37 s. Elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system or another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
