"""`build(spec)` and the `Classifier` it returns."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.errors import BadInput
from rush_bench.networks.ensemble import MeanProbability, Parallel
from rush_bench.networks.preact import PreActEncoder, Style
from rush_bench.networks.resnet import Encoder, fold_batchnorm
from rush_bench.networks.routes import route, routed, routes, single_route
from rush_bench.networks.specs import resolve


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


def build(spec: Mapping[str, Any], seed: int = 0) -> Classifier:
    """A network with fresh weights drawn from `seed`, on the CPU, in train mode. The global generator is left alone."""
    full = resolve(spec)
    if full["name"] == "ensemble":
        return ensemble([build(member, seed + number) for number, member in enumerate(full["members"])], full)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        if full["members"] > 1:
            members = [build({**full, "members": 1}, seed + number) for number in range(full["members"])]
            return ensemble(members, full)
        plain = encoder_of(full)
        encoder = routed(plain, full["routes"]) if full["routes"] > 1 else plain
        return Classifier(encoder, nn.Linear(plain.dim, full["classes"]), full)


def encoder_of(full: Mapping[str, Any]) -> Encoder | PreActEncoder:
    """The encoder of a resolved spec, with one route, drawn from the global generator."""
    shape, images = (full["blocks"], full["width"]), (full["mean"], full["std"])
    block = full.get("block", "basic")
    if not block.startswith("preact"):
        return Encoder(*shape, full["channels"], full["stem"], *images, full["padding"], block == "bottleneck")
    fields = {field.name: full[field.name] for field in dataclasses.fields(Style) if field.name != "bottleneck"}
    style = Style(bottleneck=block == "preact-bottleneck", **fields)
    rest = {key: full[key] for key in ("stem_width", "channels", "mean", "std", "standardise", "padding")}
    return PreActEncoder(*shape, style, **rest)


def ensemble(members: Sequence[Classifier], spec: dict[str, Any]) -> Classifier:
    """Several networks as one: its outputs are the logs of their mean probabilities, so gradients go through all."""
    heads = MeanProbability([member.head for member in members])
    return Classifier(Parallel([member.encoder for member in members]), heads, spec)  # type: ignore[arg-type]
