"""Training by several processes (`torchrun`), which split every batch and nothing else.

Each process runs the whole training program on whole batches: the same views, noise, attack starts, losses (NT-Xent over
all negatives) and updates, drawn and computed as one process does it. Only the networks of `SPLIT_NETWORKS`, which take most
of the time, get a part of each batch: their inputs are cut, their outputs gathered, and both pass on the gradient that one
process would have. Their BatchNorm takes its statistics over all parts, and the gradients of their weights are added up.
Every process computes any other network, such as a projector or a head, on the whole batch.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rush_bench.devices import choose_device
from rush_bench.errors import BadInput
from rush_bench.networks.ddpm import UNet
from rush_bench.networks.preact import PreActEncoder
from rush_bench.networks.resnet import Encoder

SPLIT_NETWORKS = (Encoder, PreActEncoder, UNet)
TIMEOUT = datetime.timedelta(hours=1)  # how long a process waits for the others: one of them may download a data set


@dataclass(frozen=True)
class Processes:
    """How many processes train, and the rank of this one. Process 0 alone writes files and prints."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def require_same(self, what: str, value: Any) -> None:
        """Wait for all processes; BadInput where their values differ, since each reads the store itself."""
        values: list[Any] = [None] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise BadInput(f"the processes see different {what}; give all the same command, its --store on one file system")

    @contextlib.contextmanager
    def first_process_goes_first(self) -> Iterator[None]:
        """Process 0 runs the block first, for instance to download what the others then find."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.count > 1:
            dist.barrier()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Every process takes the tensors of process 0: k-means, for instance, may end differently on another GPU."""
        if self.count > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    def broadcast_flag(self, flag: bool) -> bool:
        """The flag of process 0, since clocks differ. No GPU waits for it."""
        if self.count == 1:
            return flag
        decision = torch.tensor(flag)
        dist.broadcast(decision, 0)
        return bool(decision)

    @contextlib.contextmanager
    def split_batches(self, stage: nn.Module, learning: Iterable[Tensor], second_order: bool = False) -> Iterator[None]:
        """Inside the block the stage's networks of `SPLIT_NETWORKS` split every batch; a backward pass leaves whole gradients.

        learning: the parameters that the optimiser updates. second_order: whether gradients are differentiated again.
        """
        if self.count == 1:
            yield
            return
        networks = [module for module in stage.modules() if isinstance(module, SPLIT_NETWORKS)]
        split = {id(weight) for network in networks for weight in network.parameters()}
        # A routed view of a network (`networks.routes`) has the network's own table of hooks: one pair for both.
        tables = {id(network._forward_hooks): network for network in networks}
        norms = {id(part): part for network in networks for part in network.modules() if type(part) is nn.BatchNorm2d}
        with contextlib.ExitStack() as ending:
            for network in tables.values():
                ending.enter_context(self._split(network))
            for norm in norms.values():  # in place: views of a network hold the very same parts
                norm.__class__ = FusedBatchNorm if norm.weight.is_cuda and not second_order else SharedBatchNorm
                ending.callback(setattr, norm, "__class__", nn.BatchNorm2d)
            for weight in learning:
                if weight.requires_grad:
                    copies = 1 if id(weight) in split else self.count
                    ending.callback(weight.register_post_accumulate_grad_hook(_SumGradient(copies)).remove)
            yield

    @contextlib.contextmanager
    def _split(self, network: nn.Module) -> Iterator[None]:
        sizes: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            sizes.append(len(args[0]))
            return tuple(TakePart.apply(arg, self) if isinstance(arg, Tensor) else arg for arg in args)

        def after(_: nn.Module, args: tuple[Any, ...], part: Tensor) -> Tensor:
            return Gather.apply(part, self, sizes.pop())

        handles = network.register_forward_pre_hook(before), network.register_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def part(self, size: int) -> slice:
        """This process's part of a batch of `size` images."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started and the device of this one: `cuda` is the GPU of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(), choose_device(device)
        return
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if chosen.index is None else device)
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), chosen
        dist.barrier()  # afterwards every process finds what process 0 has written
    finally:
        dist.destroy_process_group()


def tensors_of(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a state dict, or of several in one."""
    for value in state.values():
        yield from tensors_of(value) if isinstance(value, Mapping) else [value]


class TakePart(torch.autograd.Function):
    """A whole batch (B, ...), the same in every process, to this process's part of it."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, processes: Processes) -> Tensor:
        ctx.processes, ctx.size = processes, len(whole)
        return whole[processes.part(len(whole))].clone()

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(part, ctx.processes, ctx.size), None


class Gather(torch.autograd.Function):
    """This process's part to the whole batch (B, ...), which every process then uses alike: the gradient is cut again."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, processes: Processes, size: int) -> Tensor:
        ctx.processes = processes
        whole = part.new_zeros(size, *part.shape[1:])
        whole[processes.part(size)] = part
        dist.all_reduce(whole)  # parts may differ in size; a sum with zeros is exact
        return whole

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, None, None]:
        return TakePart.apply(whole, ctx.processes), None, None


class Sum(torch.autograd.Function):
    """The sum over processes. Each process continues with it on its own, so that the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Sum.apply(gradient)


class FusedBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """BatchNorm over the whole batch by torch's kernels, which need a GPU and have no second derivative."""

    process_group = None  # all of them


class SharedBatchNorm(nn.BatchNorm2d):
    """The same in plain operations: for the CPU, and where gradients are differentiated again."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide, axes, shape = x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), (1, -1, 1, 1)
        totals = Sum.apply(torch.cat([wide.sum(axes), wide.new_tensor([x.numel() / x.shape[1]])]))
        mean, count = totals[:-1] / totals[-1], totals[-1].detach()
        centred = wide - mean.view(shape)
        variance = Sum.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * (variance + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _SumGradient:
    """A weight's gradient becomes the sum over processes, divided by `copies`: the processes that have all of it."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        total = weight.grad.contiguous() / self.copies
        dist.all_reduce(total)
        weight.grad.copy_(total)
