"""Routed BatchNorm: several sets of BatchNorm behind one network, one for each kind of input (sources S2.3, S2.4).

Convolutions are shared, every BatchNorm (shortcuts included) has a set for each route: clean images take one, attacked
ones another. A routed network is a view: its convolutions and one of its routes *are* the tensors of the plain network
that it was made from, which is therefore at any moment that route as a network of its own.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CARRIED = "routes"  # where later stages of a training find the encoder with all its routes


class RoutedBatchNorm(nn.Module):
    """`sets[k]` are BatchNorms of one width; a forward pass goes through the one that `current` names."""

    def __init__(self, own: _BatchNorm, count: int, place: int) -> None:
        super().__init__()
        sets = [own if k == place else fresh(own) for k in range(count)]
        self.sets, self.current = nn.ModuleList(sets), place

    def forward(self, x: Tensor) -> Tensor:
        return self.sets[self.current](x)


def fresh(norm: _BatchNorm) -> _BatchNorm:
    """A newly initialised BatchNorm of the same shape: gamma 1, beta 0, statistics of N(0, 1)."""
    other = copy.deepcopy(norm)
    other.reset_parameters()
    return other


def routed(module: nn.Module, count: int, place: int = 0) -> nn.Module:
    """A view of a plain module with `count` routes, of which number `place` is the module's own BatchNorm.

    Weights are shared, not copied: training the view trains the module, and moving or loading either does both.
    """
    if isinstance(module, RoutedBatchNorm):
        raise ValueError("the module is routed already; take single_route of it first")
    if isinstance(module, _BatchNorm):
        return RoutedBatchNorm(module, count, place)
    if not module._modules:
        return module
    view = copy.copy(module)
    children = module._modules.items()
    view._modules = {name: None if child is None else routed(child, count, place) for name, child in children}
    return view


def routes(module: nn.Module) -> int:
    """How many routes a module has; 1 for a plain one."""
    return max((len(part.sets) for part in module.modules() if isinstance(part, RoutedBatchNorm)), default=1)


def set_route(module: nn.Module, number: int) -> None:
    """From now on inputs take this route; a plain module has route 0 only."""
    if not 0 <= number < routes(module):
        raise ValueError(f"route {number} of a network with {routes(module)}; routes count from 0")
    for part in module.modules():
        if isinstance(part, RoutedBatchNorm):
            part.current = number


@contextmanager
def route(module: nn.Module, number: int) -> Iterator[None]:
    """Inputs take this route inside the block; afterwards each BatchNorm has the one that it had before."""
    parts = [(part, part.current) for part in module.modules() if isinstance(part, RoutedBatchNorm)]
    set_route(module, number)
    try:
        yield
    finally:
        for part, before in parts:
            part.current = before


def single_route(module: nn.Module, number: int) -> nn.Module:
    """One route as a plain module of its own: all weights copied, nothing shared."""
    if not 0 <= number < routes(module):
        raise ValueError(f"route {number} of a network with {routes(module)}; routes count from 0")
    return _unrouted(copy.deepcopy(module), number)


def _unrouted(module: nn.Module, number: int) -> nn.Module:
    if isinstance(module, RoutedBatchNorm):
        return module.sets[number]
    for name, child in module.named_children():
        setattr(module, name, _unrouted(child, number))
    return module
