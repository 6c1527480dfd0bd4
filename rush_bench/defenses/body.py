"""A network behind a defence: the exact float32 one that judges, and a faster equivalent that searches (protocol 4)."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rush_bench.defenses import probe
from rush_bench.defenses.base import Passes
from rush_bench.defenses.memory import Peak
from rush_bench.defenses.owner import (
    device_of,
    generator_states,
    in_train_mode,
    input_type,
    own_generators,
    private_copy,
    undisturbed,
    weights_digest,
)
from rush_bench.devices import choose_device, full_precision, keep_freed_memory, wide
from rush_bench.errors import BadInput, unknown_name
from rush_bench.noise import Noise
from rush_bench.settings import Count, Positive, fits

Outputs = Literal["logits", "probabilities"]
Precision = Literal["float32", "bfloat16"]
NORMS = (nn.modules.batchnorm._NormBase,)
DEFAULT_MEMORY = 2 * 2**30
# Largest logit less smallest. Below TINY float64 begins to lose which log-probability is the largest: the logits are multiplied
# by a power of two for everything.
TINY = 1e-7
LEGIBLE = 0.1  # the same: below it float32 loses what changes
# Largest logit less the second (a class that is masked by -1e9 says nothing). Above SURE the gradient of float32's CE fades to
# 0: there AutoAttack gets it as LEADING, so that several times as much does not fade.
SURE, LEADING = 30.0, 5.0
CACHE = 2**25  # on a CPU blocks of this many bytes stay near the cache: 1.2 times as fast as twice the size on a small network
DRAWN = 4  # copies of an image that lie side by side while a draw of it is made and added
FEWEST = 32  # rows of such a block: with half as many a narrow ResNet-18 takes 1.1 times as long

Read = Callable[["Body", Tensor, bool], Tensor]  # (body, rows (R, C, H, W), exact) -> (R, K), or whatever a probe reads


class Body:
    """Runs a network on rows of noisy images, returns log-probabilities (R, K) in float32 and counts the passes.

    `network` is a copy of the owner's, on the device, weights frozen, and judges, in full precision. `search` is
    BatchNorm-folded where the network offers `folded()` and channels_last, each where it answers as `network` does, and
    bfloat16 if asked. Every call gets rows of its own, so a network may write on them. `before` is what a defence does to
    images in front of the network; a network that draws at random must be `random`, and searches as it judges: another layout
    draws in another order. `noise` is what will be added to its images, for the probes. `gain` multiplies the logits of a
    network that returns them, without another prediction for it (see `variant`). `varied` are the classes whose logits are
    not the same for all images, None if all are. `read` is how log-probabilities are read off rows; a probe may read
    something else.
    """

    classes: int
    gain: float = 1.0
    read: Read

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, int, int] = probe.SHAPE,
        device: torch.device | str | None = None,
        outputs: Outputs = "logits",
        precision: Precision = "float32",
        memory: int = DEFAULT_MEMORY,
        before: Callable[[Tensor], Tensor] | None = None,
        random: bool = False,
        noise: Noise | None = None,
    ) -> None:
        for option, given, kind in (("outputs", outputs, Outputs), ("precision", precision, Precision)):
            if given not in get_args(kind):
                raise unknown_name(option, str(given), get_args(kind))
        if not fits(tuple[Count, ...], shape) or len(shape) != 3:
            raise BadInput(f"shape {shape!r} must be the (channels, height, width) of the images, such as (3, 32, 32)")
        if not fits(Positive, memory):
            raise BadInput(f"memory {memory!r} must be the bytes that a step may use, such as 2**31")
        keep_freed_memory()
        self.shape, self.read = (shape[0], shape[1], shape[2]), log_probabilities
        self.device = device = choose_device(device_of(network) if device is None else device)
        self.network = private_copy(network, device)
        if any(not random or isinstance(module, NORMS) for module in in_train_mode(self.network)):
            raise BadInput(
                "the network's BatchNorm is in train mode: a prediction would depend on its batch; put the network in .eval(), "
                "then its dropout alone in .train()"
                if random
                else "the network is in train mode: its BatchNorm and dropout would change under attack; call .eval() "
                "first, or Randomised(network) where its dropout is to stay on"
            )
        self.wide = wide(device)  # of log-probabilities
        self.outputs, self.precision = outputs, precision
        self.before, self.random, self.passes = before or (lambda images: images), random, Passes()
        self.noise = noise
        self.weights, self.dtype = weights_digest(self.network), input_type(self.network)
        self.search, self.layout = self.network, torch.contiguous_format
        self.guard: Callable[[], AbstractContextManager[None]] = nullcontext
        with undisturbed(device), full_precision():  # a network may draw from the global generators, or seed them
            rows = probe.rows_for(shape, device, self.before)
            states = generator_states(device)
            probe.check_outputs(self, rows, shape)
            probe.check_search(self, probe.images_like(shape, device))
            if not random:
                self.search, self.layout = probe.fastest(self, rows)
            self.row_bytes = self._row_bytes(shape)
            if not random:
                probe.check_function(self, rows)
                probe.check_first_call(self, private_copy(network, device), rows)
            self.forward_bytes = self._forward_bytes(shape)
            with torch.no_grad():
                logits = self.outcome(rows, exact=True)
            self.varied, self.lead, self.spread = varied(logits), usual_lead(logits), usual_spread(logits)
            if outputs == "logits" and 0 < self.spread < TINY:
                self.gain = 2.0 ** math.floor(math.log2(TINY / self.spread))
                self.spread, self.lead = self.gain * self.spread, self.gain * self.lead
            seeds = not random and generator_states(device) != states
        if seeds:  # a fixed mask, say, that a seed of the global generators makes: they are given back after every call
            self.guard = lambda: own_generators(device)
        self.passes = Passes()
        self.limit(memory)

    @property
    def options(self) -> dict[str, Any]:
        """How it was made: what another body for the same images is made with."""
        return {name: getattr(self, name) for name in ("shape", "device", "outputs", "precision", "memory")}

    def variant(
        self, *, by: float = 1.0, read: Read | None = None, classes: int | None = None, precision: Precision | None = None
    ) -> "Body":
        """The same network and counters, its logits multiplied by a number, or read otherwise, as so many classes; searched in
        another precision."""
        other = copy.copy(self)
        other.precision = precision or self.precision
        other.gain, other.spread, other.lead = (by * value for value in (self.gain, self.spread, self.lead))
        other.read, other.classes, other.varied = read or self.read, classes or self.classes, None if read else self.varied
        return other

    def log_probabilities(self, batch: Tensor, *, exact: bool) -> Tensor:
        """(R, C, H, W) to (R, K) in float64, from the exact network or the searching one."""
        return self.read(self, batch, exact)

    def fold(self, copies: Tensor, exact: bool) -> Tensor:
        """Log-probabilities (B, k, K) of copies (B, k, C, H, W): the draws are folded into the batch."""
        return self.log_probabilities(copies.flatten(0, 1), exact=exact).unflatten(0, copies.shape[:2])

    def outcome(self, batch: Tensor, *, exact: bool) -> Tensor:
        """What the network says of rows (R, C, H, W), in float32: its logits (R, K), or the logarithms of its probabilities."""
        self.passes.forwards += len(batch)
        low = not exact and self.precision == "bfloat16"
        precisely = full_precision() if exact else nullcontext()
        with self.guard(), precisely, torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            out = self.outputs_of(self.network, batch) if exact else self.outputs_of(self.search, batch, self.layout)
        return out.clamp_min(1e-30).log() if self.outputs == "probabilities" else self.gain * out

    @property
    def legible(self) -> float:
        """What logits are multiplied with for float32. No more than that: other images may be further apart than probes."""
        return max(1.0, LEGIBLE / self.spread) if self.spread > 0 else 1.0

    def unsaturated(self) -> "Body":
        """The same network with logits at a scale where the largest usually leads by LEADING."""
        return self.variant(by=LEADING / self.lead)

    def outputs_of(self, network: nn.Module, batch: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Any:
        """What a network returns for rows (R, C, H, W): logits in float32 (R, K), or else whatever it is.

        An object with `logits`, as of HuggingFace, stands for these; `squeeze` may have taken the batch of one away.
        """
        out = network(batch.to(self.dtype, memory_format=layout, copy=True))
        out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
        if not isinstance(out, Tensor):
            return out
        return (out[None] if out.ndim == 1 and len(batch) == 1 else out).float()

    def block(self, draws: int) -> int:
        """Rows for one block: as many as memory takes, on a CPU rather fewer, but all draws of an image if they fit."""
        return min(self.rows, max(draws, self.brisk))

    def forward_block(self, draws: int) -> int:
        """Rows for one block of predictions, where nothing is saved for a backward pass."""
        return min(max(1, self.memory // self.forward_bytes), 4 * self.block(draws))

    def gradient(self, objective: Tensor, images: Tensor, rows: int) -> Tensor:
        """d objective / d images; `rows` network rows went into it."""
        self.count_backward(rows)
        return torch.autograd.grad(objective, images)[0]

    def count_backward(self, rows: int) -> None:
        """Note that `rows` network rows went backward."""
        self.passes.backwards += rows

    def limit(self, memory: int) -> None:
        """Let one block of an attack step take so many bytes."""
        self.memory, self.rows = memory, self.rows_of(memory)
        self.brisk = max(FEWEST, self.rows_of(CACHE)) if self.device.type == "cpu" else self.rows

    def rows_of(self, memory: int) -> int:
        """How many rows one block of an attack step may have in so many bytes, at least 1."""
        return max(1, memory // self.row_bytes)

    def _row_bytes(self, shape: tuple[int, int, int]) -> int:
        """What one row more takes: twice what autograd saves for it, as gradients lie beside it in the backward pass."""
        of_one, of_three = (self._saved_bytes(rows, shape) for rows in (1, 3))
        return of_three - of_one + 3 * 4 * math.prod(shape)

    def _forward_bytes(self, shape: tuple[int, int, int]) -> int:
        """What one row more takes in a prediction: what lives at once on its way through the network, and its draw."""
        of_one, of_three = (self._forward_peak(rows, shape) for rows in (1, 3))
        return (of_three - of_one) // 2 + DRAWN * 4 * math.prod(shape)

    def _forward_peak(self, rows: int, shape: tuple[int, int, int]) -> int:
        with torch.no_grad(), Peak() as peak:
            self.log_probabilities(self.before(torch.full((rows, *shape), 0.5, device=self.device)), exact=True)
        return peak.most

    def _saved_bytes(self, rows: int, shape: tuple[int, int, int]) -> int:
        """Bytes that autograd saves for the input gradient of so many rows, copies of weights included."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.full((rows, *shape), 0.5, device=self.device, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.log_probabilities(self.before(images), exact=False)
        return sum(saved.values())


def varied(logits: Tensor) -> Tensor | None:
    """The classes whose logit is not the same for all rows (R, K), None if that is all or but one; others may be masked."""
    varies = (logits.amax(0) > logits.amin(0)).nonzero()[:, 0]
    return varies if 1 < len(varies) < logits.shape[1] else None


def usual_spread(logits: Tensor) -> float:
    """The median over rows (R, K) of the largest logit less the smallest, of the classes that are `varied`."""
    seen = logits if (among := varied(logits)) is None else logits[:, among]
    return float((seen.amax(1) - seen.amin(1)).median())


def usual_lead(logits: Tensor) -> float:
    """The median over rows (R, K) of the largest logit less the second."""
    first, second = logits.topk(2, 1).values.unbind(1)
    return float((first - second).median())


def log_probabilities(body: Body, batch: Tensor, exact: bool) -> Tensor:
    """(R, C, H, W) to (R, K) in float64: float32 would lose which logit is the largest where all are tiny, since every
    log-probability is then near -log K."""
    out = body.outcome(batch, exact=exact).to(body.wide)
    return out if body.outputs == "probabilities" else out.log_softmax(1)


def blocks(batch: int, draws: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut batch x draws into pieces of at most `rows` rows: whole images first, draws only where one image is too many."""
    images = max(1, rows // draws)
    for i in range(0, batch, images):
        for j in range(0, draws, rows):
            yield slice(i, min(i + images, batch)), slice(j, min(j + rows, draws))


def whole_blocks(batch: int, repeats: int, draws: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut batch x (repeats x draws) likewise; a piece holds whole predictions of `draws` draws, or a part of one."""
    if draws <= rows:
        yield from blocks(batch, repeats * draws, rows - rows % draws)
        return
    for k in range(0, repeats * draws, draws):
        yield from ((i, slice(k + j.start, k + j.stop)) for i, j in blocks(batch, draws, rows))
