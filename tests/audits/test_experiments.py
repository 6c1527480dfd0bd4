"""The plan of every budget and kind of defence: what exists; `full` to the letter of the protocol."""

import dataclasses
import itertools
from collections import Counter

import pytest

from rush_bench.attacks.base import Attack
from rush_bench.audits.checks import DRAWS, IMAGES, POINTS, QUERIES
from rush_bench.audits.experiments import BUDGETS, EXPERIMENTS, WORST, Subject, choose, plan
from rush_bench.errors import BadInput
from rush_bench.registry import attacks
from rush_bench.settings import override

EPS = 8 / 255
PEERS = (("plain", "pgd_at", 0), ("other", "simclr", 0), ("noisy@64", "noise_sup", 64), ("seed1@64", "rush", 64))


def subject(draws: int = 64, classes: int = 10, norm: str = "linf", **other) -> Subject:
    radii = () if not draws else (("l2", 0.2), ("l2", 0.4))
    return Subject(draws, classes, norm, EPS if norm == "linf" else 0.5, radii=radii, peers=PEERS, **other)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("draws", "classes", "norm"), list(itertools.product((0, 1, 64), (2, 3, 10), ("linf", "l2"))))
def test_every_trial_is_one_that_can_be_made(budget, draws, classes, norm) -> None:
    trials = plan(subject(draws, classes, norm, has_torchattacks=True), BUDGETS[budget], None)
    names = Counter((trial.experiment, trial.name) for trial in trials)
    assert max(names.values()) == 1, names.most_common(1)
    for trial in trials:
        if trial.attack == WORST:
            assert set(trial.settings["of"]) <= set(EXPERIMENTS)
            continue
        made = override(attacks.load(trial.attack)(), trial.settings)  # BadInput for a setting that is none, or its type
        assert isinstance(made, Attack)
        assert all(getattr(made, key) == value for key, value in trial.settings.items())
        assert 0 < trial.scale <= 32
    used = {trial.attack for trial in trials}
    assert "aa" in used  # of few classes, the parts that exist
    if classes < 4:
        assert "torchattacks-aa" not in used
    if classes < 3:
        assert not any("dlr" in loss for trial in trials for loss in trial.settings.get("losses", ()))
    if not draws:
        assert not used & {"eot", "aa-rand", "aa-published", "pgd-published"} and not any("bank" in t.on for t in trials)
    if norm == "l2":
        assert not any(trial.attack.startswith("torchattacks") for trial in trials)


@pytest.mark.parametrize(
    ("norm", "eps", "diameter", "last"),
    [("linf", 8 / 255, 1.0, 32), ("linf", 0.1, 1.0, 16), ("linf", 0.2, 1.0, 8), ("l2", 0.5, 16.0, 32), ("l2", 1.0, 55.4, 64)],
)
def test_the_curve_of_eps_doubles_to_where_chance_is_certain(norm, eps, diameter, last) -> None:
    scales = [t.scale for t in plan(Subject(0, 10, norm, eps, diameter=diameter), BUDGETS["quick"], ["T10"])][1:]
    assert scales[-1] == last and last * eps >= diameter and scales == sorted(scales) and {4, 8} <= set(scales)
    assert last == 8 or last / 2 * eps < diameter


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("draws", [0, 1, 64])
def test_every_budget_has_what_the_required_checks_need_to_fail(budget, draws) -> None:
    trials = plan(subject(draws), BUDGETS[budget], ["T0", "T1", "T7"])
    own = [t for t in trials if t.experiment == "T7" and not t.on]
    assert own[-1].settings["queries"] >= QUERIES and BUDGETS[budget].images >= IMAGES
    assert values(trials, "points")[0] >= POINTS and (not draws or BUDGETS[budget].sweep[-1] >= DRAWS)


def of(budget: str, experiment: str, **how):
    return plan(subject(**how), BUDGETS[budget], [experiment])


def values(trials, key: str) -> list:
    return [trial.settings[key] for trial in trials if key in trial.settings]


def test_full_is_the_protocol_to_the_letter() -> None:
    """Protocol section 7, T0 to T16."""
    assert BUDGETS["full"].images == 1_000
    assert values(of("full", "T0"), "points") == [100]
    t1 = of("full", "T1")
    assert values(t1, "draws") == [1, 4, 16, 64, 256]
    assert {(t.settings["steps"], t.settings["step"]) for t in t1} == {(100, 0.025)}
    assert [(t.settings["draws"], t.settings["redraw"]) for t in of("full", "T2")] == [
        *((1, redraw) for redraw in (0, 1, 10)),
        *((64, redraw) for redraw in (0, 1, 10)),
    ]
    assert set(values(of("full", "T2"), "select_draws")) == {attacks.load("eot")().select_draws}  # fresh draws are T1's cells
    t3 = of("full", "T3")
    assert [t.settings["steps"] for t in t3 if t.name.startswith("T=") and "restarts" not in t.settings] == [10, 40, 100, 1000]
    assert values(t3, "restarts") == [10]
    t4 = [t for t in of("full", "T4") if t.attack != WORST]
    averages = ("@logits", "", "@vote")  # the soft vote has beta 10 unless it says another
    assert values(t4, "losses") == [(loss + how,) for loss in ("ce", "margin", "dlr", "margin-to") for how in averages]
    assert set(values(t4, "targets")) == {9}
    assert values(of("full", "T5", draws=1), "eot_iter") == [20, 64]
    assert values(of("full", "T6"), "bank") == [16, 64, 256] and values(of("full", "T6"), "parts") == [()] * 3
    assert [(t.settings["queries"], t.on) for t in of("full", "T7")] == [
        (5_000, ""),
        (20_000, ""),
        (5_000, "bank=64"),
        (20_000, "bank=64"),
    ]
    assert attacks.load("square")().draws == 20
    assert values(of("full", "T8"), "source") == ["base", *(name for name, _, _ in PEERS)]
    assert set(values(of("full", "T8"), "draws")) == {1}
    assert values(of("full", "T9"), "clamp") == ["project", "graph", "straight-through"]
    t10 = of("full", "T10")
    assert [round(255 * EPS * t.scale) for t in t10[1:]] == [1, 2, 4, 8, 12, 16, 32, 64, 128, 256] and t10[0].attack == "clean"
    assert [t.repeats for t in of("full", "T11")] == [100]
    t13 = of("full", "T13")
    assert [t.on for t in t13] == [f"votes={m}" for m in (1, 8, 64, 512)] and set(values(t13, "draws")) == {256}
    t15 = of("full", "T15")
    assert [t.attack for t in t15][:3] == ["aa-published", "aa-published", "pgd-published"] and t15[-1].attack == WORST
    everything = plan(subject(), BUDGETS["full"], None)
    worst = [t.attack == WORST for t in everything]
    assert worst == sorted(worst)  # last, so that they are over all
    assert 1_000 in values(t15, "steps")


@pytest.mark.parametrize(
    ("budget", "draws", "square", "averaged"),
    [
        ("quick", 1, {"draws": 8}, [64]),
        ("quick", 64, {"draws": 8, "whole": False}, []),
        ("standard", 1, {}, [256]),
        ("standard", 64, {}, [256]),
        ("standard", 256, {}, [512]),
    ],
)
def test_quick_costs_about_the_same_whatever_the_votes(budget, draws, square, averaged) -> None:
    """A query of Square takes as many draws, and no gradient of T15 more than T1's most or the vote's own."""
    trials = plan(subject(draws), BUDGETS[budget], ["T7", "T15"])
    (asked,) = (t.settings for t in trials if t.experiment == "T7" and not t.on)
    assert asked == {"queries": BUDGETS[budget].queries[0], **square}
    replays = [t.settings for t in trials if t.attack == "pgd-published" and t.settings.get("draws")]
    assert [r["draws"] for r in replays] == [*averaged, averaged[0] if averaged else draws]


def test_rand_has_as_many_draws_in_all_as_it_has_at_one_vote() -> None:
    assert values(of("full", "T5", draws=8), "eot_iter") == [2, 8]
    assert values(of("full", "T5", draws=64), "eot_iter") == [1]


@pytest.mark.parametrize(
    ("lacks", "gone"),
    [
        ({"has_base": False}, {("T8", "from the un-noised base")}),
        ({"has_votes": False}, {("T13", f"{m} votes") for m in BUDGETS["quick"].votes}),
        ({"has_bank": False}, {("T15", "APGD on a bank of 64")}),
    ],
)
def test_what_a_defence_cannot_is_left_out_and_nothing_else(lacks, gone) -> None:
    full, less = ({(t.experiment, t.name) for t in plan(subject(**how), BUDGETS["quick"], None)} for how in ({}, lacks))
    left_out = full - less
    assert gone <= left_out and less < full
    assert left_out == gone | {pair for pair in full if pair[0] == "T6" and "has_bank" in lacks}


@pytest.mark.parametrize("draws", [0, 64])
def test_without_logits_for_others_no_attack_of_others(draws) -> None:
    trials = plan(subject(draws, has_module=False, has_still=False, has_torchattacks=True), BUDGETS["quick"], None)
    itself = [trial for trial in trials if not trial.on.startswith("model=")]
    assert not {trial.attack for trial in itself} & {"aa", "apgd", "aa-rand", "aa-published", "torchattacks-aa"}
    assert not any(trial.on == "still" for trial in trials)


def test_smaller_budgets_are_parts() -> None:
    counts = [len(plan(subject(), BUDGETS[name], None)) for name in ("quick", "standard", "full")]
    assert counts == sorted(counts)
    for smaller, larger in itertools.pairwise(("quick", "standard", "full")):
        for field in dataclasses.fields(BUDGETS[smaller]):
            one, two = (getattr(BUDGETS[name], field.name) for name in (smaller, larger))
            if isinstance(one, int) and not isinstance(one, bool) and field.name != "part_steps":
                assert one <= two, field.name


def test_t16_asks_both_doors_the_same() -> None:
    """The randomised path has the losses and steps of what it stands beside."""
    for budget, losses, steps in (("quick", ("ce",), 20), ("full", ("ce", "margin-to"), 100)):
        trials = of(budget, "T16", draws=0)
        assert [t.on for t in trials] == ["", "still"]
        assert (trials[1].settings["losses"], trials[1].settings["steps"]) == (losses, steps)
        assert [t.on for t in of(budget, "T16")] == ["model=plain", "still:model=plain", "model=other", "still:model=other"]


def test_choosing() -> None:
    assert choose(None) == list(EXPERIMENTS) and choose([" t1", "T10 "]) == ["T1", "T10"]
    with pytest.raises(BadInput, match="did you mean"):
        choose(["T17"])


def test_the_waterfall_of_a_purifier_undoes_one_surrogate_after_another() -> None:
    bars = [t for t in plan(subject(draws=1, has_chain=True), BUDGETS["quick"], ["T15"]) if t.experiment == "T15"]
    replays = [t.settings.get("surrogate", "adjoint") for t in bars if "as published" in t.name]
    assert replays == ["blind", "bpda", "adjoint"] == [t.settings.get("surrogate", "adjoint") for t in bars][:3]
    corrected = [t for t in bars if t.attack == "pgd-purifier"][3:]
    assert all(t.settings["surrogate"] == "exact" for t in corrected)
    changed = [set(b.settings.items()) - set(a.settings.items()) for a, b in itertools.pairwise(corrected)]
    assert [{key for key, _ in change} for change in changed] == [{"draws"}, {"keep"}, {"steps", "step"}]
    assert bars[-1].attack == WORST and not any("published" in t.attack for t in bars)
