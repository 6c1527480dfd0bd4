"""What a network makes of images, chunk by chunk, and how well its features tell classes apart by their neighbours."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.noise import Noise, Stream

CHUNK = 512  # images a forward pass: the same whatever the training batch, so that numbers do not move with it


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], images: Images, noise: Noise | None = None, seed: int = 0) -> Tensor:
    """A network's outputs (N, ...) in float32, chunk by chunk; with one draw of noise per image if a law is given."""
    chunks = []
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        x = images.floats(part)
        if noise is not None:
            stream = Stream(seed, "validation", images.index[part])
            x = x + stream.noise(noise, len(x), 1, tuple(x.shape[1:]), x.device)[:, 0]
        chunks.append(network(x).float())
    return torch.cat(chunks)


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
        part = slice(start, start + CHUNK)
        near, which = (F.normalize(queries[part], dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = near.new_zeros(len(near), classes).scatter_add_(1, bank_labels[which], (near / temperature).exp())
        right += (votes.argmax(1) == labels[part]).sum()
    return int(right) / len(queries)
