"""A CUDA device for machines that have none: tensors that hold CPU data, say `cuda:0`, and refuse what CUDA refuses.

Under `fake_cuda()` every operation on such a tensor is computed on the CPU, so that its numbers are the CPU's own. What raises
as it would on a GPU: tensors of both devices in one operation (scalars and copies apart), `numpy()` of a tensor on the device,
a generator of the other device. What makes a program wait for a GPU is counted by kind (`Waits`): a number read on the host,
a shape that depends on values (`nonzero`, a mask as an index), and a blocking copy, in either direction.

It knows nothing of streams, memory or kernels: no speed, and no rounding of a real device. Autocast on the device is off.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DEVICE_NAME = "make-believe CUDA"

# what the host reads: a number, or how many values there are
READS = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select", "aten.bincount"}
READS |= {"aten._unique2", "aten.unique_dim", "aten.unique_consecutive", "aten.repeat_interleave.Tensor"}
MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
PARSE = torch._C._nn._parse_to
INDEXED = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class Waits(Counter[str]):
    """How often the host would have waited for the device, by what made it wait."""

    def clear_and(self, run: Any, *arguments: Any, **named: Any) -> Any:
        """What `run` returns; only its waits are counted from here on."""
        self.clear()
        return run(*arguments, **named)


class CudaTensor(Tensor):
    """`inner` holds the values. torch's own code sees a tensor without data (`meta`), Python code one on `cuda:0`."""

    inner: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CudaTensor":
        assert not isinstance(inner, CudaTensor)
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",
        )
        self.inner = inner
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def numpy(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **named: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaTensor":
        other = CudaTensor(self.detach().inner.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            other._is_param = True
        memo[id(self)] = other
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch.load would put it back on the device that it is told; a file made here is read on the CPU
        return self.detach().inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("this tensor's device is make-believe: it is of use inside fake_cuda() alone")


class _Device(TorchDispatchMode):
    """Computes what is asked of tensors of the device, on the CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits, self.generator = waits, torch.Generator().manual_seed(0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; saying so to torch would import its compiler and double the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            kwargs, (name, draws) = dict(kwargs or {}), _about(func)
            mine, theirs = dict[int, CudaTensor](), list[Tensor]()
            inside = functools.partial(_inside, mine=mine, theirs=theirs)
            args_inside, kwargs_inside = tuple(map(inside, args)), {key: inside(each) for key, each in kwargs.items()}
            # torch's own code takes the device to be meta, and makes tensors there beside ours
            made = (device := kwargs.get("device")) is not None and device.type == "meta"
            if not mine and not made:
                return func(*args, **kwargs)
            if mine and theirs:
                self._meet(name, func, args)
            self._count(name, args)
            if device is not None:
                kwargs_inside["device"] = CPU
            if draws and kwargs.get("generator") is None:
                kwargs_inside["generator"] = self.generator
            return _outside(func(*args_inside, **kwargs_inside), mine)

    def _meet(self, name: str, func: Any, args: Any) -> None:
        """Refuse tensors of both devices in one operation, but for a copy between them and an index from the CPU."""
        if name == "aten.copy_":
            self.waits["copy"] += 1
            return
        values = args[2] if name in INDEXED and len(args) > 2 else None
        if name in INDEXED and isinstance(args[0], CudaTensor) and (values is None or _at_home(values)):
            self.waits["index from the CPU"] += 1
            return
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu! ({func})")

    def _count(self, name: str, args: Any) -> None:
        if name in READS:
            self.waits[name.removeprefix("aten.")] += 1
        elif name in INDEXED and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]):
            # one number for all that a mask selects is a masked fill, without a count
            fills = name != "aten.index" and len(args[1]) == 1 and args[2].numel() == 1
            self.waits["mask as an index"] += 0 if fills else 1


class Generator(torch.Generator):
    """`torch.Generator` for both devices: draws what one on the CPU draws, from the same seed."""

    on: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        self = super().__new__(cls)
        self.on = CUDA if _is_cuda(device) else torch.device(device)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return CudaTensor(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.inner if isinstance(gradient, CudaTensor) else gradient


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: CudaTensor) -> Tensor:  # type: ignore[override]
        return x.detach().inner.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return CudaTensor(gradient)


class _Door(TorchFunctionMode):
    """Where tensors get from one device to the other: `to` and its kin, and what makes tensors on a device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MOVES:
            return self._moved(func, *args, **kwargs or {})
        if func in INDEXING and isinstance(args[0], CudaTensor):
            return func(args[0], _index(args[1]), *args[2:])
        if func is torch.nn.functional.one_hot and isinstance(args[0], CudaTensor):  # it looks at values, on the CPU alone
            return CudaTensor(func(args[0].inner, *args[1:], **kwargs or {}))
        if not kwargs or func is PARSE:
            return func(*args, **kwargs or {})
        self._check_generator(args, kwargs)
        if not _is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        kwargs = {**kwargs, "device": CPU}
        if func in (torch.tensor, torch.as_tensor):
            if isinstance(args[0], CudaTensor):
                return func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            self.waits["copy"] += 1
        wanted = kwargs.pop("requires_grad", False)
        made = CudaTensor(func(*args, **kwargs))
        return made.requires_grad_() if wanted else made

    def _moved(self, func: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        device, left = kwargs.pop("device", None), []
        for each in rest:
            if isinstance(each, str | torch.device):
                device = each
            elif isinstance(each, Tensor):
                device, left = each.device, [each.dtype]
            elif isinstance(each, torch.dtype):
                left.append(each)
            elif isinstance(each, bool):  # non_blocking, by its place
                kwargs.setdefault("non_blocking", each)
        if func is not Tensor.to:
            device = CUDA if func is Tensor.cuda else CPU
        waits = not kwargs.pop("non_blocking", False)
        if device is not None and _is_cuda(device) != isinstance(x, CudaTensor):
            self.waits["copy"] += waits
            x = _Up.apply(x) if _is_cuda(device) else _Down.apply(x)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return Tensor.to(x, *left, **kwargs) if left or kwargs else x

    def _check_generator(self, args: Any, kwargs: Any) -> None:
        if (generator := kwargs.get("generator")) is None:
            return
        device = kwargs.get("device") or (CUDA if args and isinstance(args[0], CudaTensor) else CPU)
        if _is_cuda(device) != _is_cuda(generator.device):
            raise RuntimeError(f"Expected a {device} device type for generator but found {generator.device}")


@contextlib.contextmanager
def fake_cuda() -> Iterator[Waits]:
    """Inside, torch has one CUDA device; outside, all is as it was. Tensors of the device are of no use outside."""
    waits = Waits()
    device = _Device(waits)
    real, swaps = torch.autocast, torch.__future__.get_swap_module_params_on_conversion()

    class Autocast(real):  # type: ignore[valid-type, misc]
        def __init__(self, device_type: str, *rest: Any, enabled: bool = True, **named: Any) -> None:
            cuda = device_type == "cuda"
            super().__init__("cpu" if cuda else device_type, *rest, enabled=enabled and not cuda, **named)

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *of: DEVICE_NAME,
        "get_device_capability": lambda *of: (9, 0),
        "get_device_properties": lambda *of: mock.Mock(total_memory=80 * 2**30),
        "device": lambda of: contextlib.nullcontext(),
        "synchronize": lambda *of: waits.update(["synchronize"]),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": device.generator.manual_seed,
        "manual_seed_all": device.generator.manual_seed,
        "get_rng_state": lambda *of: device.generator.get_state(),
        "set_rng_state": lambda state, *of: device.generator.set_state(state),
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stream = mock.Mock(is_capturing=lambda: False)
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda *of: stream))
        # so that a module moves its parameters in place, as with a real device, though they become of another class
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        door, engine = _Door(waits), torch.autograd._engine_run_backward

        def run_backward(*arguments: Any, **named: Any) -> Any:
            with door:  # closed while one of torch's functions runs, as this one does; what is inside may be anybody's code
                return engine(*arguments, **named)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        stack.enter_context(device)
        stack.enter_context(door)
        yield waits


def _at_home(values: Tensor) -> bool:
    """Whether a tensor may be put into one of the device: a number may from anywhere."""
    return isinstance(values, CudaTensor) or values.ndim == 0


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _index(each: Any) -> Any:
    """Lists of numbers in an index as tensors of the CPU, as torch makes of them before it copies them."""
    if isinstance(each, tuple):
        return tuple(map(_index, each))
    return torch.tensor(each) if isinstance(each, list) else each


@functools.cache
def _about(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether it may draw from a generator."""
    draws = torch.Tag.nondeterministic_seeded in func.tags and any(a.name == "generator" for a in func._schema.arguments)
    return str(func.overloadpacket), draws


def _inside(each: Any, mine: dict[int, CudaTensor], theirs: list[Tensor]) -> Any:
    """An argument with what is inside tensors of the device, which are noted by it; those of the CPU are noted too."""
    if isinstance(each, CudaTensor):
        mine[id(each.inner)] = each
        return each.inner
    if isinstance(each, Tensor):
        assert not each.is_meta, "torch made a tensor on the device that it takes to be meta: its values are lost"
        if each.ndim > 0:  # numbers may meet what is on any device
            theirs.append(each)
        return each
    return [_inside(part, mine, theirs) for part in each] if isinstance(each, list | tuple) else each


def _outside(each: Any, mine: dict[int, CudaTensor]) -> Any:
    """A result as tensors of the device; of an operation in place, the very one that it was given."""
    if isinstance(each, Tensor):
        return mine[id(each)] if id(each) in mine else CudaTensor(each)
    return type(each)(_outside(part, mine) for part in each) if isinstance(each, list | tuple) else each
