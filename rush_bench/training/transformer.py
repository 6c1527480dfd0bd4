"""A transformer encoder (Vaswani et al. 2017) whose dropout draws from a generator, so that a step can be repeated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """Layers of self-attention and a two-layer network, each with its residual and then LayerNorm. (B, T, D) to the same."""

    def __init__(self, dim: int, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, feedforward, dropout) for _ in range(layers))

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        for layer in self.layers:
            x = layer(x, generator)
        return x


class Layer(nn.Module):
    """One layer; dropout in train mode, on the two branches."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.queries_keys_values, self.mix = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        q, k, v = self.queries_keys_values(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.drop(self.mix(attended), generator))
        return self.second(x + self.drop(self.narrow(F.gelu(self.widen(x))), generator))

    def drop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each number is 0 with probability `dropout`, else scaled up to keep the mean."""
        if not self.training or not self.dropout:
            return x
        keep = torch.rand(x.shape, generator=generator, device=generator.device) >= self.dropout
        return x * keep / (1 - self.dropout)
