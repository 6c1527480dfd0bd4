"""Processor time of several ways to do a thing: in turn, so that a machine with other work favours none of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of this process for each way, one number per round. Warming up is the caller's."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            found[name].append(time.process_time() - begun)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median (least to most) of the rounds' ratios."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
