"""Scoring stored x': checks that the attack stayed inside its threat, then K fresh, independent predictions (A1, A7, A10)."""

import dataclasses
import time

import numpy as np
import torch
from torch import Tensor

from rush_bench.defenses import Defense
from rush_bench.errors import RushBenchError
from rush_bench.noise import Stream
from rush_bench.records import TOLERANCE
from rush_bench.threats import Threat


def check(attacked: Tensor, images: Tensor, index: Tensor, threat: Threat) -> Tensor:
    """Distances (B,) of x' in the threat's norm, in float64; rubbish is an error that names the image and what is wrong."""
    if not isinstance(attacked, Tensor) or attacked.shape != images.shape or attacked.dtype != torch.float32:
        got = f"{attacked.dtype} {tuple(attacked.shape)}" if isinstance(attacked, Tensor) else type(attacked).__name__
        raise RushBenchError(f"the attack returned {got} instead of float32 {tuple(images.shape)}")
    distance = threat.size(attacked.double() - images.double())
    for wrong, what in (
        (~attacked.flatten(1).isfinite().all(1), "is not finite"),
        (((attacked < -TOLERANCE) | (attacked > 1 + TOLERANCE)).flatten(1).any(1), "has pixels outside [0,1]"),
        (distance > threat.eps + TOLERANCE, f"is outside the {threat.norm} ball of radius {threat.eps:.6g}"),
    ):
        if wrong.any():
            row = int(wrong.int().argmax())
            raise RushBenchError(f"the attack's x' for image {int(index[row])} {what} (distance {float(distance[row]):.6g})")
    return distance


def score(
    defense: Defense, attacked: Tensor, labels: Tensor, index: Tensor, stream: Stream, repeats: int
) -> dict[str, np.ndarray]:
    """`repeats` independent predictions per image: how often right (`correct` of `repeats`), class counts, mean margin.

    `margin` is the mean probability of the label minus the best other one, over all draws. Exact with repeats=1 for a
    deterministic defence. Raises RushBenchError where a prediction is not finite.
    """
    predictions = defense.predictions(attacked, stream.at(index), repeats)
    counts = (predictions.labels[..., None] == torch.arange(defense.classes, device=attacked.device)).sum(0)
    probabilities = predictions.probabilities.mean(0)
    positions = torch.arange(len(attacked), device=attacked.device)
    true = probabilities[positions, labels].clone()
    probabilities[positions, labels] = -1
    return {
        "correct": counts[positions, labels].cpu().numpy(),
        "repeats": np.full(len(attacked), repeats),
        "counts": counts.cpu().numpy(),
        "margin": (true - probabilities.max(1).values).float().cpu().numpy(),
    }


def made_on(defense: Defense) -> np.ndarray:
    """What a chunk was made on, for its file: device, torch, and the precision of the search; float32 judges."""
    device = torch.cuda.get_device_name(defense.device) if defense.device.type == "cuda" else defense.device.type
    return np.asarray(f"{device}, torch {torch.__version__}, search in {defense.precision}")


class Meter:
    """Counts what a defence does from here on: rows forward and backward, and seconds."""

    def __init__(self, defense: Defense) -> None:
        self.defense, self.before, self.begun = defense, dataclasses.replace(defense.passes), time.perf_counter()

    def cost(self, n: int) -> dict[str, np.ndarray]:
        """`forwards`, `backwards`, `seconds` per image, the same for each of n images."""
        used = self.defense.passes
        each = {
            "forwards": (used.forwards - self.before.forwards) / n,
            "backwards": (used.backwards - self.before.backwards) / n,
            "seconds": (time.perf_counter() - self.begun) / n,
        }
        return {name: np.full(n, value) for name, value in each.items()}
