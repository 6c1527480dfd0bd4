"""`build(spec)` and the `Classifier` it returns."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.errors import BadInput, unknown_name
from rush_bench.networks.ensemble import MeanProbability, Parallel
from rush_bench.networks.resnet import Encoder, fold_batchnorm
from rush_bench.networks.routes import route, routed, routes, single_route

# Named shapes; every other key of a spec overrides them. `resnet` is the family with its shape left to the spec.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": [2, 2, 2, 2], "width": 64},  # 11.17 M parameters without head (recipes R1.2)
    "resnet34": {"blocks": [3, 4, 6, 3], "width": 64},
    "resnet": {"blocks": [2, 2, 2, 2], "width": 32},
    "tiny": {"blocks": [1, 1, 1, 1], "width": 16},  # the demo's: 0.30 M
}
# padding: of the CIFAR stem's convolution (solo-learn's and DeACL's networks have 2). routes: sets of every BatchNorm.
DEFAULTS: dict[str, Any] = {"classes": 10, "channels": 3, "size": 32, "stem": "cifar", "mean": [], "std": []}
# members: networks whose mean probability is the prediction.
DEFAULTS |= {"padding": 1, "routes": 1, "members": 1}


class Classifier(nn.Module):
    """`encoder`: images (B, C, H, W) float32 in [0,1] -> features (B, dim); `head`: features -> logits (B, K).

    Normalisation lives inside the encoder. `spec` holds plain values; `build(spec)` makes the same network again.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.head, self.spec = encoder, head, spec

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def route(self, number: int) -> AbstractContextManager[None]:
        """Images take this route (of `spec["routes"]`, from 0) inside the block."""
        return route(self.encoder, number)

    def single_route(self, number: int) -> "Classifier":
        """A plain network that is one route of this one; nothing is shared."""
        if routes(self.encoder) > 1 and not 0 <= number < routes(self.encoder):
            raise BadInput(f"there is no route {number}; this network has 0 to {routes(self.encoder) - 1}")
        encoder = single_route(self.encoder, number if routes(self.encoder) > 1 else 0)
        return Classifier(encoder, copy.deepcopy(self.head), {**self.spec, "routes": 1})

    def folded(self, number: int | None = None) -> nn.Module:
        """A copy for attacks: eval mode, BatchNorm folded into the convolutions, no weight requires a gradient.

        Halves the activations kept for the input gradient. Logits equal the eval-mode network's up to rounding. A
        network with several routes is folded at the one whose number is given.
        """
        if routes(self.encoder) > 1:
            if number is None:
                raise BadInput(f"this network has {routes(self.encoder)} BatchNorm routes; say which, as in folded(1)")
            return self.single_route(number).folded()
        network = copy.deepcopy(self).eval().requires_grad_(False)
        fold_batchnorm(network)
        return network.requires_grad_(False)


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with every key stated. BadInput for an unknown name or key and for values that make no network."""
    name = spec.get("name", "resnet18")
    if name not in NETWORKS:
        raise unknown_name("network", str(name), NETWORKS)
    full = {"name": name, **DEFAULTS, **NETWORKS[name]}
    for key, value in spec.items():
        if key not in full:
            raise unknown_name("network key", key, full)
        full[key] = list(value) if isinstance(value, tuple | list) else value
    for key in ("classes", "channels", "size", "width", "padding", "routes", "members"):
        if not isinstance(full[key], int) or full[key] < 1:
            raise BadInput(f"network key {key}={full[key]!r} must be a whole number of at least 1")
    if not full["blocks"] or not all(isinstance(count, int) and count >= 1 for count in full["blocks"]):
        raise BadInput(f"network key blocks={full['blocks']} must list at least one block for each stage, as in [2, 2, 2, 2]")
    if full["stem"] not in ("cifar", "imagenet"):
        raise unknown_name("network stem", str(full["stem"]), ("cifar", "imagenet"))
    if len(full["mean"]) != len(full["std"]) or len(full["mean"]) not in (0, full["channels"]):
        raise BadInput(f"network keys mean and std need one value for each of the {full['channels']} channels, or none")
    if full["routes"] > 1 and full["members"] > 1:
        raise BadInput("a network has several routes or several members, not both")
    if any(value <= 0 for value in full["std"]):
        raise BadInput(f"network key std={full['std']} must be positive")
    return full


def build(spec: Mapping[str, Any], seed: int = 0) -> Classifier:
    """A network with fresh weights drawn from `seed`, on the CPU, in train mode. The global generator is left alone."""
    full = resolve(spec)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        if full["members"] > 1:
            members = [build({**full, "members": 1}, seed + number) for number in range(full["members"])]
            return ensemble(members, full)
        plain = Encoder(
            full["blocks"], full["width"], full["channels"], full["stem"], full["mean"], full["std"], full["padding"]
        )
        encoder = routed(plain, full["routes"]) if full["routes"] > 1 else plain
        return Classifier(encoder, nn.Linear(plain.dim, full["classes"]), full)


def ensemble(members: Sequence[Classifier], spec: dict[str, Any]) -> Classifier:
    """Several networks as one: its outputs are the logs of their mean probabilities, so gradients go through all."""
    heads = MeanProbability([member.head for member in members])
    return Classifier(Parallel([member.encoder for member in members]), heads, spec)  # type: ignore[arg-type]
