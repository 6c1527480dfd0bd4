"""RobustBench's model zoo by name, `robustbench:<dataset>/<threat>/<name>`, where that package is installed (design 5)."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rush_bench.defenses.base import Defense
from rush_bench.defenses.smoothed import Deterministic
from rush_bench.errors import BadInput, MissingPackage, RushBenchError, unknown_name
from rush_bench.packages import overwritten, shipped_by

PREFIX = "robustbench:"
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
THREATS = ("Linf", "L2", "corruptions")
INSTALL = "pip install 'rush-bench[robustbench]'"


def parse(name: str) -> tuple[str, str, str]:
    """`robustbench:cifar10/Linf/NAME` as data set, threat and name. BadInput where it is not of that form."""
    parts = name.removeprefix(PREFIX).split("/")
    if len(parts) != 3 or not parts[2] or any(sign in name for sign in "*?[@"):
        raise BadInput(f"{name!r}: write {PREFIX}cifar10/Linf/NAME, with one model's full name and no @votes")
    dataset, threat, model = parts
    if dataset not in SHAPES:
        raise unknown_name("RobustBench data set that rush-bench has", dataset, SHAPES)
    if threat not in THREATS:
        raise unknown_name("RobustBench threat", threat, THREATS)
    return dataset, threat, model


def check_dataset(name: str, dataset: str | None) -> str:
    """The name, where it is well formed and for that data set (None: any)."""
    own = parse(name)[0]
    if dataset not in (None, own):
        raise BadInput(f"{name} classifies {own}, not {dataset}; leave --dataset out, or choose another model")
    return name


def load(name: str, *, folder: Path, device: torch.device | str = "cpu", **options: Any) -> Defense:
    """A model of the zoo as a deterministic defence; its weights are kept in `folder` and downloaded where absent.

    Errors: MissingPackage without the real robustbench, BadInput for a wrong name, RushBenchError for a failed download.
    """
    dataset, threat, model = parse(name)
    utils = real_robustbench()
    try:
        network = utils.load_model(model_name=model, dataset=dataset, threat_model=threat, model_dir=str(folder))
    except KeyError as error:
        raise unknown_name(f"RobustBench model for {dataset}/{threat}", model, known(utils, dataset, threat)) from error
    except (OSError, ValueError, RuntimeError) as error:  # no network, a cut file, weights that do not fit
        raise RushBenchError(
            f"{name} cannot be loaded ({error}); look at {folder / dataset / threat} and the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise RushBenchError(f"{name}: robustbench gave {type(network).__name__}, not a network; {INSTALL}")
    about = {
        "recipe": "robustbench",
        "model": model,
        "dataset": dataset,
        "pretrain_dataset": None,
        "protocol": f"supervised ({threat})",
        "extra_data": "see RobustBench",
        "architecture": type(network).__name__,
    }
    return Deterministic(network.eval(), name=name, shape=SHAPES[dataset], device=device, about=about, **options)


def known(utils: Any, dataset: str, threat: str) -> list[str]:
    """Names of the zoo for a data set and threat; its keys are enumerations whose values are the names we use."""
    for data, by_threat in utils.all_models.items():
        if getattr(data, "value", data) == dataset:
            return [n for kind, models in by_threat.items() if getattr(kind, "value", kind) == threat for n in models]
    return []


def real_robustbench() -> Any:
    """The module `robustbench.utils` of the distribution robustbench, and of no other: torchattacks brings an old copy.

    It imports `autoattack`, but what PyPI has is `pyautoattack`: where there is no module of that name, it is the alias.
    """
    try:
        distribution = importlib.metadata.distribution("robustbench")
    except importlib.metadata.PackageNotFoundError as error:
        copy = " (the folder of that name is torchattacks' older copy)" if shipped_by("torchattacks", "robustbench") else ""
        raise MissingPackage(
            f"RobustBench's models need the package robustbench, which is not installed{copy}: {INSTALL}"
        ) from error
    again = f"pip install --force-reinstall --no-deps robustbench=={distribution.version}"
    if changed := overwritten(distribution, "robustbench"):
        raise MissingPackage(f"robustbench {distribution.version} was overwritten by another package ({changed}): {again}")
    if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
        sys.modules["autoattack"] = importlib.import_module("pyautoattack")
    try:
        utils = importlib.import_module("robustbench.utils")
    except ImportError as error:
        raise MissingPackage(f"robustbench {distribution.version} does not import ({error}): {INSTALL}") from error
    expected = Path(str(distribution.locate_file("robustbench/utils.py"))).resolve()
    if Path(str(utils.__file__)).resolve() != expected:
        raise MissingPackage(f"another robustbench is imported ({utils.__file__}), not {expected}: {again}")
    return utils
