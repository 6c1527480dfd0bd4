"""A network behind a defence: the exact float32 one that judges, and a faster equivalent that searches (protocol A7)."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rush_bench.defenses.base import Passes
from rush_bench.errors import BadInput, RushBenchError

Precision = Literal["float32", "bfloat16"]
NORMS = (nn.modules.batchnorm._NormBase,)
DEFAULT_MEMORY = 2 * 2**30
CACHE = 2**26  # on a CPU blocks of this many bytes stay near the cache: 1.3 times as fast as blocks of 300 MB


class Body:
    """Runs a network on rows of noisy images, returns log-probabilities (R, K) in float32 and counts the passes.

    `search` is BatchNorm-folded where the network offers `folded()`, channels_last, weights frozen, and bfloat16 if asked.
    `before` is what a defence does to images in front of the network; a network that draws at random must be `random`.
    `gain` multiplies the logits of a network that returns them, without another prediction for it (see `audit.scale`).
    """

    gain: float = 1.0

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, int, int],
        device: torch.device,
        outputs: Literal["logits", "probabilities"] = "logits",
        precision: Precision = "float32",
        memory: int = DEFAULT_MEMORY,
        before: Callable[[Tensor], Tensor] | None = None,
        random: bool = False,
    ) -> None:
        if any(module.training and (not random or isinstance(module, NORMS)) for module in network.modules()):
            raise BadInput(
                "the network's BatchNorm is in train mode: a prediction would hang on its batch; put the network in .eval(), "
                "then its dropout alone in .train()"
                if random
                else "the network is in train mode: its BatchNorm and dropout would change under attack; call .eval() "
                "first, or Randomised(network) where its dropout is to stay on"
            )
        self.network = network.to(device).requires_grad_(False)
        self.device, self.outputs, self.precision, self.memory = device, outputs, precision, memory
        self.before, self.random, self.passes = before or (lambda images: images), random, Passes()
        folded: Any = network.folded() if hasattr(network, "folded") and not random else network  # type: ignore[operator]
        # channels_last is the layout of the fast convolutions, on CUDA and in oneDNN alike
        self.search = folded.to(device=device, memory_format=torch.channels_last)
        with own_generators(self.device):  # a network may draw from torch's global generators
            self.classes = self._probe(shape)
            self.rows = self._rows_in(shape)
        self.brisk = max(1, self.rows * CACHE // memory) if device.type == "cpu" else self.rows

    def log_probabilities(self, rows: Tensor, *, exact: bool) -> Tensor:
        """(R, C, H, W) to (R, K), from the exact network or the searching one; NaN is an error."""
        out = self.outcome(rows, exact=exact)
        return out if self.outputs == "probabilities" else out.log_softmax(1)

    def outcome(self, rows: Tensor, *, exact: bool) -> Tensor:
        """What the network says of rows (R, C, H, W), in float32: its logits (R, K), or the logarithms of its probabilities."""
        self.passes.forwards += len(rows)
        if exact:
            out = self.network(rows)
        else:
            rows = rows.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                out = self.search(rows)
        out = out.float()
        return out.clamp_min(1e-30).log() if self.outputs == "probabilities" else self.gain * out

    def block(self, draws: int) -> int:
        """Rows for one block: as many as memory takes, on a CPU rather fewer, but all draws of an image if they fit."""
        return min(self.rows, max(draws, self.brisk))

    def gradient(self, objective: Tensor, images: Tensor, rows: int) -> Tensor:
        """d objective / d images; `rows` network rows went into it."""
        self.count_backward(rows)
        return torch.autograd.grad(objective, images)[0]

    def count_backward(self, rows: int) -> None:
        """Note that `rows` network rows went backward."""
        self.passes.backwards += rows

    def _probe(self, shape: tuple[int, int, int]) -> int:
        probe = torch.linspace(0, 1, 2 * shape[0] * shape[1] * shape[2], device=self.device).reshape(2, *shape)
        try:
            with torch.inference_mode():
                rows = self.before(probe)
                out, *again = (self.network(rows) for _ in range(1 if self.random else 3))
        except RuntimeError as error:
            raise BadInput(f"the network does not take images of shape {shape}: {error}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
            raise BadInput(f"the network must return logits (B, classes), not {getattr(out, 'shape', type(out).__name__)}")
        if not out.isfinite().all():
            raise BadInput("the network returns values that are not finite; look at its weights")
        if any(differ(out, other) for other in again):
            raise BadInput(
                "the network draws at random: the same images gave other logits at each call; say so, as in "
                "Randomised(network, votes=1), which the function of --model may return too, or take its randomness out"
            )
        looks = bool((out >= 0).all() and (out.sum(1) - 1).abs().max() < 1e-4)
        if looks and self.outputs == "logits":
            raise BadInput(
                "the network returns probabilities where logits are meant, which flattens gradients; "
                'return logits, or say outputs="probabilities"'
            )
        if not looks and self.outputs == "probabilities":
            raise BadInput('outputs="probabilities" was said, but the rows that the network returns do not sum to 1')
        return out.shape[1]

    def _rows_in(self, shape: tuple[int, int, int]) -> int:
        """How many rows fit in the memory budget, from the bytes that autograd saves for one row more."""
        one, three = (self._saved(rows, shape) for rows in (1, 3))
        self.passes = Passes()
        # twice: the backward pass holds gradients beside what was saved; and the images, noise and their sum
        return max(1, self.memory // (three - one + 3 * 4 * math.prod(shape)))

    def _saved(self, rows: int, shape: tuple[int, int, int]) -> int:
        """Bytes that autograd saves for the input gradient of so many rows, copies of weights included."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.full((rows, *shape), 0.5, device=self.device, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.log_probabilities(self.before(images), exact=False)
        if not out.requires_grad:
            raise BadInput(
                "no gradient reaches the images: the network detaches its input; pass a form of it that is differentiable, "
                "such as the identity in the backward pass of a step that has no gradient (BPDA)"
            )
        return sum(saved.values())


@contextmanager
def own_generators(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Inside, torch's global generators (the CPU's and the device's) start from `seed`; outside they stay as they were."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs for the same rows are further apart than rounding explains."""
    return bool((one - other).abs().max() > 1e-4 * one.abs().max().clamp_min(1e-6))


def blocks(batch: int, draws: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut batch x draws into pieces of at most `rows` rows: whole images first, draws only where one image is too many."""
    images = max(1, rows // draws)
    for i in range(0, batch, images):
        for j in range(0, draws, rows):
            yield slice(i, min(i + images, batch)), slice(j, min(j + rows, draws))


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the network's structure and every parameter and buffer."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}\n{network!r}".encode())
    for key, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(values: Tensor, images: Tensor | None, what: str) -> None:
    """A value that is not finite is an error that names the image."""
    wrong = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
    if wrong.any():
        row = int(wrong.int().argmax())
        image = row if images is None or images.numel() != len(values) else int(images[row])
        raise RushBenchError(f"{what} of image {image} is not finite; look at the network's outputs there")
