"""What a table says of its columns, from records alone: gradients that were none or not true, settings not the suite's."""

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
from rush_bench.registry import attacks
from rush_bench.settings import override

MANY = 0.05  # of images without a gradient, or of frozen pixels: more make a number an upper bound
BESIDES = ("name", "of", "start", "precision")  # of an attack's identity, no settings


def doubt(cell: CellResult) -> str | None:
    """Why the number of a finished gradient attack is an upper bound, in words: "" if nothing speaks for it, None if unknown.

    Records of attacks that ask for gradients and were made before these were looked at are unknown.
    """
    arrays = cell.arrays
    if "gradient_zero" not in arrays:
        return None if (arrays["backwards"] > 0).any() and "of" not in cell.identity["attack"] else ""
    from rush_bench.attacks.health import FEW, UNTRUE  # imports torch, so only where there is something to judge

    zero, looked, frozen = (_known(arrays[f"gradient_{part}"]) for part in ("zero", "error", "frozen"))
    shares = {
        "no gradient on {:.0%} of images": (_share(zero), MANY),
        "no true gradient on {:.0%} of the images looked at": (_share(looked > UNTRUE), FEW),
        "{:.0%} of pixels frozen at 0 or 1": (_share(frozen), MANY),
    }
    return ", ".join(text.format(share) for text, (share, most) in shares.items() if share > most)


def _known(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return values[~np.isnan(values)]


def _share(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def unusual(cell: CellResult) -> str:
    """The settings of a cell that are not those of its suite's column, by value: `steps=1 (usual 20)`.

    A setting that a record does not have came later than it, and is not compared.
    """
    name, labels = cell.identity["attack"]["name"], cell.labels
    if name not in attacks.entries or name == "clean":
        return ""
    quick = bool(labels.get("quick"))
    found = {key: value for key, value in _plain(cell.identity["attack"]).items() if key not in BESIDES}
    declares = {} if labels["deterministic"] else _declared(name, quick)  # which `on` of a randomised defence leaves as it is
    if all(key in declares and declares[key] == value for key, value in found.items()):
        return ""
    usual = _usual(name, quick, labels["deterministic"], labels.get("votes") or 0)
    if usual is None:
        return ""
    keys = sorted(key for key in found if found[key] != usual.get(key))
    return ", ".join(f"{key}={_text(found.get(key))} (usual {_text(usual.get(key))})" for key in keys)


@functools.cache
def _usual(name: str, quick: bool, deterministic: bool, votes: int) -> dict[str, Any] | None:
    """The settings of an attack in its suite's column; None for a plug-in's that a record cannot hold."""
    kind: Any = SimpleNamespace(deterministic=deterministic, draws=votes, classes=10)
    try:
        made = override(attacks.load(name)(), (QUICK if quick else FULL).get(name, {})).on(kind)
        return _plain({**dataclasses.asdict(made), **made.settings()})
    except (RushBenchError, TypeError):
        return None


@functools.cache
def _declared(name: str, quick: bool) -> dict[str, Any]:
    """The same from the source, without torch, which takes longer to import than a table to write; nothing of a plug-in's."""
    entry = attacks.get(name)
    return {} if entry.entry_point else _plain(declared(entry)[0] | (QUICK if quick else FULL).get(name, {}))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As a record holds them."""
    return json.loads(json.dumps(settings))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value)) or "all"
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
