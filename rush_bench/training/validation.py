"""Numbers on the held-out split while training: accuracy and the k-nearest-neighbour accuracy of features."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets import Images
from rush_bench.noise import Noise, Stream
from rush_bench.training.inner import InnerSettings, attack_mode, pgd
from rush_bench.training.seeds import derive

CHUNK = 512  # images a forward pass: the same whatever the training batch, so that numbers do not move with it


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], images: Images, noise: Noise | None = None, seed: int = 0) -> Tensor:
    """A network's outputs (N, ...) in float32, chunk by chunk; with one draw of noise per image if a law is given."""
    chunks = []
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        x = images.floats(rows)
        if noise is not None:
            stream = Stream(seed, "validation", images.index[rows])
            x = x + stream.noise(noise, len(x), 1, tuple(x.shape[1:]), x.device)[:, 0]
        chunks.append(network(x).float())
    return torch.cat(chunks)


def evenly(images: Images, count: int) -> Images:
    """At most `count` of the images (0: all), evenly spread over them."""
    count = min(len(images), count or len(images))
    return images.take(torch.arange(count, device=images.labels.device) * len(images) // count)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of (N, K) logits whose largest is the label."""
    return float((logits.argmax(1) == labels).float().mean())


def robust_accuracy(network: nn.Module, images: Images, inner: InnerSettings, seed: int) -> float:
    """Accuracy under PGD on the cross-entropy, in eval mode and from the same random starts whenever it is asked."""
    right = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    generator = torch.Generator(images.labels.device).manual_seed(derive(seed, "validation", "attack"))
    with attack_mode(network, "eval"):
        for start in range(0, len(images), CHUNK):
            x, y = images.floats(slice(start, start + CHUNK)), images.labels[start : start + CHUNK]
            loss = partial(_summed_cross_entropy, network, y)
            attacked = pgd(loss, x, eps=inner.eps, step=inner.step, steps=inner.steps, start=inner.start, generator=generator)
            with torch.no_grad():
                right += (network(attacked).argmax(1) == y).sum()
    return int(right) / len(images)


def _summed_cross_entropy(network: nn.Module, labels: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(network(x).float(), labels, reduction="sum")


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Weighted nearest-neighbour accuracy by cosine, weights exp(cos / temperature) (Wu et al. 2018).

    bank (N, D), queries (M, D) and their labels; fewer than k vectors in the bank means all of them vote.
    """
    bank, classes = F.normalize(bank, dim=1), int(max(bank_labels.max(), labels.max())) + 1
    right = torch.zeros((), dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        near, which = (F.normalize(queries[rows], dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = near.new_zeros(len(near), classes).scatter_add_(1, bank_labels[which], (near / temperature).exp())
        right += (votes.argmax(1) == labels[rows]).sum()
    return int(right) / len(queries)
