"""One check of an audit: what was measured, the threshold, where that comes from, and how it fell out."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Status = Literal["pass", "flag", "bug", "not run"]


@dataclass(frozen=True)
class Finding:
    """`check` is its name (`zero-gradients`), `what` one line that says what `figure` is.

    `relation` is what a figure that passes has to `threshold` ("<=" or ">="), `source` the paper or rule behind the threshold.
    `status`: `pass`; `flag` (a reason to doubt the numbers); `bug` (cannot be, whatever the defence); `not run`, with the
    reason in `note`. `low` and `high` are the 95 % interval of the figure, where it has one.
    """

    check: str
    what: str
    figure: float | None
    threshold: float | None
    relation: Literal["<=", ">="]
    source: str
    status: Status
    note: str = ""
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, JSON-able."""
        return asdict(self)


def judged(
    check: str,
    what: str,
    figure: float,
    relation: Literal["<=", ">="],
    threshold: float,
    source: str,
    *,
    note: str = "",
    otherwise: Status = "flag",
    low: float | None = None,
    high: float | None = None,
) -> Finding:
    """A finding whose status follows from its figure: `pass` if the relation holds, else `otherwise`."""
    holds = figure <= threshold if relation == "<=" else figure >= threshold
    return Finding(check, what, float(figure), threshold, relation, source, "pass" if holds else otherwise, note, low, high)


def within_chance(finding: Finding) -> Finding:
    """A flag whose interval holds the threshold is none."""
    assert finding.low is not None and finding.high is not None and finding.threshold is not None
    if finding.status != "flag" or not finding.low <= finding.threshold <= finding.high:
        return finding
    return noted(replace(finding, status="pass"), "beyond the threshold, but within chance of it")


def noted(finding: Finding, text: str) -> Finding:
    """The finding with one note more."""
    return replace(finding, note=f"{finding.note}; {text}" if finding.note else text)


def not_run(check: str, what: str, source: str, why: str) -> Finding:
    """A check that could not be made, and why."""
    return Finding(check, what, None, None, "<=", source, "not run", why)
