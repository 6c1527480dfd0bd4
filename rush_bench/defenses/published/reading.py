"""Foreign checkpoint files: tensors out of them, and no pickled code is run."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rush_bench.defenses.published.safe_unpickling import DAMAGED, load_safely
from rush_bench.errors import BadInput
from rush_bench.files import pickled_labels

Tensors = dict[str, Tensor]
WRAPPERS = ("state_dict", "model", "net", "model_state_dict")


def read_checkpoint(path: Path) -> tuple[Tensors, Tensors | None, list[str]]:
    """The network's tensors without `module.`, those of the file's `classifier` where it has one (AdvCL), and notes.

    Of a file with several weights of one network (an average beside the raw ones) the others are named in a note. No code of
    the file runs: what is neither a tensor nor a plain value is read as an empty shell (`safe_unpickling`), and a note says so.
    BadInput for a file that is missing, damaged, TensorFlow's or JAX's, or holds no tensors.
    """
    if re.search(r"\.(meta|index|npy)$|\.data-\d+-of-\d+$", path.name) and not zipfile.is_zipfile(path):
        raise BadInput(
            f"{path} looks like a file of TensorFlow or JAX, which import does not read. Of Rebuffi 2021 take the .pt file; "
            "Free-m was published for TensorFlow only: train it, rush-bench train free --set network.name=wrn-32-10"
        )
    if path.suffix == ".pkl" and "label" in path.name:
        raise pickled_labels(path)
    content, notes = _read(path)
    if "P_state" in content:
        raise BadInput(
            f"{path} is Chen 2020b's Selfie pre-training, three stages without a classifier; run its finetune/main.py on it "
            "and import ata_best_model.pt"
        )
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    others = [
        key for key, value in content.items() if value is not inner and isinstance(value, Mapping) and {*value} & {*inner}
    ]
    if others and inner is not content:
        notes.append(
            f"the file also holds {', '.join(map(str, others))}, other weights of this network, which were left out; to take "
            f"them, save them alone: torch.save(torch.load(file)[{others[0]!r}], ...)"
        )
    classifier = content.get("classifier") if inner is not content else None
    return _tensors(inner, path), _tensors(classifier, path) if isinstance(classifier, Mapping) else None, notes


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


def _read(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    notes: list[str] = []
    try:
        if path.suffix == ".safetensors":
            return load_file(path), notes
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch asks to report protocols that it does not know
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # objects of other packages beside the tensors (MadryLab's, by dill)
            content = load_safely(path)
            notes.append("the file holds pickled objects beside its tensors; they were left out and no code of theirs was run")
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, SafetensorError, *DAMAGED) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} cannot be read as a checkpoint ({first}); download it again") from error
    if not isinstance(content, Mapping):
        raise BadInput(f"{path} holds {type(content).__name__}, not a state dict")
    return content, notes


def _tensors(content: Mapping[str, Any], path: Path) -> Tensors:
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if not content or others:
        raise BadInput(f"{path}: no state dict found; beside tensors there is {', '.join(others[:5]) or 'nothing'}")
    plain = {re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", key): value for key, value in content.items()}
    if len(plain) < len(content):
        raise BadInput(f"{path}: keys with and without `module.` stand for the same tensor; save one of the two alone")
    return plain
