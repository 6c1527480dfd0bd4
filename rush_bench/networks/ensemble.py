"""Several networks behind one `Classifier`: encoders side by side, and heads whose probabilities are averaged."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Parallel(nn.Module):
    """Images (B, C, H, W) through each encoder: features side by side, (B, members * dim)."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([member(images) for member in self.members], 1)


class MeanProbability(nn.Module):
    """Each member's features to its own head: the log of the mean of their softmaxes, (B, K)."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.in_features = sum(member.in_features for member in members)
        self.out_features = members[0].out_features

    def forward(self, features: Tensor) -> Tensor:
        parts = features.chunk(len(self.members), 1)
        scores = torch.stack([head(part).float().log_softmax(1) for head, part in zip(self.members, parts, strict=True)])
        return scores.logsumexp(0) - math.log(len(self.members))
