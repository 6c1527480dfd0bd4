"""Processor time of several ways to do a thing: in turn, so that a machine with other work favours none of them."""

import os
import resource
import statistics
import subprocess
import sys
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


def process(*arguments: str, cwd: str | None = None) -> float:
    """Processor seconds of a fresh interpreter, its start and imports included, on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=alone, cwd=cwd, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def spread(numbers: Sequence[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median (least to most) of the rounds' ratios."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
