"""Pickles of others, read for their tensors alone: whatever else they hold becomes an empty shell, and nothing of it runs.

torch's weights_only reading refuses a file with any other object in it; MadryLab's `robustness` saves its settings and the
training schedule beside the weights, with dill.
"""

import pickle
import types
from pathlib import Path
from typing import Any

import torch

# What torch's own pickles of tensors name. Everything else, numpy's scalars too, is a shell.
PLAIN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
}
MAKES_CLASSES = ("_load_type", "_create_type", "_import_module", "type")  # dill's; pickle wants a class back
# What a damaged pickle stops with, beside the errors of reading a file.
DAMAGED = (pickle.UnpicklingError, AttributeError, TypeError, KeyError, IndexError, ImportError, AssertionError)


class Shell:
    """Takes any construction, state, item or call, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Shell":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Shell":
        return self

    def append(self, item: Any) -> None:
        """Nothing; so does `extend`, and `add`."""

    extend = add = update = append


def _class_of_shells(*args: Any, **kwargs: Any) -> type[Shell]:
    return Shell


class Unpickler(pickle.Unpickler):
    """Finds the makers of tensors, and a shell in place of anything else that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # Storages of files before torch 1.6; torch itself answers for those of later ones.
        if module == "torch" and name.endswith("Storage"):
            return super().find_class(module, name)
        return _class_of_shells if name in MAKES_CLASSES else Shell


def load_safely(path: Path) -> Any:
    """What `torch.load` returns, on the CPU, with a `Shell` for every object that is no tensor or plain value.

    Errors are those of `torch.load`, and of `DAMAGED`.
    """

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="safe_unpickling")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
