"""Caveats of a table's columns, from records alone: missing or untrue gradients, settings other than the suite's."""

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rush_bench.attacks.suites import FULL, QUICK
from rush_bench.declared import declared
from rush_bench.errors import RushBenchError
from rush_bench.records import CellResult
from rush_bench.records.statistics import below_chance
from rush_bench.registry import attacks
from rush_bench.settings import override

MANY = 0.05  # of images without a gradient, or of frozen pixels: above this share a number is an upper bound
UNLIKELY = 1e-4  # of a clean accuracy so far below chance, in any of thousands of rows
NOT_SETTINGS = ("name", "of", "start", "precision")  # keys of an attack's identity that are no settings


def gradient_caveat(cell: CellResult) -> str | None:
    """Why the accuracy under a finished gradient attack is only an upper bound; "" if it is more, None if that is not known.

    It is not known of records that were made before gradients were checked. The gradients of a transfer are its source's, and
    no matter of this defence.
    """
    arrays = cell.arrays
    if cell.identity["attack"]["name"] == "transfer":
        return ""
    if "gradient_zero" not in arrays:
        return None if (arrays["backwards"] > 0).any() and "of" not in cell.identity["attack"] else ""
    from rush_bench.attacks.health import FEW, UNTRUE  # imports torch, hence only where gradients were checked

    zero, looked, frozen = (_known(arrays[f"gradient_{part}"]) for part in ("zero", "error", "frozen"))
    shares = {
        "no gradient on {:.0%} of images": (_share(zero), MANY),
        "no true gradient on {:.0%} of the images looked at": (_share(looked > UNTRUE), FEW),
        "{:.0%} of pixels frozen at 0 or 1": (_share(frozen), MANY),
    }
    return ", ".join(text.format(share) for text, (share, most) in shares.items() if share > most)


def label_caveat(cell: CellResult) -> str:
    """That a finished clean accuracy is below chance, which no defence makes it; "" where it is not."""
    if cell.labels["attack"] != "clean" or below_chance(cell.arrays["label"], cell.arrays["counts"]) >= UNLIKELY:
        return ""
    return "accuracy is below chance: are the labels in the order of the network's outputs?"


def _known(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return values[~np.isnan(values)]


def _share(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def unusual_settings(cell: CellResult) -> str:
    """The settings of a cell that differ from those of its suite's column: `steps=1 (usual 20)`.

    A setting that a record lacks is newer than the record and is not compared.
    """
    name, labels = cell.identity["attack"]["name"], cell.labels
    if name not in attacks.entries or name == "clean":
        return ""
    quick = bool(labels.get("quick"))
    recorded = {key: value for key, value in _as_recorded(cell.identity["attack"]).items() if key not in NOT_SETTINGS}
    declared_settings = {} if labels["deterministic"] else _declared_settings(name, quick)
    # `Attack.on` leaves the declared settings as they are on a randomised defence: where these agree, torch is not imported.
    if all(key in declared_settings and declared_settings[key] == value for key, value in recorded.items()):
        return ""
    usual = _usual_settings(name, quick, labels["deterministic"], labels.get("votes") or 0)
    if usual is None:
        return ""
    keys = sorted(key for key in recorded if recorded[key] != usual.get(key))
    return ", ".join(f"{key}={_text(recorded.get(key))} (usual {_text(usual.get(key))})" for key in keys)


@functools.cache
def _usual_settings(name: str, quick: bool, deterministic: bool, votes: int) -> dict[str, Any] | None:
    """The settings of an attack in its suite's column on such a defence; None for a plug-in's that a record cannot hold."""
    defense: Any = SimpleNamespace(deterministic=deterministic, draws=votes, classes=10, saturated=False)
    try:
        attack = override(attacks.load(name)(), (QUICK if quick else FULL).get(name, {})).on(defense)
        return _as_recorded({**dataclasses.asdict(attack), **attack.settings()})
    except (RushBenchError, TypeError):
        return None


@functools.cache
def _declared_settings(name: str, quick: bool) -> dict[str, Any]:
    """The settings of an attack in its suite's column before `Attack.on`, from its source, without torch; {} of a plug-in."""
    entry = attacks.get(name)
    return {} if entry.entry_point else _as_recorded(declared(entry)[0] | (QUICK if quick else FULL).get(name, {}))


def _as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """As a record holds them."""
    return json.loads(json.dumps(settings))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value)) or "all"
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
