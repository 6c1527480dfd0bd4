"""Numbers on the held-out split while training: accuracy, clean and attacked."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets import Images
from rush_bench.features import CHUNK
from rush_bench.training.inner import InnerSettings, attack_mode, pgd
from rush_bench.training.seeds import derive


def evenly_spaced(images: Images, count: int) -> Images:
    """At most `count` of the images (0: all), evenly spread over them."""
    count = min(len(images), count or len(images))
    return images.take(torch.arange(count, device=images.labels.device) * len(images) // count)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of (N, K) logits whose largest is the label."""
    return float((logits.argmax(1) == labels).float().mean())


def robust_accuracy(network: nn.Module, images: Images, inner: InnerSettings, seed: int) -> float:
    """Accuracy under PGD on the cross-entropy, in eval mode and from the same random starts whenever it is asked."""
    correct = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    generator = torch.Generator(images.labels.device).manual_seed(derive(seed, "validation", "attack"))
    with attack_mode(network, "eval"):
        for start in range(0, len(images), CHUNK):
            x, y = images.floats(slice(start, start + CHUNK)), images.labels[start : start + CHUNK]
            loss = partial(_summed_cross_entropy, network, y)
            attacked = pgd(loss, x, inner.threat, step=inner.step, steps=inner.steps, start=inner.start, generator=generator)
            with torch.no_grad():
                correct += (network(attacked).argmax(1) == y).sum()
    return int(correct) / len(images)


def _summed_cross_entropy(network: nn.Module, labels: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(network(x).float(), labels, reduction="sum")
