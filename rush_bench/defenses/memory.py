"""How many bytes tensors hold at once, counted by what torch is asked to make: on any device, whatever its allocator keeps."""

import weakref
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter


class Peak(TorchFunctionMode):
    """Inside, `most` is the most bytes that tensors made inside have held at once.

    What an operation needs within itself is not seen, nor is a backward pass. (A TorchDispatchMode would see that; its first
    use imports two seconds' worth of modules.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.live: dict[int, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.note((args, kwargs), outputs)
        return outputs

    def note(self, inputs: Any, outputs: Any) -> None:
        """An operation makes `outputs` of `inputs`; tensors are found in lists, tuples and mappings."""
        known = {_place(tensor) for tensor in tree_iter(inputs) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(outputs):
            if isinstance(tensor, Tensor) and (place := _place(tensor)) not in known and place not in self.live:
                storage = tensor.untyped_storage()
                self.live[place] = storage.nbytes()
                self.held += self.live[place]
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.held -= self.live.pop(place)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
