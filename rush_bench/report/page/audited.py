"""Audits as `rush-bench audit` left them, and whether the records still say the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rush_bench.audits.evidence import Evidence
from rush_bench.audits.finding import Finding
from rush_bench.audits.run import Audit
from rush_bench.audits.verdict import Claim, Verdict
from rush_bench.errors import BadInput
from rush_bench.files import read_json
from rush_bench.records.statistics import Estimate
from rush_bench.report.settle import percent


def read(folder: Path, warn: Callable[[str], None]) -> list[Audit]:
    """Every audit of a folder, sorted by file; one that cannot be read is left out, and `warn` gets a line that says so."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(_audit(read_json(path)))
        except (BadInput, LookupError, TypeError) as error:
            warn(f"left out {path}: {error}")
    return found


def _audit(kept: dict[str, Any]) -> Audit:
    verdict = kept["verdict"]
    if verdict is not None:
        parts = {"claim": Claim(**verdict["claim"]), "worst": Estimate(**verdict["worst"])}
        verdict = Verdict(**{**verdict, **parts, "decided_by": tuple(verdict["decided_by"])})
    findings = tuple(Finding(**finding) for finding in kept["findings"])
    return Audit(Evidence(kept["defense"], kept["labels"], ()), findings, verdict)


def key(evidence: Evidence) -> tuple[Any, ...]:
    """What an audit and the evidence that it judged agree in."""
    return (evidence.subject, *(evidence.labels[name] for name in ("dataset", "norm", "eps", "budget_name", "n")))


def stale(audit: Audit, evidence: Evidence | None) -> str:
    """What the records say now, where it is not what the verdict was given on; empty where it is."""
    if audit.verdict is None or evidence is None or evidence.worst is None:
        return ""
    now = evidence.worst.estimate
    if all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(now, audit.verdict.worst, strict=True)):
        return ""
    return (
        f"This verdict was given on a worst case of {percent(audit.verdict.worst)} %; by the records and this version it is "
        f"{percent(now)} %. Run the audit again."
    )
