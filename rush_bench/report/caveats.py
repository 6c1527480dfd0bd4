"""Caveats of a table's columns, from records alone: missing or untrue gradients, attacks that another attack outdoes by far,
settings other than the suite's.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rush_bench.attacks.suites import FULL, QUICK, REST
from rush_bench.declared import declared
from rush_bench.errors import RushBenchError
from rush_bench.records import CellResult
from rush_bench.records.statistics import UNLIKELY, below_chance, paired_difference
from rush_bench.registry import attacks
from rush_bench.settings import override

MANY = 0.05  # of images without a gradient, or of frozen pixels: above this share a number is an upper bound
CLIMBING = ("pgd", "eot", "apgd", "eot-apgd", "eot-apgd-t", "aa", "aa-rand")  # with gradients, as strong as they can be
# Weak by design on a randomised defence: few draws a gradient, or a bank's draws where fresh ones judge.
WEAK = ("pgd", "aa", "aa-rand")
# What one attack may leave above another before gradients are to blame, beyond chance. In the 74 rows of table1-cpu Square took
# at most 2.5 points from a gradient column, and another gradient column at most 2.5; before CE was taken at one scale, which
# other attacks do not do, up to 6. Behind sigmoid, tanh or erf it takes 10 to 29.
OUTDONE = 0.06
# The same where the other attack is stronger by design: a margin loss, AutoAttack, Square of a full suite (5,000
# queries), other settings. Adversarially trained networks lose up to 9 points from PGD to AutoAttack.
OUTDONE_BY_MORE = 0.12
STRONGER = ("eot-apgd", "eot-apgd-t", "aa", "aa-rand")
# Keys of an attack's identity that are no settings: what it ran on, and what follows from the scale of the network's logits.
NOT_SETTINGS = ("name", "of", "start", "precision", "closer")


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


def copies_caveat(cell: CellResult) -> str:
    """That images are copies of others, which intervals take for further ones; "" where none is."""
    copies = cell.labels.get("copies")
    return f"{copies} of {cell.labels['n']} images are copies of others: intervals are too narrow" if copies else ""


def label_caveat(cell: CellResult) -> str:
    """That a finished accuracy without an attack is below chance, which no defence makes it; "" where it is not."""
    if (
        cell.labels["attack"] not in ("clean", "certify")
        or below_chance(cell.arrays["label"], cell.arrays["counts"]) >= UNLIKELY
    ):
        return ""
    return "accuracy is below chance: are the labels in the order of the network's outputs?"


def outdone(cells: Mapping[str, CellResult]) -> dict[str, str]:
    """The gradient attacks of a row (finished cells by attack) whose accuracy another attack's belies, each with the reason.

    Where gradients are true, attacks that climb them leave about the same, and Square, which uses none, takes little more. An
    attack with weaker settings than its suite's, or that is weak by design, is not compared; if Square outdoes any, no gradient
    attack of the row is to be trusted.
    """
    climbing = {name: cell for name, cell in cells.items() if name in CLIMBING}
    usual = {name: not cell.remembered(unusual_settings) for name, cell in cells.items() if name in (*climbing, REST)}
    compared = [name for name, cell in climbing.items() if usual[name] and (_exact(cell) or name not in WEAK)]
    gains: dict[str, tuple[float, str]] = {}
    for name in compared:
        for other in usual.keys() - {name}:
            stronger = other in STRONGER or not usual[other] or (other == REST and not cells[other].labels.get("quick"))
            most = OUTDONE_BY_MORE if stronger else OUTDONE
            if (gain := _gain(cells[name], cells[other], most)) is not None:
                gains[name] = max(gains.get(name, (0.0, "")), (gain, other))
    by_square = [(gain, name) for name, (gain, other) in gains.items() if other == REST]
    if by_square:
        gain, name = max(by_square)
        text = f"Square, which uses no gradients, leaves {100 * gain:.0f} points less than {name}: gradients mislead"
        return dict.fromkeys(climbing, text)
    return {name: f"{other} leaves {100 * gain:.0f} points less: gradients mislead" for name, (gain, other) in gains.items()}


def _exact(cell: CellResult) -> bool:
    return bool(cell.labels["deterministic"])


def _gain(cell: CellResult, other: CellResult, most: float) -> float | None:
    """How much less the other leaves, where that is more than `most` beyond chance (paired by image)."""
    if cell.remembered(_accuracy) - other.remembered(_accuracy) <= most:  # no image needs to be read
        return None
    difference = paired_difference(*cell.remembered(_counts), *other.remembered(_counts))
    return difference.value if difference.low > most else None


def _accuracy(cell: CellResult) -> float:
    return float(np.mean(cell.arrays["correct"] / cell.arrays["repeats"]))


def _counts(cell: CellResult) -> list[list[int]]:
    return [cell.arrays[part].tolist() for part in ("correct", "repeats")]


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
    defense: Any = SimpleNamespace(deterministic=deterministic, draws=votes, classes=10, saturated=False, steepens=True)
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
