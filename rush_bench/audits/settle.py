"""`settle`: the experiments of the protocol's section 7 on a defence, cell by cell, with the cost said beforehand."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, get_args

import numpy as np

from rush_bench.attacks.torchattacks_own import LAWS, real_torchattacks
from rush_bench.audits.evidence import Evidence, entries_of
from rush_bench.audits.experiments import BUDGETS, SOURCES, WORST, Budget, Subject, Trial, plan
from rush_bench.audits.forecast import Forecast, Planned, priced
from rush_bench.certificates.bounds import certificate
from rush_bench.certificates.check import FOLDER as CERTIFICATES
from rush_bench.certificates.check import Comparison, clashes
from rush_bench.certificates.sampling import THIRDS, Sampling
from rush_bench.datasets import Images
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense, Network, load_defense
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.load import listed
from rush_bench.defenses.samplers import NoiseSampler
from rush_bench.errors import BadInput, MissingPackage, unknown_name
from rush_bench.evaluation.certificates import certify, law_of
from rush_bench.evaluation.runner import Job, default_repeats, job_for, worst_job
from rush_bench.evaluation.work import check_asked, work
from rush_bench.networks.specs import image_shape
from rush_bench.noise import Stream, Uniform
from rush_bench.records import CellResult, CellStore, load_results
from rush_bench.settings import radius
from rush_bench.threats import Norm, Threat

FOLDER = "settle"


@dataclass
class SettleRun:
    """What `settle` leaves: the evidence of each defence, what failed, and where it all lies.

    `contradictions`: attacks below what a certificate of the same weights leaves. One of the two programs has a bug.
    """

    evidence: list[Evidence]
    failed: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    done: bool = True
    pairs: list[tuple[Sequence[Defense], Images]] = field(default_factory=list)  # what the evidence is of
    contradictions: list[Comparison] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every cell of every defence has all its chunks."""
        return self.done and not self.failed and all(evidence.complete for evidence in self.evidence)


def settle(
    defenses: Sequence[Defense],
    data: Images,
    *,
    budget: str | Budget = "standard",
    norm: Norm = "linf",
    eps: float = 8 / 255,
    only: Iterable[str] | None = None,
    store: Path | str = "models",
    out: Path | str = "results",
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | Deadline | None = None,
    quiet: bool = False,
    before: Callable[[list[Planned]], bool] = lambda planned: True,
    **options: Any,
) -> SettleRun:
    """Run the experiments on defences. The same call again, from any number of processes, finishes what is left.

    `only` names experiments (T1, T10; None: all); `store` is where other models come from (transfer, ablations,
    baselines), loaded with `options`; cells go to `<out>/settle`. `before` receives the plan with its cost and may cancel it
    by returning False. A cell that fails is in `SettleRun.failed` and stops no other.
    """
    chosen = budget_named(budget)
    defenses, data = check_asked(defenses, data, shard, seed)
    if norm not in ("linf", "l2"):
        raise unknown_name("norm", norm, ("linf", "l2"))
    eps = radius(eps)
    if not 0 < eps < math.inf or any(eps > diameter(defense, norm) for defense in defenses):
        raise BadInput(f"eps {eps:g} is no radius in {norm}: pixels lie in [0,1]; give --eps 8/255 or --norm l2 --eps 0.5")
    name = budget if isinstance(budget, str) else "own"
    folder = Path(out) / FOLDER
    deadline = Deadline.after(max_minutes)
    only = None if only is None else list(only)
    cells = CellStore(folder)
    shared: dict[str, Any] = {"seed": seed, "repeats": repeats, "chunk": chunk}
    threat = Threat(norm, eps)
    planned = [_planned(d, data, chosen, name, threat, only, Path(store), options, cells, **shared) for d in defenses]

    def run_of(failed: dict[str, str], done: bool) -> SettleRun:
        evidence = [_evidence(cells, defense_plan, folder, threat, name, data) for defense_plan in planned]
        found = clashes([entry.result for each in evidence for entry in each.entries], Path(out), folder)
        return SettleRun(evidence, failed, folder, done, [(defenses, data)], found)

    if not before(planned):
        return run_of({}, False)
    forecast = Forecast(
        {key: seconds for defense_plan in planned for key, seconds in defense_plan.seconds.items()}, cells, planned
    )
    jobs = [job for defense_plan in planned for job in defense_plan.jobs]
    running: dict[str, Any] = {"shard": shard, "quiet": quiet}
    failed, done = work(cells, jobs, folder, title="settle", deadline=deadline, after=forecast.after, **running)
    for defense_plan in planned:
        for certified_norm, sampling in defense_plan.certificates:
            running["max_minutes"] = deadline
            run = certify([defense_plan.defense], data, sampling, norm=certified_norm, out=folder, seed=seed, **running)
            failed |= run.failed
            done = done and run.done
    return run_of(failed, done)


def budget_named(budget: str | Budget) -> Budget:
    """A budget by name; a wrong one is a BadInput with a suggestion."""
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return BUDGETS[budget]


def form_of_trial(defense: Defense, on: str, load: Callable[[str], Defense]) -> Defense:
    """The defence, or the form of it that a trial is about; see `Trial.on`."""
    kind, _, rest = on.partition("=")
    if not on:
        return defense
    if kind == "votes":
        other = copy.copy(defense.of_votes(int(rest)))
        other.name = f"{defense.name.split('@')[0]}@{rest}"
        return other
    if kind == "bank":
        return defense.bank(int(rest), 0)
    if kind == "model":
        return load(rest)
    if on.startswith("still"):
        source = form_of_trial(defense, on.partition(":")[2], load)
        if not _is_plain(source):
            raise BadInput(f"{source.name} cannot go through the randomised code path without noise")
        return Network(source.body, NoiseSampler(Uniform(0.0)), name=f"{source.name}-still", draws=1)
    raise BadInput(f"no form {on!r} of a defence")


def _planned(
    defense: Defense,
    data: Images,
    budget: Budget,
    budget_name: str,
    threat: Threat,
    only: list[str] | None,
    store: Path,
    options: dict[str, Any],
    cells: CellStore,
    *,
    seed: int,
    repeats: int | None,
    chunk: int,
) -> Planned:
    loaded: dict[str, Defense] = {}

    def load(name: str) -> Defense:
        if name not in loaded:
            loaded[name] = load_defense(name, store=store, **options)
        return loaded[name]

    certificates = _certificates(defense, budget) if only is None or "T12" in [name.upper() for name in only] else ()
    subject = Subject(
        draws=defense.draws,
        classes=defense.classes,
        norm=threat.norm,
        eps=threat.eps,
        diameter=diameter(defense, threat.norm),
        has_base=_available(lambda: defense.base()),
        has_bank=_available(lambda: defense.bank(2, 0)),
        has_votes=isinstance(defense, Network) and not defense.deterministic,
        has_module=_available(lambda: defense.as_module(Stream(0, "module"))),
        has_still=_is_plain(defense),
        has_chain=isinstance(getattr(defense, "transform", None), Chain),
        has_torchattacks=type(getattr(defense, "noise", None)) in LAWS and _has_torchattacks(),
        radii=tuple(
            _attackable(defense, norm, radius) for norm, sampling in certificates for radius in sampling.radii if radius > 0
        ),
        peers=_peers(defense, data, store),
    )
    quick = budget_name == "quick"
    jobs: list[tuple[Trial, Job]] = []
    shared: dict[str, Any] = {"seed": seed, "chunk": chunk, "known": {}}
    for order, trial in enumerate(plan(subject, budget, only)):
        labels = {
            "suite": f"settle-{budget_name}",
            "quick": quick,
            "subject": defense.name,
            "experiment": trial.experiment,
            "trial": trial.name,
            "on": trial.on,
            "scale": trial.scale,
            "order": order,
            "other_threat": bool(trial.norm),
            "threat_norm": threat.norm,
            "threat_eps": threat.eps,
        }
        if trial.attack == WORST:
            if of := _parts(jobs, trial):
                jobs.append((trial, worst_job(of, labels, trial.repeats)))
            continue
        target = form_of_trial(defense, trial.on, load)
        eps = trial.eps if trial.eps is not None else trial.scale * threat.eps
        if threat.norm == "linf" and not trial.norm:
            eps = min(1.0, eps)  # the whole box
        trial_threat = Threat(trial.norm or threat.norm, eps)  # type: ignore[arg-type]
        settings = trial.settings
        if trial.attack == "transfer" and settings["source"] != "base":
            settings = {**settings, "store": str(store)}
        k = trial.repeats or (default_repeats(target.draws, quick) if repeats is None else repeats)
        jobs.append((trial, job_for(target, data, trial.attack, settings, trial_threat, labels, repeats=k, **shared)))
    return priced(defense, jobs, data, certificates, cells)


def _is_plain(defense: Defense) -> TypeGuard[Network]:
    """Whether it is a network of ours that draws nothing."""
    return isinstance(defense, Network) and defense.deterministic and defense.bank_of is None


def diameter(defense: Defense, norm: Norm) -> float:
    """Of the [0,1] box in a norm: a ball of this radius around an image holds every other."""
    return 1.0 if norm == "linf" else math.sqrt(math.prod(defense.shape))


def _parts(jobs: list[tuple[Trial, Job]], trial: Trial) -> list[Job]:
    """What a worst case is over: attacks on the defence itself at the threat, of the experiments named.

    Where none are named it is over all, and over the clean images, which lie in every ball.
    """
    named = trial.settings["of"]
    clean: dict[str, Job] = {}
    parts: dict[str, Job] = {}
    for other, job in jobs:
        on_defense = other.on == "" and other.scale == 1 and not other.norm and other.attack != WORST
        if on_defense and (not named or other.experiment in named):
            (clean if other.attack == "clean" else parts).setdefault(job.cell.key, job)
    return [*([] if named else clean.values()), *parts.values()] if parts else []


def _available(make: Callable[[], object]) -> bool:
    try:
        make()
    except BadInput:
        return False
    return True


def _has_torchattacks() -> bool:
    try:
        real_torchattacks()
    except MissingPackage:
        return False
    return True


def _peers(defense: Defense, data: Images, store: Path) -> tuple[tuple[str, str, int], ...]:
    """Other models of the store for the same images: deterministic ones and the best sources of transfer first.

    The first model of each recipe stands before the second of any (other seeds and costs, and the defence's own recipe).
    """
    own = str(defense.labels().get("model", defense.name)).split("@")[0]
    found = []
    for name, card in listed(store, data.name).items() if store.is_dir() else ():
        spec = card["network"]
        fits = image_shape(spec) == tuple(defense.shape) and spec["classes"] == defense.classes
        if fits and name.split("@")[0] != own:
            votes = int(name.partition("@")[2] or 0)
            found.append((name, str(card["recipe"]), votes))
    # one row per model: a randomised one at its most votes
    best = {name.split("@")[0]: (name, recipe, votes) for name, recipe, votes in sorted(found, key=lambda peer: peer[2])}
    rank = {recipe: place for place, recipe in enumerate(SOURCES)}
    before = Counter([str(defense.labels().get("recipe"))])
    ranked = []
    for name, recipe, votes in (best[model] for model in sorted(best)):
        ranked.append(((votes != 0, before[recipe], rank.get(recipe, len(rank)), name), (name, recipe, votes)))
        before[recipe] += 1
    return tuple(peer for _, peer in sorted(ranked))


def _certificates(defense: Defense, budget: Budget) -> tuple[tuple[str, Sampling], ...]:
    """What to certify (norm, sampling): in the law's norm that attacks are compared in, at thirds of the largest radius."""
    law = law_of(defense)
    if law is None or law.scale <= 0 or not law.norms:
        return ()
    norm = law.norms[-1]
    largest = certificate(law, norm, int(np.prod(defense.shape))).largest(budget.certificate, 0.001)
    radii = tuple(share * largest for share in THIRDS)
    return ((norm, Sampling("staged", 100, budget.certificate, 0.001, radii)),)


def _attackable(defense: Defense, norm: str, radius: float) -> tuple[str, float]:
    """A ball of a norm that attacks know inside a certified one: itself, or the largest in l2."""
    own = norm if norm in get_args(Norm) else "l2"
    theorem = certificate(defense.noise, norm, math.prod(defense.shape))  # type: ignore[attr-defined]  # it is smoothed
    return own, radius / theorem.covering(own, 1.0)


def _evidence(cells: CellStore, plan: Planned, folder: Path, threat: Threat, budget: str, data: Images) -> Evidence:
    results = [cells.result(job.cell) for job in plan.jobs]
    labels = {**plan.defense.labels(), "norm": threat.norm, "eps": threat.eps, "budget_name": budget}
    labels |= {"deterministic": plan.defense.deterministic, "classes": plan.defense.classes}
    labels |= {"dataset": data.name, "n": len(data), "diameter": diameter(plan.defense, threat.norm)}
    certified = _certified(folder, plan)
    complete = tuple(result for result in certified if result.complete)
    # others that lie there, of more draws or other images, are compared too, but not waited for
    certified_keys = {(r.identity["images"], r.identity["attack"]["draws"], r.labels["norm"]) for r in complete}
    missing = sum((data.digest, sampling.draws, norm) not in certified_keys for norm, sampling in plan.certificates)
    return Evidence(plan.defense.name, labels, tuple(entries_of(results)), complete, missing)


def _certified(folder: Path, plan: Planned) -> list[CellResult]:
    identity = {key: value for key, value in plan.defense.identity().items() if key != "votes"}
    found = load_results(folder / CERTIFICATES, warn=lambda text: None)
    return [result for result in found if result.identity["defense"] == identity]
