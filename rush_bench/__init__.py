"""rush-bench: train, attack and tabulate randomised and contrastively pre-trained defences.

    import rush_bench as rb

    defense = rb.Smoothed(network, noise=rb.Uniform(0.3), votes=64)
    run = rb.attack([defense], suite="linf8", data=rb.load_dataset("cifar10", n=1000))
    run.table(style="paper")

The names below load on first use, so that `import rush_bench` and `rush-bench --help` import no torch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from rush_bench.version import __version__ as __version__

if TYPE_CHECKING:
    from rush_bench.datasets import as_images as as_images
    from rush_bench.datasets import load_dataset as load_dataset
    from rush_bench.defenses import Defense as Defense
    from rush_bench.defenses import Deterministic as Deterministic
    from rush_bench.defenses import Randomised as Randomised
    from rush_bench.defenses import Smoothed as Smoothed
    from rush_bench.defenses import as_module as as_module
    from rush_bench.defenses import load_defense as load_defense
    from rush_bench.evaluation import attack as attack
    from rush_bench.noise import Gaussian as Gaussian
    from rush_bench.noise import Uniform as Uniform
    from rush_bench.report import table as table
    from rush_bench.training import train as train

if "torch" not in sys.modules:  # OpenMP reads it once: threads that spin for each other starve on a machine with other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOME = {
    "as_images": "datasets",
    "load_dataset": "datasets",
    "Defense": "defenses",
    "Deterministic": "defenses",
    "Randomised": "defenses",
    "Smoothed": "defenses",
    "as_module": "defenses",
    "load_defense": "defenses",
    "attack": "evaluation",
    "Gaussian": "noise",
    "Uniform": "noise",
    "table": "report",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rush_bench' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(f"rush_bench.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
