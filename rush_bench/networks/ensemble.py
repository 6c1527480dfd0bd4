"""Several networks behind one `Classifier`: encoders side by side, and heads whose probabilities are averaged."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rush_bench.networks.preact import PreActEncoder
from rush_bench.networks.resnet import Encoder

AnyEncoder = Encoder | PreActEncoder


class Parallel(nn.Module):
    """Images (B, C, H, W) through each encoder: features side by side, (B, the sum of their dims)."""

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
        self.sizes = [member.in_features for member in members]
        self.in_features = sum(self.sizes)
        self.out_features = members[0].out_features

    def forward(self, features: Tensor) -> Tensor:
        parts = features.split(self.sizes, 1)
        scores = torch.stack([head(part).float().log_softmax(1) for head, part in zip(self.members, parts, strict=True)])
        return scores.logsumexp(0) - math.log(len(self.members))


def trunk(encoder: AnyEncoder) -> list[str]:
    """The names of an encoder's parts up to the last stage but one."""
    last = (f"layer{encoder.stages}", "bn")  # the second: a pre-activation network's last BatchNorm
    return [name for name, _ in encoder.named_children() if name not in last]


def share_trunk(encoders: Sequence[AnyEncoder]) -> None:
    """All encoders take the first one's trunk, the very same modules; what comes after it stays their own."""
    first = encoders[0]
    for other in encoders[1:]:
        for name in trunk(first):
            setattr(other, name, first.get_submodule(name))


def own_trunks(encoders: Sequence[AnyEncoder]) -> None:
    """After `share_trunk`: each encoder gets its own copy of what they share."""
    first = encoders[0]
    for other in encoders[1:]:
        for name in trunk(first):
            setattr(other, name, copy.deepcopy(first.get_submodule(name)))
