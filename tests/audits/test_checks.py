"""Every check on evidence made by hand: one that passes, one that does not, one that lacks its experiment; and chance."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rush_bench.audits import checks as room
from rush_bench.audits.checks import checks
from rush_bench.audits.experiments import BUDGETS, EXPERIMENTS, WORST, Subject, plan
from rush_bench.audits.roles import Role, role_of
from rush_bench.audits.run import judge
from rush_bench.audits.verdict import Claim
from rush_bench.registry import attacks
from rush_bench.settings import override


@pytest.fixture
def table(made_by_hand):
    """Name of a check to (entries that pass, entries that do not), as (experiment, trial, accuracy, options)."""
    t4 = ("T4", "per-image minimum", 0.5, {"attack": "worst"})
    return {
        "iterative-beats-single-step": ([t4, ("T3", "one step", 0.8, {})], [t4, ("T3", "one step", 0.2, {})]),
        "reaches-chance": (
            [("T10", "4 eps", 0.5, {"scale": 4.0}), ("T10", "8 eps", 0.0, {"scale": 8.0, "eps": 0.8})],
            [("T10", "4 eps", 0.9, {"scale": 4.0}), ("T10", "8 eps", 0.5, {"scale": 8.0, "eps": 0.8})],
        ),
        "larger-eps-never-helps": (
            [("T10", "0", 0.9, {"attack": "clean"}), ("T10", "0.5 eps", 0.6, {}), ("T10", "1 eps", 0.3, {})],
            [("T10", "0", 0.9, {"attack": "clean"}), ("T10", "0.5 eps", 0.3, {}), ("T10", "1 eps", 0.5, {})],
        ),
        "square-beats-white-box": (
            [("T1", "m=1", 0.5, {"attack": "eot"}), ("T7", "10 queries", 0.7, {"attack": "square"})],
            [("T1", "m=1", 0.5, {"attack": "eot"}), ("T7", "10 queries", 0.3, {"attack": "square"})],
        ),
        "white-box-beats-transfer": ([t4, ("T8", "from x", 0.9, {})], [t4, ("T8", "from x", 0.3, {})]),
        "random-noise": ([t4, ("T0", "5 random points", 0.9, {})], [t4, ("T0", "5 random points", 0.3, {})]),
        "more-draws": (
            [("T1", "m=1", 0.9, {}), ("T1", "m=4", 0.5, {}), ("T1", "m=16", 0.48, {})],
            [("T1", "m=1", 0.9, {}), ("T1", "m=4", 0.5, {}), ("T1", "m=16", 0.3, {})],
        ),
        "more-steps": (
            [("T3", "T=5", 0.9, {}), ("T3", "T=10", 0.5, {}), ("T3", "T=20", 0.5, {}), ("T3", "T=10, 2 restarts", 0.49, {})],
            [("T3", "T=5", 0.9, {}), ("T3", "T=10", 0.5, {}), ("T3", "T=20", 0.5, {}), ("T3", "T=10, 2 restarts", 0.3, {})],
        ),
        "rand-finds-no-more": ([t4, ("T5", "eot_iter=1", 0.6, {})], [t4, ("T5", "eot_iter=1", 0.3, {})]),
        "steep-m-curve": (
            [("T1", "m=1", 0.52, {}), ("T1", "m=16", 0.5, {})],
            [("T1", "m=1", 0.9, {}), ("T1", "m=16", 0.5, {})],
        ),
        "aa-above-pgd": (
            [("T15", "AA as published", 0.5, {}), ("T15", "PGD as published", 0.6, {})],
            [("T15", "AA as published", 0.8, {}), ("T15", "PGD as published", 0.6, {})],
        ),
        "replay-above-worst": (
            [("T15", "PGD as published", 0.5, {}), ("T11", "worst case over all", 0.48, {"attack": "worst"})],
            [("T15", "PGD as published", 0.9, {}), ("T11", "worst case over all", 0.48, {"attack": "worst"})],
        ),
        "same-through-both-doors": (
            [("T16", "AutoAttack", 0.5, {}), ("T16", "randomised code path, no noise", 0.51, {"on": "still"})],
            [("T16", "AutoAttack", 0.5, {}), ("T16", "randomised code path, no noise", 0.7, {"on": "still"})],
        ),
        "emulation-agrees": (
            [("T15", "torchattacks' own PGDRS", 0.5, {}), ("T15", "fresh noise at every step", 0.5, {})],
            [("T15", "torchattacks' own PGDRS", 0.5, {}), ("T15", "fresh noise at every step", 0.9, {})],
        ),
    }


NAMES = (
    "iterative-beats-single-step",
    "reaches-chance",
    "larger-eps-never-helps",
    "square-beats-white-box",
    "white-box-beats-transfer",
    "random-noise",
    "more-draws",
    "more-steps",
    "rand-finds-no-more",
    "steep-m-curve",
    "aa-above-pgd",
    "replay-above-worst",
    "same-through-both-doors",
    "emulation-agrees",
)


def found(evidence, name):
    return next(finding for finding in checks(evidence) if finding.check == name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("votes", [0, 4])
def test_passes_and_does_not(table, made_by_hand, name, votes) -> None:
    good, bad = (
        made_by_hand.evidence(
            *(made_by_hand.entry(e, t, made_by_hand.share(q), votes=votes, **how) for e, t, q, how in rows),
            deterministic=votes == 0,
        )
        for rows in table[name]
    )
    assert found(good, name).status == "pass", found(good, name)
    beyond = "bug" if name == "larger-eps-never-helps" else "flag"
    assert found(bad, name).status == beyond, found(bad, name)


def test_nothing_is_judged_without_its_experiment(made_by_hand) -> None:
    findings = checks(made_by_hand.evidence())
    assert {f.status for f in findings} == {"not run"} and all(f.note and f.source for f in findings)
    assert {f.check for f in findings} == {
        *NAMES,
        "certificate-above-attack",
        "bank-and-fresh",
        "repeated-queries",
        "labels-in-order",
        "images-distinct",
    }


@pytest.mark.parametrize(
    ("right", "n", "status"),
    [(0, 88, "flag"), (0, 87, "pass"), (10, 100, "pass"), (1, 100, "pass"), (0, 100, "flag"), (100, 100, "pass")],
)
def test_clean_accuracy_below_chance_is_a_matter_of_labels(made_by_hand, right, n, status) -> None:
    """Ten classes as many times each, predicted as their own or as the next: 0.9^88 = 0.00009 and 0.9^87 = 0.0001."""
    label, correct = np.arange(n) % 10, (np.arange(n) < right).astype(int)
    said = np.eye(10, dtype=int)[np.where(correct, label, (label + 1) % 10)]
    columns = {"label": label, **{f"count_{k}": said[:, k] for k in range(10)}}
    evidence = made_by_hand.evidence(
        made_by_hand.entry("T10", "0", correct, attack="clean", votes=0, columns=columns), deterministic=True
    )
    finding = found(evidence, "labels-in-order")
    assert finding.status == status and ("in the order of the network's outputs" in finding.note) == (status == "flag")


@pytest.mark.parametrize(("copies", "status"), [(None, "pass"), (1, "pass"), (2, "flag"), (99, "flag")])
def test_images_that_are_there_several_times_are_no_sample(made_by_hand, copies, status) -> None:
    evidence = made_by_hand.evidence(made_by_hand.entry("T10", "0", np.ones(100, int), attack="clean", votes=0))
    evidence.labels.update(n=100, **({} if copies is None else {"copies": copies}))
    assert found(evidence, "images-distinct").status == status


def test_records_that_do_not_say_what_was_predicted_are_not_judged_by_it(made_by_hand) -> None:
    evidence = made_by_hand.evidence(made_by_hand.entry("T10", "0", np.zeros(100, int), attack="clean", votes=0))
    assert found(evidence, "labels-in-order").status == "not run"


def test_renaming_what_is_printed_changes_no_check(table, made_by_hand) -> None:
    """Trials are known by what they did: under any other words each check says the same."""
    for good_and_bad in table.values():
        for rows in good_and_bad:
            made = [made_by_hand.entry(e, t, made_by_hand.share(q), **how) for e, t, q, how in rows]
            renamed = [replace(entry, trial=f"number {k}") for k, entry in enumerate(made)]
            one, two = (made_by_hand.evidence(*entries) for entries in (made, renamed))
            assert [(f.status, f.figure) for f in checks(one)] == [(f.status, f.figure) for f in checks(two)]
            assert [e and e.result for e in (one.worst, one.replay, one.clean)] == [
                e and e.result for e in (two.worst, two.replay, two.clean)
            ]


@pytest.mark.parametrize("draws", [0, 1, 16])
@pytest.mark.parametrize("chain", [False, True])
def test_every_role_is_played_once_in_the_plan_or_is_not_for_this_defence(draws, chain) -> None:
    """The plan's own trials, by the settings that their records will have."""
    peers = (("other", "pgd_at", 0),)
    subject = Subject(draws, 10, "linf", 8 / 255, has_chain=chain, has_torchattacks=bool(draws), peers=peers)
    played = Counter()
    for trial in plan(subject, BUDGETS["full"], [name for name in EXPERIMENTS if name != "T8"]):  # which needs a store
        if trial.attack == WORST:
            settings = {"name": WORST}
        else:
            made = override(attacks.load(trial.attack)(), trial.settings)
            settings = {"name": trial.attack, **made.settings()}
        played[role_of(trial.experiment, settings, trial.on)] += 1
    del played[None]
    several = {Role.LENGTH: 4, Role.WORST: 2, Role.PUBLISHED_GRADIENT: 3}
    smoothed = {Role.PUBLISHED_PGD, Role.PUBLISHED_AA, Role.CORRECTED_PGD}
    theirs = {Role.THEIR_PGD, Role.THEIR_AA, Role.EMULATED_AA}
    expected = {Role.ONE_STEP, Role.LENGTH, Role.RESTARTED, Role.MINIMUM, Role.WORST, Role.REFERENCE, Role.OUR_PATH}
    if draws:
        expected |= {Role.ONE_DRAW} | theirs | ({Role.PUBLISHED_GRADIENT} if chain else smoothed)
    else:
        expected |= {Role.USUAL_PGD}
    assert played == {role: several.get(role, 1) for role in expected}


def test_an_unfinished_trial_is_not_there(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    short = entry("T10", "4 eps", share(0.9), scale=4.0)
    evidence = made_by_hand.evidence(short, entry("T10", "8 eps", share(0.9), complete=False, scale=8.0, eps=0.8))
    finding = found(evidence, "reaches-chance")
    assert finding.status == "not run" and "ends before 0.8" in finding.note and not evidence.complete


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("square-beats-white-box", {"queries": 999}),
        ("random-noise", {"points": 9}),
        ("more-draws", {"draws": 15}),
        ("reaches-chance", {}),
        ("white-box-beats-transfer", {}),
    ],
)
def test_a_check_without_the_budget_to_fail_has_not_passed(table, made_by_hand, name, settings) -> None:
    def of(rows, n, settings):
        made = [made_by_hand.entry(e, t, made_by_hand.share(q, n), settings=settings, **how) for e, t, q, how in rows]
        return found(made_by_hand.evidence(*made), name)

    good, bad = table[name]
    assert of(good, 50, {}).status == "pass"
    for n, lacking in ((49, {}), (50, settings)):
        if n == 49 or settings:
            weak = of(good, n, lacking)
            assert weak.status == "not run" and weak.figure is not None and "too little to have failed" in weak.note
            assert of(bad, n, lacking).status == "flag"  # what fails, fails at any budget


@pytest.mark.parametrize("name", ["more-draws", "more-steps", "rand-finds-no-more", "white-box-beats-transfer", "random-noise"])
def test_a_loss_within_chance_is_none(made_by_hand, name) -> None:
    """Fifty images, of which two more are lost: 4 points, and no reason to doubt anything."""
    entry, few = made_by_hand.entry, lambda right: made_by_hand.share(right / 50, 50)
    before, after = few(30), few(28)
    rows = [("T1", "m=16", before), ("T1", "m=64", after), ("T0", "random", after)]
    rows += [("T3", "T=5", before), ("T3", "T=10", after), ("T5", "eot_iter=1", after), ("T8", "from x", after)]
    least = entry("T4", "per-image minimum", before, attack="worst")
    finding = found(made_by_hand.evidence(least, *(entry(e, t, right) for e, t, right in rows)), name)
    assert finding.status == "pass" and finding.figure == pytest.approx(0.04) and "chance" in finding.note
    assert finding.low is not None and finding.low <= finding.threshold < finding.figure


def test_chance_in_draws_is_allowed_for_too(made_by_hand) -> None:
    """The same q of 1/2 for all images, by 4 predictions each: a gap that draws explain is none, the same of 400 is."""
    rng = np.random.default_rng(0)
    for repeats, status in ((4, "pass"), (400, "flag")):
        one, two = rng.binomial(repeats, 0.54, 50), rng.binomial(repeats, 0.50, 50)
        evidence = made_by_hand.evidence(
            made_by_hand.entry("T4", "per-image minimum", one, repeats, attack="worst"),
            made_by_hand.entry("T8", "from x", two, repeats),
        )
        assert found(evidence, "white-box-beats-transfer").status == status


def test_square_counts_what_other_images_survive(made_by_hand) -> None:
    """Equal accuracies, on other images: Square takes half of what the white box left."""
    entry, share = made_by_hand.entry, made_by_hand.share
    evidence = made_by_hand.evidence(
        entry("T4", "CE", share(0.5), votes=0),
        entry("T7", "10 queries", 1 - share(0.5), attack="square", votes=0),
        deterministic=True,
    )
    assert found(evidence, "square-beats-white-box").figure == pytest.approx(0.5)


def test_square_on_a_bank_is_not_square_on_the_defence(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    bank = entry("T7", "10 queries, bank of 16", share(0.0), attack="square", on="bank=16")
    assert found(made_by_hand.evidence(entry("T4", "CE", share(0.5)), bank), "square-beats-white-box").status == "not run"


def test_a_rise_with_eps_is_a_flag_before_it_is_a_bug(made_by_hand) -> None:
    entry, n = made_by_hand.entry, 10_000
    for rise, status in ((0.015, "pass"), (0.04, "flag"), (0.08, "bug")):
        accuracies = {"0": 0.9, "0.5 eps": 0.3, "1 eps": 0.3 + rise}
        curve = [entry("T10", trial, made_by_hand.share(q, n)) for trial, q in accuracies.items()]
        assert found(made_by_hand.evidence(*curve), "larger-eps-never-helps").status == status


@pytest.mark.parametrize(("attacked", "status"), [(0.99, "pass"), (0.5, "bug")])
def test_certificate_above_attack_is_a_bug_and_then_nothing_can_be_said(made_by_hand, attacked, status) -> None:
    """Every image keeps at least a share of 0.999 within l2 0.5 by its certificate; half of them fall to an attack at 0.4."""
    own = made_by_hand.certificate(np.full(200, 0.9999), np.full(200, 1.86), 200)
    rows = made_by_hand.share(attacked, 200)
    attack = made_by_hand.entry("T12", "l2 0.4", rows, norm="l2", eps=0.4, other_threat=True)
    worst = made_by_hand.entry("T11", "worst case over all", rows, attack="worst")
    evidence = made_by_hand.evidence(attack, worst, certificates=[own])
    finding = found(evidence, "certificate-above-attack")
    assert finding.status == status
    said = judge(evidence, (), Claim(0.6, "test")).verdict
    if status == "bug":
        assert (said.word, said.rule, said.decided_by) == ("cannot say", 1, ("certificate-above-attack",))
        assert "2 comparisons" in finding.note and "0.4" in finding.note
    else:
        assert said.rule != 1


def test_a_certificate_of_other_noise_says_nothing(made_by_hand) -> None:
    other = made_by_hand.certificate(np.full(50, 0.9999), np.full(50, 3.0), 50, votes_noise=0.25)
    attack = made_by_hand.entry("T12", "l2 0.4", np.zeros(50, int), norm="l2", eps=0.4)
    assert found(made_by_hand.evidence(attack, certificates=[other]), "certificate-above-attack").status == "not run"


def test_bank_and_fresh(made_by_hand) -> None:
    for fresh, status in ((0.52, "pass"), (0.7, "flag")):
        counts = {"bank_correct": made_by_hand.share(0.5), "bank_repeats": 1}
        entry = made_by_hand.entry("T6", "AA, bank of 64", made_by_hand.share(fresh), attack="aa", columns=counts)
        assert found(made_by_hand.evidence(entry), "bank-and-fresh").status == status


def test_repeated_queries(made_by_hand) -> None:
    for right, status in ((20, "pass"), (18, "flag")):
        worst = made_by_hand.entry("T11", "worst case over all", np.full(50, right), 20, attack="worst")
        finding = found(made_by_hand.evidence(worst), "repeated-queries")
        assert finding.status == status
        # of 20 predictions 18 are right: ten of them are all right in C(18, 10) / C(20, 10) choices
        expected = 0.0 if right == 20 else 0.9 - (10 * 9) / (20 * 19)
        assert finding.figure == pytest.approx(expected)
    short = made_by_hand.entry("T11", "worst case over all", np.full(50, 4), 4, attack="worst")
    assert found(made_by_hand.evidence(short), "repeated-queries").status == "not run"


def test_white_box_is_the_minimum_of_t4_else_the_strongest(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    weak, strong = entry("T1", "m=1", share(0.8), attack="eot"), entry("T3", "T=5", share(0.4))
    other = entry("T10", "4 eps", share(0.1), scale=4.0)
    assert room.white_box_minimum(made_by_hand.evidence(weak, strong, other)) == strong
    least = entry("T4", "per-image minimum", share(0.5), attack="worst")
    assert room.white_box_minimum(made_by_hand.evidence(weak, strong, least)) == least
