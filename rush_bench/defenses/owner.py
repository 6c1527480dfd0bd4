"""The owner's network and our copy of it: what comes through the door is read, never changed."""

import copy
import hashlib
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rush_bench.errors import BadInput

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def private_copy(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the network on a device, no weight asking for a gradient; the owner's object is left as it is.

    Wrappers that change no answer come off: DataParallel, DistributedDataParallel, torch.compile. A network that cannot be
    copied (it holds a lock, a file, a hook that keeps features, ...) is used itself, and nothing of it is set; BadInput where
    it is on another device.
    """
    network = unwrapped(network)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in network.parameters()):
        raise BadInput("the network has lazy layers that have no weights yet; run it once on a batch of images first")
    try:
        if any(getattr(hook, "__closure__", None) for hook in _hooks(network)):  # a copy's hook would write into the original
            raise TypeError("it has a hook that is a function with variables of its own")
        # tensors that it keeps from a forward pass of its own have a history, which deepcopy refuses
        with torch.no_grad():  # TorchScript clones its weights, and would keep that as their history
            own = copy.deepcopy(network, {id(t): t.detach().clone() for t in _cached_tensors(network)})
    except Exception as error:
        if any(t.device != device for t in [*network.parameters(), *network.buffers()]):
            raise BadInput(
                f"the network cannot be copied to {device} ({type(error).__name__}: {error}); move it there yourself first"
            ) from error
        return network
    for weight in own.parameters():  # TorchScript has no requires_grad_ of the whole
        weight.requires_grad_(False)
    return own.to(device)


def _hooks(network: nn.Module) -> Iterator[Any]:
    """The hooks of its forward pass."""
    for module in network.modules():
        yield from (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def _cached_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history that are attributes of a module, or in a list or dict that is one."""
    for module in network.modules():
        for value in vars(module).values():
            inside = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            yield from (each for each in inside if isinstance(each, Tensor) and each.grad_fn is not None)


def unwrapped(network: Any) -> nn.Module:
    """The network inside wrappers that change no answer; BadInput for what is no network."""
    if not isinstance(network, nn.Module):
        raise BadInput(
            f"a defence is made of an nn.Module, not of {type(network).__name__}; put it into the forward of one of your own"
        )
    while True:
        if isinstance(network, WRAPPERS):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):  # torch.compile
            network = inner
        else:
            return network


def device_of(network: Any) -> torch.device:
    """Where the network's weights are; the CPU where it has none."""
    return next((p.device for p in unwrapped(network).parameters()), torch.device("cpu"))


def in_train_mode(network: nn.Module) -> list[nn.Module]:
    """Its parts that are in train mode; a frozen TorchScript network has no mode, nor has a graph of torch.export."""
    without = {id(part) for graph in network.modules() if exported(graph) for part in graph.modules()}
    return [part for part in network.modules() if getattr(part, "training", False) and id(part) not in without]


def exported(network: nn.Module) -> bool:
    """Whether it is `torch.export.export(...).module()`: what it does is fixed, though its parts say `training`."""
    return any(base.__module__ == "torch.export._unlift" for base in type(network).__mro__)


def half_precision(network: nn.Module) -> bool:
    """Whether any weight has 16 bits."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters())


def input_type(network: nn.Module) -> torch.dtype:
    """What its images must be: float64 where all its weights are, else float32."""
    kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return torch.float64 if kinds == {torch.float64} else torch.float32


def structure(network: nn.Module) -> str:
    """Its `repr`, as torch 2.14 writes it: under another version a network has the same records.

    2.11 does not write whether a normalisation has a bias, and only LayerNorm had a choice.
    """
    text = repr(network)
    for old in (r"(, affine=(True|False))(?=, track_running_stats=|\)$)", r"(LayerNorm\w*\(.*_affine=(True|False))(?=\)$)"):
        text = re.sub(old, r"\1, bias=\2", text, flags=re.MULTILINE)
    return text


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the network's structure and every parameter and buffer."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}\n{structure(network)}".encode())
    values: dict[str, Any] = network.state_dict()
    if isinstance(network, torch.jit.ScriptModule) and not values:  # frozen: its weights are constants of its graph
        graph: Any = network.graph
        constants = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]
        values = {f"{k:05}": node.t("value") for k, node in enumerate(constants) if node.kindOf("value") == "t"}
    for key, value in sorted(values.items()):
        if not isinstance(value, Tensor):  # what get_extra_state gave
            digest.update(f"{key} {value!r}".encode())
            continue
        plain = value.detach().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever runs inside, the global generators of torch, numpy and Python stay as they were."""
    states = np.random.get_state(), random.getstate()
    try:
        with own_generators(device):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def generator_states(device: torch.device) -> list[bytes]:
    """The states of torch's global generators, the CPU's and the device's, to be compared."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [state.numpy().tobytes() for state in states]
