"""Foreign checkpoint files: tensors out of them, with no pickled code run."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rush_bench.errors import BadInput

Tensors = dict[str, Tensor]
WRAPPERS = ("state_dict", "model", "net", "model_state_dict")


def read_checkpoint(path: Path) -> tuple[Tensors, Tensors | None]:
    """The network's tensors without `module.`, and those of the file's `classifier` where it has one (AdvCL).

    Read with weights_only=True. BadInput for a file that is missing, damaged, holds pickled code or no tensors.
    """
    content = _read(path)
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    classifier = content.get("classifier") if inner is not content else None
    return _tensors(inner, path), _tensors(classifier, path) if isinstance(classifier, Mapping) else None


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of a file that holds one linear layer (RoCL's `_linear`) and nothing else."""
    return linear(read_checkpoint(path)[0], str(path))


def linear(tensors: Tensors, where: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the only linear layer among the tensors."""
    by_kind = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    weight, bias = by_kind.get("weight"), by_kind.get("bias")
    if len(tensors) != 2 or weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise BadInput(
            f"{where} must hold one linear layer, weight (K, D) and bias (K,); it has {', '.join(sorted(tensors)[:4])}"
        )
    return weight, bias


def _read(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} cannot be read without running pickled code ({str(error).splitlines()[0]}). If you trust it, write its "
            "tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'plain.pt')"
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}); download it again") from error
    if not isinstance(content, Mapping):
        raise BadInput(f"{path} holds {type(content).__name__}, not a state dict")
    return content


def _tensors(content: Mapping[str, Any], path: Path) -> Tensors:
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if not content or others:
        raise BadInput(f"{path}: no state dict found; beside tensors there is {', '.join(others[:5]) or 'nothing'}")
    plain = {re.sub(r"(^|\.)module\.", r"\1", key): value for key, value in content.items()}
    if len(plain) < len(content):
        raise BadInput(f"{path}: keys with and without `module.` stand for the same tensor; save one of the two alone")
    return plain
