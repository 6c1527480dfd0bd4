"""What a trial is to the checks: by what its record did, never by the words that it is printed under."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any


class Role(Enum):
    """Trials that checks, claims and figures ask for; most trials have none of these roles."""

    ONE_DRAW = auto()  # T1 with one draw per gradient
    ONE_STEP = auto()  # T3 in one step of eps
    LENGTH = auto()  # T3 in several steps from one start
    RESTARTED = auto()  # T3 from several starts
    MINIMUM = auto()  # T4, per image over its losses
    PUBLISHED_PGD = auto()  # T15, RUSH's PGD as published
    PUBLISHED_AA = auto()  # T15, RUSH's AutoAttack as published
    PUBLISHED_GRADIENT = auto()  # T15, a purifier's gradient as papers approximated it
    USUAL_PGD = auto()  # T15, what is usually published for a deterministic defence
    CORRECTED_PGD = auto()  # T15, RUSH's PGD with fresh noise at every step and the best x', as torchattacks' PGDRS now is
    THEIR_PGD = auto()  # T15, torchattacks' PGDRS itself
    THEIR_AA = auto()  # T15, torchattacks' AutoAttack itself
    EMULATED_AA = auto()  # T15, the same by our code
    WORST = auto()  # T11 and T15, per image over all
    REFERENCE = auto()  # T16, AutoAttack on a deterministic network
    OUR_PATH = auto()  # T16, our randomised code path without noise on the same


AS_PUBLISHED = (Role.PUBLISHED_PGD, Role.PUBLISHED_AA, Role.PUBLISHED_GRADIENT)  # explain a number, measure no robustness
THEIRS = (Role.THEIR_PGD, Role.THEIR_AA, Role.EMULATED_AA)  # stand beside the waterfall


def role_of(experiment: str, attack: Mapping[str, Any], on: str = "") -> Role | None:
    """The role of a cell of an experiment, by its attack with its settings as a record has them, and what it is `on`."""
    name = attack["name"]
    if experiment == "T1":
        return Role.ONE_DRAW if attack["draws"] == 1 else None
    if experiment == "T3":
        return Role.ONE_STEP if attack["steps"] == 1 else Role.RESTARTED if attack["restarts"] > 1 else Role.LENGTH
    if experiment == "T4":
        return Role.MINIMUM if name == "worst" else None
    if experiment == "T11":
        return Role.WORST
    if experiment == "T15":
        return _of_waterfall(name, attack)
    if experiment == "T16":
        return Role.OUR_PATH if on.startswith("still") else Role.REFERENCE
    return None


def _of_waterfall(name: str, attack: Mapping[str, Any]) -> Role | None:
    if name == "pgd-published":  # records leave out what PGD does by default
        fresh, best = attack.get("redraw", 1) == 1, attack.get("keep", "best") == "best"
        if not best:
            return Role.PUBLISHED_PGD
        return Role.CORRECTED_PGD if fresh and attack["draws"] == 0 else None
    if name == "aa-published":
        if attack["fab"] == "targeted":
            return Role.EMULATED_AA
        return Role.PUBLISHED_AA if attack["hand_back"] == "clean" else None
    if name == "pgd-purifier":
        return None if attack["surrogate"] == "exact" else Role.PUBLISHED_GRADIENT
    known = {
        "pgd": Role.USUAL_PGD,
        "torchattacks-pgdrs": Role.THEIR_PGD,
        "torchattacks-aa": Role.THEIR_AA,
        "worst": Role.WORST,
    }
    return known.get(name)
