"""Purification by diffusion (DiffPure: Nie et al. 2022): noise up to a time t*, then the reverse steps of a DDPM."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.defenses.chain import Chain, Surrogate
from rush_bench.errors import BadInput
from rush_bench.networks.ddpm import UNet, linear_schedule


class Purifier(Chain):
    """A transform for `Randomised`: x -> sqrt(a) x + sqrt(1 - a) n at time `start`, then `steps` reverse steps to time 0.

    `network(x, t)` predicts the noise in x (R, C, H, W), about [-1,1], at times t (R,) int64, counted from 0 as in Ho et al.'s
    code; a copy of it is kept, in eval mode. `alpha_bars` (T,): the products of 1 - beta. The steps are those of DDIM (Song et
    al. 2021, eq. 12 and 16) at evenly spaced times: eta=1 is ancestral sampling of the DDPM, with the variance of the
    posterior, eta=0 draws nothing after the first noise. Nothing is clipped: a clamp would take gradients away.
    """

    def __init__(
        self,
        network: nn.Module,
        alpha_bars: Tensor,
        *,
        start: int,
        steps: int,
        eta: float = 1.0,
        gradient: Surrogate = "exact",
    ) -> None:
        super().__init__()
        if not 1 <= steps <= start <= len(alpha_bars):
            raise BadInput(f"purification needs 1 <= steps <= start <= {len(alpha_bars)} times, not {steps} steps from {start}")
        if not 0 <= eta <= 1:
            raise BadInput(f"eta={eta} must lie between 0 (nothing drawn after the first noise) and 1 (ancestral sampling)")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        self.length, self.eta, self.gradient = steps, eta, gradient
        self.times = [round(start * (steps - k) / steps) for k in range(steps + 1)]
        self.signals = [float(alpha_bars[t - 1]) if t else 1.0 for t in self.times]  # alpha-bar of each state

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """Ho et al. eq. 4 at time t*."""
        return self.forward_mean(images, 0) + (1 - self.signals[0]) ** 0.5 * noise

    def forward_mean(self, images: Tensor, k: int) -> Tensor:
        return self.signals[k] ** 0.5 * (2 * images - 1)

    def step(self, state: Tensor, k: int, noise: Tensor) -> Tensor:
        """DDIM eq. 12, with the sigma of eq. 16; for consecutive times and eta=1, Ho et al. algorithm 2."""
        a, b = self.signals[k - 1], self.signals[k]
        t = torch.full((len(state),), self.times[k - 1] - 1, dtype=torch.int64, device=state.device)
        predicted = self.network(state, t)
        image = (state - (1 - a) ** 0.5 * predicted) / a**0.5
        sigma = self.eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        return b**0.5 * image + (1 - b - sigma**2) ** 0.5 * predicted + sigma * noise

    def finish(self, state: Tensor) -> Tensor:
        """From [-1,1] back to [0,1]; not clipped."""
        return (state + 1) / 2

    def extra_repr(self) -> str:
        return f"times={self.times}, signals={self.signals}, eta={self.eta}, {super().extra_repr()}"


def purifier_from(spec: Mapping[str, Any], channels: int, weights: Mapping[str, Tensor] | None) -> Purifier:
    """The purifier of a card: `{"timesteps": 100, "start": 15, "steps": 3, "eta": 1.0, "width": 8, "multipliers": [1, 2, 2]}`.

    Without weights an untrained one, which costs the same. RuntimeError, of `load_state_dict`, for weights that do not fit.
    """
    network = UNet(channels, spec["width"], spec["multipliers"])
    if weights is not None:
        network.load_state_dict(dict(weights))
    return Purifier(network, linear_schedule(spec["timesteps"]), start=spec["start"], steps=spec["steps"], eta=spec["eta"])
