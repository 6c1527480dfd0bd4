"""PGD on a purified defence through a gradient by name: what papers on purifiers did, and what corrects it."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rush_bench.attacks.ablation import Switched
from rush_bench.attacks.cost import gradient_rows, prediction_rows
from rush_bench.attacks.package_count import counted
from rush_bench.defenses import Defense, Gradient, Network, Prediction
from rush_bench.defenses.body import blocks
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.samplers import TransformSampler, positions
from rush_bench.errors import BadInput
from rush_bench.noise import Stream
from rush_bench.settings import Count, NonNegative, Whole
from rush_bench.threats import Threat

NAMES = {"pgd-purifier": "PGD on a purifier through a gradient by name: exact, adjoint, bpda or blind (as published: adjoint)"}


@dataclass(frozen=True)
class PurifierPGD(Switched):
    """Defaults: as published. The adjoint's gradient at one draw, fresh at each of 40 steps of eps/4, the last iterate.

    `surrogate`: `exact`, `adjoint` and `bpda` are those of `Chain`; `blind` is the gradient of the network without its
    purifier, at the image. Whatever it is, points are judged behind the purifier. `states` is the weight of a loss beside
    that of the outcome: how far the states on the way back lie from those of the image, as in DiffAttack (Kang et al. 2023).

    With `keep="last"` the record says beside our count which images stood one noisy pass, as papers count
    (`official_correct`); the waterfall of T15 sets `surrogate`, `draws`, `keep` and `steps` in turn.
    """

    steps: Count = 40
    steeper: bool = False
    draws: Whole = 1
    keep: Literal["best", "last"] = "last"
    surrogate: Literal["exact", "adjoint", "bpda", "blind"] = "adjoint"
    states: NonNegative = 0.0

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        return Switched.run(self.on(defense), self._guided(defense), images, labels, threat, stream)  # type: ignore[arg-type]

    def recorded(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, dict[str, Any]]:
        attacked = self.run(defense, images, labels, threat, stream)
        if self.keep != "last":
            return attacked, {}
        return attacked, counted(defense.predict(attacked, stream.named("one pass")).labels == labels)

    def passes(self, defense: Defense) -> tuple[float, float]:
        guided, draws, steps = self._guided(defense), self.draws or defense.draws or 1, self.restarts * self.steps
        forward, backward = gradient_rows(guided.through, 1 if guided.blind else draws, self.loss)
        if self.states:  # the chain once more, without the classifier
            forward += draws * sum(guided.chain.rows[:2])
            backward += draws * guided.chain.rows[2]
        judged = super().passes(defense)[0] - steps * gradient_rows(defense, draws, self.loss)[0]
        one_pass = prediction_rows(defense) if self.keep == "last" else 0
        return steps * forward + judged + one_pass, steps * backward

    def _guided(self, defense: Defense) -> "_Guided":
        chain = getattr(defense, "transform", None)
        if not isinstance(defense, Network) or defense.deterministic or not isinstance(chain, Chain):
            raise BadInput(
                f"pgd-purifier is for a purifier in front of a network, Randomised(net, transform=Chain), not {defense.name}"
            )
        if self.states and self.surrogate != "exact":
            raise BadInput("a loss of the states goes with the exact gradient; set surrogate=exact, or states=0")
        return _Guided(defense, chain, self.surrogate, self.states)


class _Guided(Defense):
    """A purified defence, its network and counters shared: gradients by a surrogate, predictions unchanged."""

    def __init__(self, defense: Network, chain: Chain, surrogate: str, states: float) -> None:
        self.name, self.classes, self.shape, self.draws = defense.name, defense.classes, defense.shape, defense.draws
        self.device, self.precision, self.steepens = defense.device, defense.precision, defense.steepens
        self.passes, self.defense = defense.passes, defense
        self.chain, self.states, self.blind = chain, states, surrogate == "blind"
        assert isinstance(defense.sampler, TransformSampler)
        other = _as_they_are if self.blind else chain.with_gradient(surrogate)
        self.through = defense.with_sampler(defense.sampler.with_transform(other))

    def predict(self, images: Tensor, stream: Stream) -> Prediction:
        return self.defense.predict(images, stream)

    def to_climb(self, images: Tensor, stream: Stream) -> "_Guided":
        other = copy.copy(self)
        other.through = self.through.to_climb(images, stream)
        return other

    def predictions(self, images: Tensor, stream: Stream, repeats: int, *, exact: bool = True) -> Prediction:
        return self.defense.predictions(images, stream, repeats, exact=exact)

    def gradient(self, images: Tensor, labels: Tensor, loss: str, draws: int, stream: Stream) -> Gradient:
        found = self.through.gradient(images, labels, loss, 1 if self.blind else draws, stream)
        if not self.states:
            return found
        return Gradient(found.gradient + self.states * self._of_states(images, draws, stream), found.loss, found.scores)

    def _of_states(self, images: Tensor, draws: int, stream: Stream) -> Tensor:
        """Gradient (B, C, H, W) of the mean over draws of the states' squared distance, a mean over pixels and states."""
        where, out = positions(stream, len(images)), torch.zeros_like(images)
        for i, j in blocks(len(images), draws, self.defense.body.block(draws)):
            with torch.enable_grad():
                x, count, apart = images[i].detach().requires_grad_(), j.stop - j.start, list[Tensor]()

                def watch(k: int, state: Tensor, x: Tensor = x, count: int = count, apart: list[Tensor] = apart) -> None:
                    apart.append((state - self.chain.forward_mean(x, k).repeat_interleave(count, 0)).square().sum())

                self.chain(x, stream.at(where[i]).skip(j.start), count, watch)
                mean = torch.stack(apart).sum() / (len(apart) * draws * images[0].numel())
                out[i] += torch.autograd.grad(mean, x)[0]
        return out


def _as_they_are(images: Tensor, stream: Stream, draws: int) -> Tensor:
    return images[:, None].expand(-1, draws, -1, -1, -1)


def make(name: str) -> type[PurifierPGD]:
    return PurifierPGD
