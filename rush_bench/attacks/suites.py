"""Suites: a threat and the columns that are run under it. `linf<k>` is k/255, `l2-<x>` is x; `-quick` is for a CPU.

Suites are names and settings only: parsing one imports no torch.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.registry import attacks
from rush_bench.settings import parse_number

FULL: dict[str, dict[str, Any]] = {"clean": {}, "pgd": {}, "eot": {}, "aa": {}}
# Quick: fewer steps and draws, and APGD-CE where the full suite has AutoAttack. Its table says so.
QUICK: dict[str, dict[str, Any]] = {
    "clean": {},
    "pgd": {"steps": 10},
    "eot": {"steps": 20, "step": 0.125, "draws": 16, "select_draws": 32},
    "apgd": {},
}
EXAMPLES = {
    "linf8": "l-inf 8/255 (any number after linf, in 255ths): clean, pgd, eot (randomised only), aa, worst",
    "l2-0.5": "l2 radius 0.5 (any number after l2-): the same columns",
    "linf8-quick": "for a CPU: PGD-10, EOT 20 steps of 16 draws, APGD-CE for AutoAttack; never mixed with the full suite",
}


@dataclass(frozen=True)
class Suite:
    """A parsed suite: columns map an attack's registered name to the settings that differ from its defaults."""

    name: str
    norm: str
    eps: float
    quick: bool
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)


def parse_suite(name: str, only: tuple[str, ...] = (), overrides: dict[str, Any] | None = None) -> Suite:
    """`linf8`, `linf25.5-quick`, `l2-0.5`; `only` keeps some columns, `overrides` are dotted (`pgd.steps=40`)."""
    found = re.fullmatch(r"(linf|l2-)(\d+(?:\.\d+)?(?:/\d+)?)(-quick)?", name)
    if not found:
        raise BadInput(f"no suite named {name!r}; write linf8 (8/255), l2-0.5, or either with -quick")
    norm, number, quick = found[1].rstrip("-"), parse_number(found[2]), bool(found[3])
    columns = {column: dict(settings) for column, settings in (QUICK if quick else FULL).items()}
    for column in only:
        if column not in columns:
            attacks.get(column)
            columns[column] = {}
    if only:
        columns = {column: columns[column] for column in columns if column in only}
    for key, value in (overrides or {}).items():
        column, dot, setting = key.partition(".")
        if column not in columns or not dot:
            raise BadInput(f"--set {key}: write attack.setting, with an attack of the suite ({', '.join(columns)})")
        columns[column][setting] = value
    return Suite(name, norm, number / 255 if norm == "linf" else number, quick, columns)
