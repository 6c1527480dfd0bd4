"""rush-bench: train, attack and tabulate randomised and contrastively pre-trained defences.

    import rush_bench as rb

    defense = rb.Smoothed(network, noise=rb.Uniform(0.3), votes=64)
    run = rb.attack(defense, suite="linf8", data=rb.load_dataset("cifar10", n=1000))
    print(run.table())

The names below load on first use, so that `import rush_bench` and `rush-bench --help` import no torch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from rush_bench.version import __version__ as __version__

if TYPE_CHECKING:
    from rush_bench.api.attack import attack as attack
    from rush_bench.api.audit import audit as audit
    from rush_bench.api.certify import certify as certify
    from rush_bench.api.compare import compare as compare
    from rush_bench.api.corruptions import corruptions as corruptions
    from rush_bench.api.figure import figure as figure
    from rush_bench.api.settle import settle as settle
    from rush_bench.api.table import load_results as load_results
    from rush_bench.api.table import table as table
    from rush_bench.datasets import as_images as as_images
    from rush_bench.datasets import load_dataset as load_dataset
    from rush_bench.defenses import Defense as Defense
    from rush_bench.defenses import Deterministic as Deterministic
    from rush_bench.defenses import Randomised as Randomised
    from rush_bench.defenses import Smoothed as Smoothed
    from rush_bench.defenses import as_module as as_module
    from rush_bench.defenses import load_defense as load_defense
    from rush_bench.defenses.published import import_checkpoint as import_checkpoint
    from rush_bench.noise import Gaussian as Gaussian
    from rush_bench.noise import Laplace as Laplace
    from rush_bench.noise import Uniform as Uniform
    from rush_bench.training import train as train

# OpenMP reads it once: threads that spin for each other starve on a machine with other work. GNU's spin for
# less than a millisecond: as fast as longer on a quiet machine, as fast as none on a busy one (benchmarks/waiting.py).
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_HOME = {
    "Defense": "defenses",
    "Deterministic": "defenses",
    "Gaussian": "noise",
    "Laplace": "noise",
    "Randomised": "defenses",
    "Smoothed": "defenses",
    "Uniform": "noise",
    "as_images": "datasets",
    "as_module": "defenses",
    "attack": "api.attack",
    "audit": "api.audit",
    "certify": "api.certify",
    "compare": "api.compare",
    "corruptions": "api.corruptions",
    "figure": "api.figure",
    "import_checkpoint": "defenses.published",
    "load_dataset": "datasets",
    "load_defense": "defenses",
    "load_results": "api.table",
    "settle": "api.settle",
    "table": "api.table",
    "train": "training",
}

__all__ = [
    "Defense",
    "Deterministic",
    "Gaussian",
    "Laplace",
    "Randomised",
    "Smoothed",
    "Uniform",
    "as_images",
    "as_module",
    "attack",
    "audit",
    "certify",
    "compare",
    "corruptions",
    "figure",
    "import_checkpoint",
    "load_dataset",
    "load_defense",
    "load_results",
    "settle",
    "table",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rush_bench' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(f"rush_bench.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
