"""What an attack sees: defences, the randomised-smoothing adapter, and how they are loaded."""

from rush_bench.defenses.base import Defense, Gradient, Passes, Prediction, as_module
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.load import listed, load_defense, load_defenses, resolve, stored_transform
from rush_bench.defenses.losses import LOSSES, TARGETED
from rush_bench.defenses.purify import Purifier
from rush_bench.defenses.randomised import Randomised, RandomViews
from rush_bench.defenses.smoothed import Deterministic, Network, Smoothed, is_network
from rush_bench.defenses.target import as_defenses, from_target

__all__ = [
    "LOSSES",
    "TARGETED",
    "Chain",
    "Defense",
    "Deterministic",
    "Gradient",
    "Network",
    "Passes",
    "Prediction",
    "Purifier",
    "RandomViews",
    "Randomised",
    "Smoothed",
    "as_defenses",
    "as_module",
    "from_target",
    "is_network",
    "listed",
    "load_defense",
    "load_defenses",
    "resolve",
    "stored_transform",
]
