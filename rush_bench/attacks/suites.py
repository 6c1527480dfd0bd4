"""Suites: a threat and the columns that are run under it. `linf<k>` is k/255, `l2-<x>` is x; `-quick` is for a CPU.

Suites are names and settings only: parsing one imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.registry import attacks
from rush_bench.settings import override, parse_number, parts

FULL: dict[str, dict[str, Any]] = {"clean": {}, "pgd": {}, "eot": {}, "aa": {}}
# Quick: fewer steps and draws, and APGD-CE and Square where the full suite has AutoAttack. Its table says so.
QUICK: dict[str, dict[str, Any]] = {
    "clean": {},
    "pgd": {"steps": 10},
    "eot": {"steps": 20, "step": 0.125, "draws": 16, "select_draws": 32},
    "apgd": {},
    "square": {"queries": 500, "draws": 2, "whole": False},
}
REST = "square"  # runs on what the columns before it leave standing; in a full suite AutoAttack has Square as its last part
EXAMPLES = {
    "linf8": "l-inf 8/255 (any number after linf, in 255ths): clean, pgd, eot (randomised only), aa, worst",
    "l2-0.5": "l2 radius 0.5 (any number after l2-): the same columns",
    "linf8-quick": "for a CPU: PGD-10, EOT 20 steps of 16 draws, APGD-CE for AutoAttack; Square on what stands",
}


SMALLEST = 0.5  # 255ths in l-inf: what is below was meant in units of [0,1]
LARGEST = {"linf": 255.0, "l2": 5.0}  # a larger l2 radius was meant in 255ths of l-inf


@dataclass(frozen=True)
class Suite:
    """A parsed suite: columns map an attack's registered name to the settings that differ from its defaults.

    `asked`: the settings, by dotted name, that somebody gave.
    """

    name: str
    norm: str
    eps: float
    quick: bool
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """Its name with the columns that were left out or added, as in `linf8-quick without apgd`: what was run."""
        usual = QUICK if self.quick else FULL
        out = [column for column in usual if column not in self.columns]
        more = [column for column in self.columns if column not in usual]
        parts = [f"{word} {', '.join(names)}" for word, names in (("without", out), ("with", more)) if names]
        return " ".join([self.name, *parts])


def parse_suite(name: str, only: Sequence[str] | str = (), overrides: Mapping[str, Any] | None = None) -> Suite:
    """`linf8`, `linf25.5-quick`, `l2-0.5`; `only` these attacks, any registered ones; `overrides` are dotted (`pgd.steps=40`).

    Square goes last, on what all others leave standing. BadInput for a radius that was surely meant otherwise (`linf0.031`,
    `linf8/255`, `l2-8`), an attack or a setting that is none, a value out of range.
    """
    found = re.fullmatch(r"(linf|l2-)([\d.]+(?:/\d+)?)(-quick)?", name)
    if not found:
        raise BadInput(f"no suite named {name!r}; write linf8 (8/255), l2-0.5, or either with -quick")
    norm, quick = found[1].rstrip("-"), bool(found[3])
    eps = _radius(name, norm, found[2], found[3] or "")
    shown = f"{255 * eps if norm == 'linf' else eps:.12g}"
    name = f"{found[1]}{shown}{found[3] or ''}"  # one name for one threat: linf8.0 is linf8
    named = parts(only) if isinstance(only, str) else list(only)
    if only and not named:
        raise BadInput(f"no attack is named in {only!r}")
    columns = {column: dict(settings) for column, settings in (QUICK if quick else FULL).items()}
    for column in named:
        if column not in columns:
            attacks.get(column)
            columns[column] = {}
    if named:
        columns = {column: columns[column] for column in sorted(columns, key=REST.__eq__) if column in named}
    changed = set()
    for key, value in (overrides or {}).items():
        column, dot, setting = key.partition(".")
        if column not in columns or not dot:
            raise BadInput(f"--set {key}: write attack.setting, with an attack of the suite ({', '.join(columns)})")
        columns[column][setting] = value
        changed.add(column)
    for column in changed:  # refused here, before anything is loaded; this alone imports torch
        override(attacks.load(column)(), columns[column], name=column)
    return Suite(name, norm, eps, quick, columns, tuple(overrides or ()))


def of_draws(key: str) -> bool:
    """Whether a setting, as in `pgd.draws`, is one of draws: without effect on a deterministic defence."""
    column, _, setting = key.partition(".")
    return column == "eot" or (column in attacks.entries and setting in getattr(attacks.load(column)(), "drawn", ()))


def is_quick(suite: str) -> bool:
    """Whether a suite, as it is shown, is a quick one."""
    return suite.partition(" ")[0].endswith("-quick")


def _radius(name: str, norm: str, text: str, quick: str) -> float:
    """The radius in pixel units; BadInput where the number cannot have been meant so, with what was."""
    number = parse_number(text)
    if norm == "linf" and ("/" in text or number < SMALLEST):
        likely = round(255 * number) or 8
        raise BadInput(
            f"suite {name!r}: the number after linf counts 255ths and is at least {SMALLEST:g}; "
            f"write linf{likely}{quick} for {likely}/255"
        )
    if not 0 < number <= LARGEST[norm]:
        meant = f"linf{number:g}{quick} for {number:g}/255 in l-inf" if 1 < number <= 255 else "linf8 (8/255)"
        top = "255 (all of [0,1])" if norm == "linf" else f"{LARGEST['l2']:g}"
        raise BadInput(f"suite {name!r}: the radius must be above 0 and at most {top}; write l2-0.5{quick}, or {meant}")
    return number / 255 if norm == "linf" else number
