"""`rush_bench.audit`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from rush_bench import registry
from rush_bench.api.named import ByName, Target
from rush_bench.api.settle import SettleRun, settle
from rush_bench.audits import run as audits
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.forecast import Planned
from rush_bench.audits.run import Audit
from rush_bench.audits.verdict import Claim
from rush_bench.datasets import Images
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.report import audits as shown
from rush_bench.report import settle as report
from rush_bench.report.model_info import read_model_info
from rush_bench.report.table import Table, text_table
from rush_bench.settings import radius
from rush_bench.store import cards_measured
from rush_bench.threats import Norm, Threat
from rush_bench.training.prepare import trained_as_published


@dataclass(repr=False)
class AuditRun:
    """What an audit leaves: the experiments (`settled`), an audit a defence with its verdict, and the files that show them."""

    settled: SettleRun
    audits: list[Audit] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every experiment and probe is there, so that each audit has its verdict."""
        return self.settled.complete and bool(self.audits) and all(audit.verdict is not None for audit in self.audits)

    @property
    def failed(self) -> dict[str, str]:
        """What failed, with the reason."""
        return self.settled.failed

    @property
    def words(self) -> dict[str, str | None]:
        """The verdict on each defence, by name: stands, weakened, refuted, cannot say; None while something is missing."""
        return {audit.evidence.subject: audit.verdict.word if audit.verdict else None for audit in self.audits}

    def tables(self) -> list[Table]:
        """The findings of each audit, and its verdict below them."""
        return [findings(audit) for audit in self.audits]

    def __repr__(self) -> str:
        words = ", ".join(f"{name}: {word or 'not finished'}" for name, word in self.words.items())
        return f"AuditRun({words}, in {str(self.settled.folder.parent)!r})"

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in self.tables())


def audit(
    defenses: Defense | Sequence[Defense] | str | Sequence[str] | Target,
    data: Any = None,
    *,
    claim: float | str | Path | None = None,
    budget: str = "standard",
    norm: Norm = "linf",
    eps: float | str = 8 / 255,
    out: Path | str = "results",
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
    precision: str | None = None,
    before: Callable[[list[Planned]], bool] = lambda planned: True,
    **named: Unpack[ByName],
) -> AuditRun:
    """Whether a claim of accuracy under attack stands: every experiment of `settle`, probes, checks, and the verdict.

    The same call again, from any number of processes, finishes what is left.

    Args:
        claim: the accuracy under attack that is claimed, in percent, or a model_info file of RobustBench that claims it. None:
            the published number of a model that was trained as in its paper, else what the replay of the published evaluation
            gives on the same weights.
        defenses: as for `settle`, and so are all other arguments.
        data: see `settle`.
        budget: see `settle`.
        norm: see `settle`.
        eps: see `settle`.
        out: results folder; what `settle` writes, and `audit/` with the verdict as JSON and Markdown.
        seed: see `settle`.
        repeats: see `settle`.
        chunk: see `settle`.
        shard: see `settle`.
        max_minutes: see `settle`.
        quiet: see `settle`.
        precision: see `settle`.
        before: see `settle`.
        named: see `ByName`.

    Returns:
        A run that prints as the command does; `words` has the verdict on each defence.

    Raises:
        BadInput: a claim that is no percentage or is about another eps or other data, and what `settle` refuses.

    Sources: the rules of the verdict, `rush-bench docs verdict`; Carlini et al. 2019; Pintor et al. 2022; Zimmermann et al.
    2022.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        >>> digits = rb.load_dataset("digits", "test", n=5)
        >>> rb.audit(rb.Deterministic(net, shape=digits.shape), digits, claim=0.78, out=folder)
        Traceback (most recent call last):
        rush_bench.errors.BadInput: --claim takes an accuracy in percent, such as 77.8, or a model_info file (.json), not 0.78
    """
    eps = radius(eps)
    known = data.name if isinstance(data, Images) else data if data in tuple(registry.datasets.entries) else None
    stated = None if claim is None else stated_claim(claim, norm, eps, known)
    deadline, called_off = Deadline.after(max_minutes), False

    def hear(planned: list[Planned]) -> bool:
        nonlocal called_off
        called_off = not before(planned)
        return not called_off

    shared: dict[str, Any] = {"budget": budget, "norm": norm, "eps": eps, "out": out, "seed": seed, "repeats": repeats}
    shared |= {"chunk": chunk, "shard": shard, "max_minutes": deadline, "quiet": quiet, "precision": precision}
    store = Path(named.get("store", "models"))
    run = AuditRun(settle(defenses, data, before=hear, **shared, **named))
    if called_off:
        return run
    for group, images in run.settled.pairs:
        names = {defense.name for defense in group}
        found = [
            evidence
            for evidence in run.settled.evidence
            if evidence.subject in names and evidence.labels.get("dataset") == images.name
        ]
        if not found:
            continue
        if claim is not None:  # what the models' own data are, is known now
            stated = stated_claim(claim, norm, eps, images.name)
        threat = Threat(norm, eps)
        probed: dict[str, Any] = {"seed": seed, "deadline": deadline, "failed": run.failed, "quiet": quiet}
        probes = audits.probe(group, images, threat, Path(out), **probed)
        run.audits += [
            audits.judge(evidence, probes.get(evidence.subject), stated or published_claim(evidence, store))
            for evidence in found
        ]
    run.paths = list(run.settled.paths)
    for finished in run.audits:
        run.paths += shown.write(finished, Path(out))
    return run


def findings(audit: Audit) -> Table:
    """The checks of an audit as a table, the verdict below it."""
    frame = pd.DataFrame([finding.to_dict() for finding in audit.findings])
    return text_table(
        frame, *shown.lay_out(audit, sources=False), title=report.title(audit.evidence), notes=[shown.sentence(audit)]
    )


def stated_claim(said: float | str | Path, norm: Norm = "linf", eps: float = 8 / 255, dataset: str | None = None) -> Claim:
    """A claim that the user states: a percentage, or a model_info file (.json) of RobustBench about this threat and data."""
    if isinstance(said, str | Path) and Path(said).suffix == ".json":
        info = read_model_info(Path(said))
        if not math.isclose(info.eps, eps) or dataset not in (None, info.dataset) or info.norm not in (None, norm):
            raise BadInput(
                f"{said} claims something at {info.norm or 'eps'} {info.eps:.4g} on {info.dataset}; "
                f"the audit is at --norm {norm} --eps {eps:.4g} on {dataset or 'the data of each model'}"
            )
        return Claim(info.accuracy, f"{info.kind} of {info.name} in {Path(said).name}")
    try:
        percent = float(str(said).rstrip("% "))
    except ValueError:
        percent = math.nan
    if not 1 < percent <= 100:
        raise BadInput(f"--claim takes an accuracy in percent, such as 77.8, or a model_info file (.json), not {said}")
    return Claim(percent / 100, "stated with --claim")


def published_claim(evidence: Evidence, store: Path) -> Claim | None:
    """The highest number published for this system, data set, votes and l-inf 8/255; None where there is none.

    Only for a model whose card in the store has the paper's settings: what a smaller network or a shorter training leaves says
    nothing about it.
    """
    row = report.published_row(evidence)
    stated = [] if row is None else [(n, name) for n, name in ((row.pgd, "PGD"), (row.aa, "AA")) if n is not None]
    if row is None or not stated:
        return None
    cards = cards_measured(store, {str(evidence.labels.get("sha256"))}).values()
    if not any(map(trained_as_published, cards)):
        return None
    percent, name = max(stated)
    return Claim(percent / 100, f"{row.method} under {name}, {row.source}; it is about other weights")
