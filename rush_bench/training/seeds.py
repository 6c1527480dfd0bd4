"""All randomness of training is a function of (seed, what for), so that resuming needs no state of any generator."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a root seed and a purpose: `derive(0, "pretrain", "step", 17)`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """For layers, which draw initial weights from the global CPU generator: seed it, put it back afterwards."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(derive(*parts))
        yield


def permutation(count: int, *parts: int | str) -> Tensor:
    """A random order of 0..count-1 (int64, on the CPU: the same on every device)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(*parts)))
