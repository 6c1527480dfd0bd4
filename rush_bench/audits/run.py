"""The audit: probes of the defence, checks on its records, the verdict. Resumable probe by probe."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rush_bench.audits.binarization import binarization
from rush_bench.audits.checks import checks
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.finding import Finding
from rush_bench.audits.flags import flags
from rush_bench.audits.indicators import indicators
from rush_bench.audits.scale import usual_scale
from rush_bench.audits.truth import truth
from rush_bench.audits.verdict import Claim, Verdict, verdict
from rush_bench.datasets import Images
from rush_bench.deadline import NEVER, Deadline
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.evaluation.work import Job, check_asked, work
from rush_bench.files import digest, flock, read_json, release, write_json
from rush_bench.noise import Stream
from rush_bench.threats import Threat

FOLDER = "audit"
VERSION = 2  # of the probes: another version makes them again
PROBED = 32  # images


@dataclass(frozen=True)
class Audit:
    """One defence's audit: `verdict` is None while experiments or probes are missing."""

    evidence: Evidence
    findings: tuple[Finding, ...]
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, JSON-able."""
        labels = {key: value for key, value in self.evidence.labels.items() if not isinstance(value, Tensor)}
        return {
            "defense": self.evidence.subject,
            "labels": labels,
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class _Probe:
    """A cell of one chunk: the findings of one probe."""

    path: Path
    chunks: int = 1


class _ProbeStore:
    """Probes on disk, for the loop: findings as JSON."""

    def open(self, cell: _Probe) -> None:
        """Nothing to lay out; a process that died may have left its lock."""
        release(cell.path.with_suffix(".lock"))

    def has(self, cell: _Probe, chunk: int) -> bool:
        """Whether it was made."""
        return cell.path.exists()

    @contextlib.contextmanager
    def lock(self, cell: _Probe, chunk: int) -> Iterator[bool]:
        """Whether it is ours; where locks are not supported two processes may do the same work."""
        with flock(cell.path.with_suffix(".lock"), wait=False) as held:
            yield held is not False

    def write(self, cell: _Probe, chunk: int, findings: list[Finding], adversarial: None = None) -> None:
        """Keep the findings."""
        write_json(cell.path, {"findings": [finding.to_dict() for finding in findings]})

    def read(self, cell: _Probe) -> list[Finding]:
        """The findings as they were."""
        return [Finding(**found) for found in read_json(cell.path)["findings"]]


@dataclass(frozen=True)
class _Job(Job):
    name: str
    make: Callable[[], list[Finding]]

    @property
    def label(self) -> str:
        """What people call it, in messages and on the bar."""
        return f"{self.defense.name} probe {self.name}"

    def chunk(self, store: _ProbeStore, c: int) -> tuple[list[Finding], None]:
        """Run the probe."""
        return self.make(), None

    def figure(self, findings: list[Finding]) -> str:
        """How many findings there are, and flags among them."""
        return f"{len(findings)} findings, {sum(finding.status in ('flag', 'bug') for finding in findings)} flags"


def probe(
    defenses: Sequence[Defense],
    data: Images,
    threat: Threat,
    out: Path,
    *,
    seed: int = 0,
    count: int = PROBED,
    shard: tuple[int, int] = (1, 1),
    deadline: Deadline = NEVER,
    quiet: bool = False,
    failed: dict[str, str] | None = None,
) -> dict[str, list[Finding]]:
    """Findings of the probes by defence, on `count` of the images; what is on disk is not made again.

    Any number of processes may work on the same folder. Past the deadline what is missing stays missing; so does a probe
    that fails, with its reason in `failed`, and the others go on. `shard` (k, n) takes every n-th probe.
    """
    defenses, data = check_asked(defenses, data, shard, seed, "probe")
    part = data.take(_probed(data, count, seed))
    store = _ProbeStore()
    jobs = [job for defense in defenses for job in _probes(defense, part, threat, out / FOLDER / "probes", seed)]
    lost, _ = work(store, jobs, out, title="probes", shard=shard, deadline=deadline, quiet=quiet)
    (failed if failed is not None else {}).update(lost)
    missing = {job.defense.name for job in jobs if job.label in lost or not store.has(job.cell, 0)}
    found: dict[str, list[Finding]] = {}
    for job in jobs:
        if job.defense.name not in missing:
            found.setdefault(job.defense.name, []).extend(store.read(job.cell))
    return found


def _probed(data: Images, count: int, seed: int) -> list[int]:
    """The first of a drawn subset; of images in an order of their own, which may be sorted, some that are drawn."""
    some = min(count, len(data))
    if (data.index.diff() > 0).all():
        return sorted(np.random.default_rng(seed).choice(len(data), some, replace=False).tolist())
    return list(range(some))


def judge(evidence: Evidence, probes: Sequence[Finding] | None, claim: Claim | None) -> Audit:
    """The audit of one defence: all findings, and the verdict where experiments and probes are whole."""
    findings = (*(probes or ()), *checks(evidence))
    # the flag about Square comes from records, not from the probes, which have none
    findings = tuple(f for k, f in enumerate(findings) if not (f.check == "square-beats-white-box" and k < len(probes or ())))
    if evidence.worst is None or not evidence.complete or probes is None:
        return Audit(evidence, findings, None)
    claim = claim or replayed(evidence)
    decision = verdict(
        claim,
        evidence.worst.estimate,
        findings,
        classes=int(evidence.labels["classes"]),
        deterministic=bool(evidence.labels["deterministic"]),
        images=len(evidence.worst.correct),
        largest_class=evidence.worst.largest_class,
    )
    return Audit(evidence, findings, decision)


def replayed(evidence: Evidence) -> Claim:
    """What the published evaluation gives on these weights: the claim where nothing else is said."""
    top = evidence.replay
    if top is None:
        raise BadInput(f"nothing says what is claimed for {evidence.subject}: run T15, or give --claim")
    return Claim(top.estimate.value, f"{top.trial}, replayed on these weights")


def _probes(defense: Defense, part: Images, threat: Threat, folder: Path, seed: int) -> list[_Job]:
    key = digest([VERSION, defense.identity(), defense.precision, part.digest, threat.norm, threat.eps, int(seed)])[:16]

    def probe_job(name: str, make: Callable[[Defense, Tensor, Tensor, Stream], list[Finding]]) -> _Job:
        def run() -> list[Finding]:
            images, labels = part.floats().to(defense.device), part.labels.to(defense.device)
            stream = Stream(seed, f"audit/{name}", part.index)
            return make(usual_scale(defense, images, stream), images, labels, stream)

        return _Job(_Probe(folder / f"{key}-{name}.json"), defense, part, name, run)

    return [
        probe_job("flags", lambda scaled, images, labels, stream: flags(scaled, images, labels, threat, stream)),
        probe_job("truth", lambda scaled, images, labels, stream: truth(scaled, images, labels, threat, stream)),
        probe_job("indicators", lambda scaled, images, labels, stream: indicators(scaled, images, labels, threat, stream)),
        probe_job("binarization", lambda scaled, images, labels, stream: binarization(scaled, images, threat, stream)),
    ]
