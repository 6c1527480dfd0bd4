"""Training by several processes (`torchrun`), which share the rows of every batch and nothing else.

Each process runs the whole training program on whole batches: the same views, noise, attack starts, losses (NT-Xent over
all negatives) and updates, since all of it is drawn and computed as one process does it. Only the networks of `SPLIT`,
where the work is, get a part of a batch's rows each: what goes in is cut, what comes out is gathered, and both pass on the
gradient that one process would have. BatchNorm within takes its statistics over all parts. What is left to add up are the
gradients of these networks' weights. A network outside of `SPLIT`, a projector or a head, is computed by every process.
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

SPLIT = (Encoder, PreActEncoder, UNet)
PATIENCE = datetime.timedelta(hours=1)  # how long a process waits for the others: one of them may download a data set


@dataclass(frozen=True)
class Processes:
    """How many processes train, and which of them this is, from 0. Process 0 alone writes and says anything."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def same(self, what: str, value: Any) -> None:
        """Wait for all, and BadInput where they do not see the same: each reads the store itself."""
        seen: list[Any] = [None] * self.count
        if self.count > 1:
            dist.all_gather_object(seen, value)
        if any(other != seen[0] for other in seen):
            raise BadInput(f"the processes see different {what}; give all the same command, its --store on one file system")

    @contextlib.contextmanager
    def after_first(self) -> Iterator[None]:
        """Inside, process 0 goes first, for instance to download what the others then find."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.count > 1:
            dist.barrier()

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Every process takes what process 0 has: k-means, for instance, may end elsewhere on another GPU."""
        if self.count > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    def decide(self, flag: bool) -> bool:
        """What process 0 says: clocks differ. No GPU waits for it."""
        if self.count == 1:
            return flag
        decision = torch.tensor(flag)
        dist.broadcast(decision, 0)
        return bool(decision)

    @contextlib.contextmanager
    def share(self, stage: nn.Module, learning: Iterable[Tensor], twice: bool = False) -> Iterator[None]:
        """Inside, the stage's networks of `SPLIT` share every batch's rows, and a backward pass leaves whole gradients.

        learning: the parameters that the optimiser updates. twice: whether gradients are differentiated again.
        """
        if self.count == 1:
            yield
            return
        networks = [module for module in stage.modules() if isinstance(module, SPLIT)]
        split = {id(weight) for network in networks for weight in network.parameters()}
        # A routed view of a network (`networks.routes`) has the network's own table of hooks: one pair for both.
        tables = {id(network._forward_hooks): network for network in networks}
        norms = {id(part): part for network in networks for part in network.modules() if type(part) is nn.BatchNorm2d}
        with contextlib.ExitStack() as ending:
            for network in tables.values():
                ending.enter_context(self._cut(network))
            for norm in norms.values():  # in place: views of a network hold the very same parts
                norm.__class__ = FusedBatchNorm if norm.weight.is_cuda and not twice else SharedBatchNorm
                ending.callback(setattr, norm, "__class__", nn.BatchNorm2d)
            for weight in learning:
                if weight.requires_grad:
                    share = 1 if id(weight) in split else self.count
                    ending.callback(weight.register_post_accumulate_grad_hook(_Adder(share)).remove)
            yield

    @contextlib.contextmanager
    def _cut(self, network: nn.Module) -> Iterator[None]:
        rows: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            rows.append(len(args[0]))
            return tuple(Cut.apply(arg, self) if isinstance(arg, Tensor) else arg for arg in args)

        def after(_: nn.Module, args: tuple[Any, ...], part: Tensor) -> Tensor:
            return Gather.apply(part, self, rows.pop())

        handles = network.register_forward_pre_hook(before), network.register_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def part(self, rows: int) -> slice:
        """This process's rows of so many."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started, this one among them, and its device: `cuda` is then the GPU of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(), choose_device(device)
        return
    where = choose_device(device)
    if where.type == "cuda":
        where = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if where.index is None else device)
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), where
        dist.barrier()  # whoever goes on finds what process 0 has written
    finally:
        dist.destroy_process_group()


def tensors_of(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a state dict, or of several in one."""
    for value in state.values():
        yield from tensors_of(value) if isinstance(value, Mapping) else [value]


class Cut(torch.autograd.Function):
    """All rows (B, ...), the same in every process, to this process's own."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, processes: Processes) -> Tensor:
        ctx.processes, ctx.rows = processes, len(whole)
        return whole[processes.part(len(whole))].clone()

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(part, ctx.processes, ctx.rows), None


class Gather(torch.autograd.Function):
    """This process's rows to all rows (B, ...). Whoever uses them does so in every process, hence the gradient is cut."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, processes: Processes, rows: int) -> Tensor:
        ctx.processes = processes
        whole = part.new_zeros(rows, *part.shape[1:])
        whole[processes.part(rows)] = part
        dist.all_reduce(whole)  # parts may differ in size; a sum with zeros is exact
        return whole

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, None, None]:
        return Cut.apply(whole, ctx.processes), None, None


class Sum(torch.autograd.Function):
    """The sum over processes, each of which goes on with it by itself: their gradients add up as well."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, own: Tensor) -> Tensor:
        return Sum.apply(own)


class FusedBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """BatchNorm over the rows of all processes by torch's kernels, which need a GPU and have no second derivative."""

    process_group = None  # all of them


class SharedBatchNorm(nn.BatchNorm2d):
    """The same written out: for the CPU, and where gradients are differentiated again."""

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
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _Adder:
    """A weight's gradient becomes the sum over processes, divided by `share`: what every process had whole is averaged."""

    def __init__(self, share: int) -> None:
        self.share = share

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        total = weight.grad.contiguous() / self.share
        dist.all_reduce(total)
        weight.grad.copy_(total)
