"""The experiments T0 to T16 that settle a claim (protocol 5), as lists of trials. Names and settings only: no torch.

A trial is one cell: an attack with its settings on the defence itself or on a form of it (`on`), at a multiple of the threat's
eps. The same cell under two experiments is worked off once, since records are keyed by what is done and not by its name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rush_bench.attacks.parts import Name, settled
from rush_bench.errors import BadInput, unknown_name

WORST = "worst"  # trial.attack of a per-image worst case; settings name the experiments that it is over
SOURCES = ("pgd_at", "trades", "dataaug", "free", "acl", "simclr")  # recipes, the best sources of transfer first (T8)
ABLATIONS = ("simclr", "noise_sup", "random_probe", "cohen", "rush")  # recipes that isolate an ingredient of RUSH (T14)


@dataclass(frozen=True)
class Trial:
    """One cell. `scale` multiplies eps; `on` is the defence itself (""), or `votes=8`, `bank=64`, `still`, `model=NAME`.

    `repeats` replaces the default K; `norm` and `eps` replace the threat where a certificate is asked about another.
    """

    experiment: str
    name: str
    attack: str
    settings: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    on: str = ""
    repeats: int | None = None
    norm: str = ""
    eps: float | None = None


@dataclass(frozen=True)
class Subject:
    """What the plan must know of a defence: its votes (0: deterministic), noise, what else is in the store."""

    draws: int
    classes: int
    norm: str
    eps: float
    diameter: float = 1.0  # of the box in the threat's norm: a ball of that radius holds every image
    has_base: bool = True
    has_bank: bool = True
    has_votes: bool = True
    has_module: bool = True  # logits for AutoAttack's code
    has_still: bool = True  # a network of ours, which may go through the randomised code path without noise (T16)
    has_chain: bool = False  # a purifier, whose gradient papers approximated (T15)
    has_torchattacks: bool = False  # the extra is installed: the package's own attacks beside our emulation (T15)
    radii: tuple[tuple[str, float], ...] = ()  # (norm, eps) at which a certificate is compared with attacks (T12)
    peers: tuple[tuple[str, str, int], ...] = ()  # other models of the data set: name, recipe, votes


@dataclass(frozen=True)
class Budget:
    """How much of each experiment is run. `full` is the protocol to the letter on 1,000 images; the others are parts of it."""

    images: int
    points: int  # T0: random points per image
    sweep: tuple[int, ...]  # T1: draws of a gradient
    steps: int  # PGD steps of T1, T2, T9, T13
    draws: int  # of a gradient in T3, T4, T10
    lengths: tuple[int, ...]  # T3: steps
    restarts: int
    losses_steps: int  # T4
    rand: tuple[int, ...]  # T5: eot_iter at one vote; a vote of m already averages, see `_rand`
    rand_steps: int
    banks: tuple[int, ...]  # T6: bank sizes besides the defence's own m
    parts: tuple[Name, ...]  # T6, T16: parts of AutoAttack; empty is the standard version
    part_steps: int
    queries: tuple[int, ...]  # T7
    sweep_steps: int  # T10, T14
    votes: tuple[int, ...]  # T13
    certificate: int  # T12: draws N
    published: dict[str, Any]  # T15: settings of the replay of AutoAttack
    long: int  # T15: steps of the longest bar
    peers: int  # T8: other models as sources; T14, T16: as subjects
    targets: int = 9  # T4
    small: bool = False  # fewer cells where experiments have many, shorter attacks under names that say so


BUDGETS = {
    "quick": Budget(
        images=100,
        points=20,
        sweep=(1, 4, 16, 64),
        steps=30,
        draws=16,
        lengths=(10, 20, 60),
        restarts=3,
        losses_steps=20,
        rand=(20,),
        rand_steps=20,
        banks=(16, 64),
        parts=("apgd-ce",),
        part_steps=20,
        queries=(1_000,),
        sweep_steps=20,
        votes=(1, 8, 64),
        certificate=2_000,
        published={"steps": 5, "queries": 30, "targets": 2},
        long=60,
        peers=2,
        targets=3,
        small=True,
    ),
    "standard": Budget(
        images=500,
        points=100,
        sweep=(1, 4, 16, 64, 256),
        steps=100,
        draws=32,
        lengths=(10, 40, 100, 300),
        restarts=5,
        losses_steps=100,
        rand=(20,),
        rand_steps=100,
        banks=(16, 64, 256),
        parts=(),
        part_steps=0,
        queries=(5_000,),
        sweep_steps=100,
        votes=(1, 8, 64, 512),
        certificate=10_000,
        published={},
        long=300,
        peers=3,
    ),
    "full": Budget(
        images=1_000,
        points=100,
        sweep=(1, 4, 16, 64, 256),
        steps=100,
        draws=64,
        lengths=(10, 40, 100, 1_000),
        restarts=10,
        losses_steps=100,
        rand=(20, 64),
        rand_steps=100,
        banks=(16, 64, 256),
        parts=(),
        part_steps=0,
        queries=(5_000, 20_000),
        sweep_steps=100,
        votes=(1, 8, 64, 512),
        certificate=100_000,
        published={},
        long=1_000,
        peers=4,
    ),
}


@dataclass(frozen=True)
class Experiment:
    """A line of the protocol's table: what it asks, how its outcome is to be read, and its trials."""

    title: str
    reading: str
    trials: Callable[[Subject, Budget], list[Trial]]


OF_EOT: dict[str, Any] = {"of": "eot", "select_draws": 64}  # with fresh draws that is EOT itself, and the same cell as T1's


def _steps(count: int) -> dict[str, Any]:
    return {"steps": count, "step": 2.5 / count}


def _strong_settings(b: Budget, s: Subject) -> dict[str, Any]:
    return {"steps": b.sweep_steps, "draws": max(b.draws, s.draws and 16)}


def _t0(s: Subject, b: Budget) -> list[Trial]:
    return [Trial("T0", f"{b.points} random points", "random-noise", {"points": b.points})]


def _t1(s: Subject, b: Budget) -> list[Trial]:
    return [Trial("T1", f"m={m}", "eot", {**_steps(b.steps), "draws": m}) for m in b.sweep] if s.draws else []


def _t2(s: Subject, b: Budget) -> list[Trial]:
    if not s.draws:
        return []
    many = max(s.draws, 16)
    reuse = {"fixed": 0, "fresh": 1, "every 10 steps": 10}
    return [
        Trial("T2", f"{name}, m={m}", "pgd-ablation", {**_steps(b.steps), **OF_EOT, "draws": m, "redraw": redraw})
        for m in (1, many)
        for name, redraw in reuse.items()
    ]


def _t3(s: Subject, b: Budget) -> list[Trial]:
    common = {"losses": ("ce",), "draws": b.draws}
    trials = [Trial("T3", f"T={steps}", "eot-apgd", {**common, "steps": steps}) for steps in b.lengths]
    middle = b.lengths[-2]
    restarted = {**common, "steps": middle, "restarts": b.restarts}
    once = {"steps": 1, "step": 1.0, "random_start": False, "draws": b.draws if s.draws else 0}
    trials.insert(0, Trial("T3", "one step", "eot" if s.draws else "pgd", once))
    return [*trials, Trial("T3", f"T={middle}, {b.restarts} restarts", "eot-apgd", restarted)]


def _t4(s: Subject, b: Budget) -> list[Trial]:
    losses = [loss for loss in ("ce", "margin", "dlr", "margin-to") if loss != "dlr" or s.classes > 2]
    averages = {"mean logits": "@logits", "log mean probability": "", "soft vote": "@vote"} if s.draws else {"": ""}
    names = {"ce": "CE", "margin": "margin", "dlr": "DLR", "margin-to": f"margin, {min(b.targets, s.classes - 1)} targets"}
    trials = [
        Trial(
            "T4",
            names[loss] + (f" of {name}" if name else ""),
            "eot-apgd",
            {"steps": b.losses_steps, "losses": (loss + averaging,), "draws": b.draws, "targets": b.targets},
        )
        for loss in losses
        for name, averaging in averages.items()
    ]
    return [*trials, Trial("T4", "per-image minimum", WORST, {"of": ("T4",)})]


def _t5(s: Subject, b: Budget) -> list[Trial]:
    if not s.draws or not s.has_module:
        return []
    # a gradient of a vote is a mean over m draws already: as many draws in all as eot_iter asks for at one vote
    counts = sorted({max(1, round(count / s.draws)) for count in b.rand})
    return [Trial("T5", f"eot_iter={count}", "aa-rand", {"eot_iter": count, "steps": b.rand_steps}) for count in counts]


def _t6(s: Subject, b: Budget) -> list[Trial]:
    if not s.has_bank or not s.has_module:
        return []
    parts = settled(s.classes, b.parts)
    settings = {"parts": parts, "steps": b.part_steps}
    title = "AA" if not parts else "+".join(part.upper() for part in parts)
    if not s.draws:
        return [Trial("T6", title, "aa", settings)]
    sizes = sorted({max(s.draws, 16), *b.banks})
    return [Trial("T6", f"{title}, bank of {size}", "aa", {**settings, "bank": size}) for size in sizes]


def _t7(s: Subject, b: Budget) -> list[Trial]:
    few: dict[str, Any] = {"draws": 8} if b.small and s.draws else {}
    if few and s.draws > few["draws"]:
        few["whole"] = False  # the same effort whatever m
    trials = [Trial("T7", f"{queries} queries", "square", {"queries": queries, **few}) for queries in b.queries]
    if s.draws and s.has_bank and not b.small:
        bank = max(s.draws, 16)
        trials += [
            Trial("T7", f"{queries} queries, bank of {bank}", "square", {"queries": queries}, on=f"bank={bank}")
            for queries in b.queries
        ]
    return trials


def _t8(s: Subject, b: Budget) -> list[Trial]:
    trials = []
    if s.draws and s.has_base:
        trials.append(Trial("T8", "from the un-noised base", "transfer", {"source": "base", "steps": b.steps}))
    for name, _, _ in s.peers[: b.peers]:
        settings = {"source": name, "steps": b.steps, "draws": 1}
        trials.append(Trial("T8", f"from {name}", "transfer", settings))
    return trials


def _t9(s: Subject, b: Budget) -> list[Trial]:
    clamps = {"projected": "project", "clamp in the graph": "graph", "straight-through": "straight-through"}
    common = {**_steps(b.steps), **OF_EOT, "draws": b.draws} if s.draws else _steps(b.steps)
    return [Trial("T9", name, "pgd-ablation", {**common, "clamp": clamp}) for name, clamp in clamps.items()]


def _t10(s: Subject, b: Budget) -> list[Trial]:
    clean = Trial("T10", "0", "clean")
    scales = [0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0]
    while scales[-1] * s.eps < s.diameter:  # to where chance is certain
        scales.append(2 * scales[-1])
    return [clean, *(Trial("T10", f"{scale:g} eps", "eot-apgd", _strong_settings(b, s), scale=scale) for scale in scales)]


def _t11(s: Subject, b: Budget) -> list[Trial]:
    return [_worst("T11", s, b)]


def _worst(experiment: str, s: Subject, b: Budget) -> Trial:
    """The worst case over all: one cell, so that the audit's and the waterfall's are one number."""
    repeats = None if not s.draws else 20 if b.small and s.draws > 8 else 100
    return Trial(experiment, "worst case over all", WORST, {"of": ()}, repeats=repeats)


def _t12(s: Subject, b: Budget) -> list[Trial]:
    return [
        Trial("T12", f"{norm} {eps:.4g}", "eot", {**_steps(b.steps), "draws": b.draws}, norm=norm, eps=eps)
        for norm, eps in (s.radii[-1:] if b.small else s.radii)
    ]


def _t13(s: Subject, b: Budget) -> list[Trial]:
    if not s.draws or not s.has_votes:
        return []
    settings = {**_steps(b.steps), "draws": b.sweep[-1]}
    return [Trial("T13", f"{votes} votes", "eot", settings, on=f"votes={votes}") for votes in b.votes]


def _t14(s: Subject, b: Budget) -> list[Trial]:
    if not s.draws:
        return []
    arms = [(name, votes) for name, recipe, votes in s.peers if recipe in ABLATIONS]
    own = [Trial("T14", "this defence", "eot-apgd", _strong_settings(b, s))]
    arms_trials = [
        Trial(
            "T14",
            name,
            "eot-apgd",
            _strong_settings(b, Subject(votes, s.classes, s.norm, s.eps)),
            on=f"model={name}",
        )
        for name, votes in arms[: 2 * b.peers]
    ]
    return [*own, *arms_trials] if arms_trials else []


def _t15(s: Subject, b: Budget) -> list[Trial]:
    """The waterfall: what was published, then one correction after another, to the worst case of all."""
    if not s.draws:
        return [
            Trial("T15", "PGD-20", "pgd"),
            _worst("T15", s, b),
        ]
    # what the package itself gives, beside our emulation of it; bars of their own, no part of the waterfall
    theirs = []
    if s.has_torchattacks and s.norm == "linf":
        theirs.append(Trial("T15", "torchattacks' own PGDRS", "torchattacks-pgdrs"))
        if s.classes >= 4 and s.has_module and (not b.small or s.draws <= 8):
            effort = {key: b.published.get(key, default) for key, default in (("steps", 10), ("queries", 5_000))}
            theirs.append(Trial("T15", "torchattacks' own AutoAttack", "torchattacks-aa", effort))
            theirs.append(Trial("T15", "torchattacks' own AutoAttack, emulated", "aa-published", {**effort, "fab": "targeted"}))
    most = max(b.sweep[-1], s.draws if b.small else 2 * s.draws)
    more = max(b.draws, s.draws) if s.has_chain else most  # a purifier's draw is many rows
    bars = _purified(b, more) if s.has_chain else _smoothed(s, b, more)
    bars.append(
        Trial(
            "T15",
            "margin loss, step control",
            "eot-apgd",
            {"steps": b.long, "losses": ("margin",), "draws": max(b.draws, s.draws) if b.small else more},
        )
    )
    if s.has_bank and s.has_module:
        size, title = max(s.draws, 16), "APGD" if b.parts else "AutoAttack"
        settings = {"parts": settled(s.classes, b.parts), "steps": b.part_steps, "bank": size}
        bars.append(Trial("T15", f"{title} on a bank of {size}", "aa", settings))
    return [*theirs, *bars, _worst("T15", s, b)]


def _smoothed(s: Subject, b: Budget, more: int) -> list[Trial]:
    """T15's bars for what RUSH did: its AutoAttack and its PGD as published, and their corrections."""
    bars = []
    if s.has_module:
        bars += [
            Trial("T15", "AA as published", "aa-published", dict(b.published)),
            Trial("T15", "never the clean image back", "aa-published", {**b.published, "hand_back": "best"}),
        ]
    fresh = {"steps": 40, "step": 0.25, "clamp": "project", "keep": "best", "redraw": 1}
    averaged = [Trial("T15", f"{more} draws a gradient", "pgd-published", {**fresh, "draws": more})] if more > s.draws else []
    return [
        *bars,
        Trial("T15", "PGD as published", "pgd-published"),
        Trial("T15", "best x' kept, no frozen pixels", "pgd-published", {"clamp": "project", "keep": "best"}),
        Trial("T15", "fresh noise at every step", "pgd-published", fresh),
        *averaged,
        Trial("T15", f"{b.long} steps", "pgd-published", {**fresh, "draws": more, **_steps(b.long)}),
    ]


def _purified(b: Budget, more: int) -> list[Trial]:
    """T15's bars for a purifier: the gradients that papers attacked with as they did, and their corrections."""
    exact: dict[str, Any] = {"surrogate": "exact"}
    return [
        Trial("T15", "blind gradient, as published", "pgd-purifier", {"surrogate": "blind"}),
        Trial("T15", "BPDA, as published", "pgd-purifier", {"surrogate": "bpda"}),
        Trial("T15", "adjoint gradient, as published", "pgd-purifier"),
        Trial("T15", "exact gradient", "pgd-purifier", exact),
        Trial("T15", f"{more} draws a gradient", "pgd-purifier", {**exact, "draws": more}),
        Trial("T15", "best x' kept", "pgd-purifier", {**exact, "draws": more, "keep": "best"}),
        Trial("T15", f"{b.long} steps", "pgd-purifier", {**exact, "draws": more, "keep": "best", **_steps(b.long)}),
    ]


def _t16(s: Subject, b: Budget) -> list[Trial]:
    itself = [("", "")] if s.has_module and s.has_still else []
    subjects = itself if not s.draws else [(f"model={n}", f"{n}, ") for n, _, votes in s.peers if not votes][: b.peers]
    # without noise every draw is the same: one goes through the code path of many
    # and the losses are those of AutoAttack: of its parts, or CE and targets as in the standard version
    losses = ("ce",) if b.parts == ("apgd-ce",) else ("ce", "margin-to")
    ours = {"steps": b.part_steps or b.sweep_steps, "losses": losses, "draws": 1, "select_draws": 1}
    trials = []
    for on, prefix in subjects:
        trials.append(
            Trial("T16", prefix + "AutoAttack", "aa", {"parts": settled(s.classes, b.parts), "steps": b.part_steps}, on=on)
        )
        trials.append(Trial("T16", prefix + "randomised code path, no noise", "eot-apgd", ours, on=without_noise(on)))
    return trials


def without_noise(on: str) -> str:
    """The same form of a defence (`Trial.on`) through the randomised code path without noise."""
    return f"still:{on}" if on else "still"


EXPERIMENTS: dict[str, Experiment] = {
    "T0": Experiment("random noise", "must drop far less than any attack", _t0),
    "T1": Experiment("draws of a gradient", "over 3 points lost from the second largest m: that m is too small", _t1),
    "T2": Experiment("noise reuse", "the headline is the worst of them", _t2),
    "T3": Experiment("steps and restarts", "flat at the end, or go on", _t3),
    "T4": Experiment("loss and average", "the per-image minimum counts", _t4),
    "T5": Experiment("AutoAttack rand", "at most 1 point below T4's minimum, or T4 is too weak", _t5),
    "T6": Experiment("derandomised", "bank and fresh draws agree as the bank grows", _t6),
    "T7": Experiment("without gradients", "below the white box: gradients are masked", _t7),
    "T8": Experiment("transfer", "below the white box: the white-box attack is broken", _t8),
    "T9": Experiment("box clamp", "what frozen pixels cost the published attack", _t9),
    "T10": Experiment("eps", "at most 5 % at 4 eps or where chance is certain; a plateau is a broken attack", _t10),
    "T11": Experiment("repeated queries", "any of k predictions wrong", _t11),
    "T12": Experiment("certificate and attack", "certified is never above attacked", _t12),
    "T13": Experiment("votes of the defence", "flat", _t13),
    "T14": Experiment("ablations", "which ingredient does it", _t14),
    "T15": Experiment("as published, corrected step by step", "the last bar is what is left of the claim", _t15),
    "T16": Experiment("baselines through the same door", "equal to AutoAttack within 0.3 points", _t16),
}


def choose(only: Iterable[str] | None) -> list[str]:
    """Experiment names, all where `only` is None; a wrong one is a BadInput with a suggestion."""
    if only is None:
        return list(EXPERIMENTS)
    wanted = [name.strip().upper() for name in only if name.strip()]
    for name in wanted:
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    if not wanted:
        raise BadInput("--only takes experiments, such as T1,T10,T15")
    return [name for name in EXPERIMENTS if name in wanted]


def plan(subject: Subject, budget: Budget, only: Iterable[str] | None = None) -> list[Trial]:
    """The trials of these experiments in order; worst cases last, since they need the others."""
    trials = [trial for name in choose(only) for trial in EXPERIMENTS[name].trials(subject, budget)]
    return sorted(trials, key=lambda trial: trial.attack == WORST)
