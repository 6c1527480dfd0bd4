"""Purifiers that are chains of random steps: their exact gradient in the memory of one step, and the surrogates of papers."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from rush_bench.defenses.base import Passes
from rush_bench.errors import BadInput, unknown_name
from rush_bench.noise import Gaussian, Stream

Surrogate = Literal["exact", "adjoint", "bpda"]
Watch = Callable[[int, Tensor], None]
Draw = Callable[[int], Tensor]  # k -> the standard normal noise of step k, the same at every call
STANDARD = Gaussian(1.0)


class Chain(nn.Module):
    """A transform for `Randomised`: images -> `start` -> `step` 1 .. `length` -> `finish`, with noise of their own each.

    A subclass sets `length` and writes the three; none of them may draw or mix rows. The noise of step k for image i and draw
    j is a function of the stream (A5): the backward pass meets the noise of the forward pass, and no batch size changes it.

    `gradient` says what the backward pass computes; the forward pass is the same under all three:

    - `exact`: the derivative of what the chain computes. Steps are checkpointed: the states are kept, and all but the last
      step run again on the way back, so that memory is one step's activations plus a state per step.
    - `adjoint`: the adjoint of the underlying differential equation (DiffPure: Nie et al. 2022, section 3.3; Li et al. 2020)
      in the steps of the chain. Nothing is kept but the last state; each earlier one is reconstructed by running the step
      backwards from its outcome, x_k ~ x_{k+1} - (step(x_{k+1}) - x_{k+1}), and the step is differentiated there. Exact as
      steps become small, and wrong by what the discretisation does where they are few: as published.
    - `bpda`: the identity (Athalye et al. 2018): the gradient at the purified image, taken for that at the image.

    `passes`, where a defence counts: each row through a step counts as one row, its repetition on the way back included.
    """

    length: int
    gradient: Surrogate = "exact"
    passes: Passes

    def __init__(self) -> None:
        super().__init__()
        self.passes = Passes()

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (R, C, H, W) in [0,1] and noise of their shape -> the first state."""
        raise NotImplementedError

    def step(self, state: Tensor, k: int, noise: Tensor) -> Tensor:
        """State (R, ...) after step k, 1 .. length."""
        raise NotImplementedError

    def finish(self, state: Tensor) -> Tensor:
        """The last state as images."""
        raise NotImplementedError

    def forward_mean(self, images: Tensor, k: int) -> Tensor:
        """What the state after step k is compared with by a loss of the states: there, the images with noise at its mean."""
        raise BadInput(f"{type(self).__name__} has no forward_mean(images, k), which a loss of its states needs; add one")

    def forward(self, images: Tensor, stream: Stream, draws: int, watch: Watch | None = None) -> Tensor:
        """(B, C, H, W) to (B, draws, C, H, W), for draws 0 .. draws-1 of the stream.

        `watch(k, state)` sees every state (B * draws, ...) in the graph, 0 being the first: a loss of them may be
        differentiated with that of the outcome, in the same memory. It needs the exact gradient.
        """

        def noise(k: int) -> Tensor:
            own = dataclasses.replace(stream, purpose=f"{stream.purpose}/step{k}")  # `named` would start again at draw 0
            drawn = own.noise(STANDARD, len(images), draws, tuple(images.shape[1:]), images.device)
            return drawn.flatten(0, 1).to(images.dtype)

        copies = images[:, None].expand(-1, draws, -1, -1, -1).flatten(0, 1)
        differentiated = torch.is_grad_enabled() and copies.requires_grad
        if watch is not None and self.gradient != "exact":
            raise BadInput(f"a loss of the states needs gradient='exact', not {self.gradient!r}")
        if not differentiated or self.gradient == "exact":
            out = self.finish(self._run(self.start(copies, noise(0)), noise, watch))
        elif self.gradient == "adjoint":
            out = self.finish(_Adjoint.apply(self.start(copies, noise(0)), self, noise))
        else:
            with torch.no_grad():
                out = self.finish(self._run(self.start(copies, noise(0)), noise))
            out = out + (copies - copies.detach())  # plus 0, whose slope is 1
        return out.unflatten(0, (len(images), draws))

    def with_gradient(self, gradient: str) -> Self:
        """The same chain, its network shared, with another backward pass."""
        if gradient not in get_args(Surrogate):
            raise unknown_name("gradient", gradient, get_args(Surrogate))
        other = copy.copy(self)
        other.gradient = gradient  # type: ignore[assignment]
        return other

    def counted(self, passes: Passes) -> Self:
        """The same chain, its network shared, that counts its rows there."""
        other = copy.copy(self)
        other.passes = passes
        return other

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows through steps that one copy takes: forward, again on the way back, and back."""
        again = {"exact": self.length - 1, "adjoint": self.length, "bpda": 0}[self.gradient]
        return self.length, again, 0 if self.gradient == "bpda" else self.length

    def extra_repr(self) -> str:
        """What decides its answers beside weights: it enters the identity of a defence, and so the key of a record."""
        return f"length={self.length}" + ("" if self.gradient == "exact" else f", gradient={self.gradient}")

    def _run(self, state: Tensor, noise: Draw, watch: Watch | None = None) -> Tensor:
        if watch is not None:
            watch(0, state)
        for k in range(1, self.length + 1):
            # the last step runs once: its activations live no longer than those of a step that is repeated
            whole = k == self.length or not (torch.is_grad_enabled() and state.requires_grad)
            state = self._taken(state, k, noise) if whole else _Step.apply(state, self, k, noise)
            if watch is not None:
                watch(k, state)
        return state

    def _taken(self, state: Tensor, k: int, noise: Draw) -> Tensor:
        """One step, counted, there and back."""
        self.passes.forwards += len(state)
        after = self.step(state, k, noise(k))
        if after.requires_grad:
            after.register_hook(self._count_back)
        return after

    def _count_back(self, gradient: Tensor) -> None:
        self.passes.backwards += len(gradient)


class _Step(torch.autograd.Function):
    """A step that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, chain: Chain, k: int, noise: Draw) -> Tensor:
        ctx.save_for_backward(state)
        ctx.rest = chain, k, noise
        return chain._taken(state, k, noise)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        chain, k, noise = ctx.rest
        return _backpropagate_step(chain, ctx.saved_tensors[0], k, noise, upstream[0])[0], None, None, None


class _Adjoint(torch.autograd.Function):
    """All steps; keeps the last state alone."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, chain: Chain, noise: Draw) -> Tensor:
        last = chain._run(state, noise)
        ctx.save_for_backward(last)
        ctx.rest = chain, noise
        return last

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        chain, noise = ctx.rest
        (state,), gradient = ctx.saved_tensors, upstream[0]
        for k in range(chain.length, 0, -1):
            gradient, after = _backpropagate_step(chain, state, k, noise, gradient)
            state = 2 * state - after  # x - (step(x) - x)
        return gradient, None, None


def _backpropagate_step(chain: Chain, state: Tensor, k: int, noise: Draw, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient after step k as one before it, the step being taken (again) from `state`; and where it leads."""
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        after = chain._taken(state, k, noise)
        return torch.autograd.grad(after, state, gradient)[0], after.detach()
