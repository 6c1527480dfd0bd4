"""Checks on the records of `settle`: the monotonicities that hold for any working attack, signs of masking, and bugs.

Pure functions of `Evidence`. What is compared is paired by image; "by more than chance" means that the paired 95 % interval
leaves the threshold out. The thresholds and their sources are those of docs/verdict.md.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from rush_bench.audits.evidence import Entry, Evidence
from rush_bench.audits.experiments import without_noise
from rush_bench.audits.finding import Finding, judged, not_run, noted, within_chance
from rush_bench.audits.flags import square_beats_white_box
from rush_bench.audits.roles import Role
from rush_bench.certificates.check import comparisons
from rush_bench.records.statistics import UNLIKELY, Estimate, below_chance
from rush_bench.threats import Threat

POINT = 0.01
# What a required check needs to have been able to fail: images, queries of Square, random points, draws of the last gradient.
IMAGES, QUERIES, POINTS, DRAWS = 50, 1_000, 10, 16
COPIES = 0.01  # of the images; an interval is half a percent too narrow then
CARLINI = "Carlini et al. 2019, section 3"


def checks(evidence: Evidence) -> list[Finding]:
    """Every check that records can answer; those whose experiments are missing are `not run`."""
    return [
        labels_in_order(evidence),
        images_distinct(evidence),
        iterative_beats_single_step(evidence),
        reaches_chance(evidence),
        larger_eps_never_helps(evidence),
        white_box_beats_black_box(evidence),
        white_box_beats_transfer(evidence),
        random_noise_is_harmless(evidence),
        more_draws_change_nothing(evidence),
        more_steps_change_nothing(evidence),
        rand_finds_no_more(evidence),
        certificate_below_attack(evidence),
        steep_m_curve(evidence),
        aa_above_pgd(evidence),
        replay_above_worst(evidence),
        bank_and_fresh_agree(evidence),
        repeated_queries(evidence),
        same_through_both_doors(evidence),
        emulation_agrees(evidence),
    ]


def strongest(entries: Iterable[Entry]) -> Entry | None:
    """The entry with the lowest accuracy."""
    return min(entries, key=lambda entry: entry.estimate.value, default=None)


def white_box(evidence: Evidence) -> list[Entry]:
    """Finished attacks with gradients of the defence itself, in several steps."""
    gradient = ("pgd", "eot", "apgd", "eot-apgd", "eot-apgd-t", "aa", "aa-rand")
    return [entry for entry in evidence.own() if entry.attack["name"] in gradient]


def white_box_minimum(evidence: Evidence) -> Entry | None:
    """T4's per-image minimum where it is there, else the strongest white-box attack."""
    return evidence.get(Role.MINIMUM) or strongest(white_box(evidence))


def _loss(check: str, what: str, loss: Estimate, threshold: float, source: str, note: str = "") -> Finding:
    """Passes where the loss is at most the threshold, or not above it beyond chance."""
    return within_chance(judged(check, what, loss.value, "<=", threshold, source, note=note, low=loss.low, high=loss.high))


def _not_run_if_too_weak(finding: Finding, lacks: str) -> Finding:
    """A pass that had too little budget to be anything else is a check not run; `lacks` says of what, if any."""
    if not lacks or finding.status != "pass":
        return finding
    return noted(replace(finding, status="not run"), f"too little to have failed: {lacks}")


def _too_few(entry: Entry, what: str = "", got: int = IMAGES, needed: int = 0) -> str:
    """What an entry lacks, in words: images, or `what` of which it has `got` and `needed` are."""
    lacks = [f"{len(entry.correct)} images, {IMAGES} are needed"] if len(entry.correct) < IMAGES else []
    lacks += [f"{got} {what}, {needed} are needed"] if got < needed else []
    return ", ".join(lacks)


def labels_in_order(evidence: Evidence) -> Finding:
    """Clean accuracy below chance is no property of a defence: labels and outputs are not in the same order."""
    what = "chance of so low a clean accuracy, had labels nothing to do with predictions"
    source = "ours: far below chance is as hard as far above it; an accuracy under attack may be, and is not looked at"
    clean = evidence.clean
    if clean is None:
        return not_run("labels-in-order", what, source, "needs T10, which begins with the clean images")
    frame = clean.result.frame
    counts = frame.filter(regex="^count_").to_numpy()
    if not counts.size:
        return not_run("labels-in-order", what, source, "its record does not say which classes were predicted")
    figure = below_chance(frame["label"].to_numpy(), counts)
    note = f"clean accuracy {clean.estimate.value:.1%}"
    if figure < UNLIKELY:
        note += ": are the labels in the order of the network's outputs?"
    return judged("labels-in-order", what, figure, ">=", UNLIKELY, source, note=note)


def images_distinct(evidence: Evidence) -> Finding:
    """Copies of an image are one image, however often they are counted: the intervals of the audit would be too narrow."""
    what = "share of the images whose pixels are those of another one"
    source = "ours: intervals are over images that were drawn independently"
    if not evidence.entries:
        return not_run("images-distinct", what, source, "needs any experiment")
    copies, n = evidence.labels.get("copies", 0), evidence.labels["n"]
    return judged("images-distinct", what, copies / n, "<=", COPIES, source, note=f"{copies} of {n}")


def iterative_beats_single_step(evidence: Evidence) -> Finding:
    """One step of eps must leave at least as much as the best iterative attack."""
    what = "accuracy under the best iterative attack less that under one step of eps"
    single_step, best = evidence.get(Role.ONE_STEP), white_box_minimum(evidence)
    if single_step is None or best is None:
        return not_run("iterative-beats-single-step", what, CARLINI, "needs T3 and T4")
    return _loss("iterative-beats-single-step", what, best.minus(single_step), 0.0, CARLINI)


def reaches_chance(evidence: Evidence) -> Finding:
    """Accuracy must fall to 5 % at a large radius, at the latest where chance is certain; attacks get below that."""
    what = "least accuracy at 4 eps or a larger radius, lower end of its interval"
    source = "protocol T10; Carlini et al. 2019, section 3 (unbounded attacks reach 100 %)"
    # the other trials of the curve are at fractions and small multiples of eps
    far = [entry for entry in evidence.of("T10") if entry.result.labels["scale"] >= 4]
    if not far:
        return not_run("reaches-chance", what, source, "needs T10")
    note = ", ".join(f"{entry.estimate.value:.1%} at {entry.eps:.3g}" for entry in far)
    least = min(entry.estimate.low for entry in far)
    finding = judged("reaches-chance", what, least, "<=", 0.05, source, note=note)
    if finding.status == "flag" and max(entry.eps for entry in far) < evidence.labels["diameter"]:
        why = f"the curve ends before {evidence.labels['diameter']:.3g}, where chance is certain"
        return noted(replace(finding, status="not run"), why)
    return _not_run_if_too_weak(finding, _too_few(far[0]))


def larger_eps_never_helps(evidence: Evidence) -> Finding:
    """Under one attack, accuracy cannot rise with eps: the smaller ball lies in the larger. A rise is a bug in the attack."""
    what = "largest rise of accuracy from one eps to a larger one, same attack"
    curve = evidence.of("T10")
    if len(curve) < 3:
        return not_run("larger-eps-never-helps", what, CARLINI, "needs T10")
    rises = [(later.minus(earlier), earlier, later) for earlier, later in itertools.pairwise(curve)]
    rise, earlier, later = max(rises, key=lambda found: found[0].low)
    note = f"from {earlier.trial} to {later.trial}"
    # a search is not exhaustive: what a wider ball may lose by a worse search is not yet a bug
    beyond = rise.low > 0.05
    finding = _loss("larger-eps-never-helps", what, rise, 2 * POINT, CARLINI, note)
    return replace(finding, status="bug") if beyond else finding


def white_box_beats_black_box(evidence: Evidence) -> Finding:
    """Square may take next to nothing from the per-image worst case of the white-box attacks."""
    square = [entry for entry in evidence.of("T7") if entry.result.labels["on"] == ""]
    best = white_box(evidence)
    threat = Threat(evidence.labels["norm"], evidence.labels["eps"])
    if not square or not best:
        return square_beats_white_box(threat, None if not best else best[0].rates, None)
    rates = np.min([entry.rates for entry in best], axis=0)
    repeats = None if evidence.labels["deterministic"] else int(min(entry.repeats.min() for entry in [*best, *square]))
    finding = square_beats_white_box(threat, rates, square[-1].rates, repeats)
    queries = int(square[-1].attack["queries"])
    return _not_run_if_too_weak(finding, _too_few(square[-1], "queries", queries, QUERIES))


def white_box_beats_transfer(evidence: Evidence) -> Finding:
    """x' of another network may not be stronger than the white-box attack by more than a point beyond chance."""
    what = "accuracy under the white box less that under the strongest transfer"
    source = "Carlini et al. 2019, section 3; protocol T8"
    transfer, best = strongest(evidence.of("T8")), white_box_minimum(evidence)
    if transfer is None or best is None:
        return not_run("white-box-beats-transfer", what, source, "needs T8 and T4, and another model or a base")
    drop = best.rates - transfer.rates
    beyond = 2.58 * np.sqrt(
        best.rates * (1 - best.rates) / best.repeats + transfer.rates * (1 - transfer.rates) / transfer.repeats
    )
    alone = int((drop > (0.0 if evidence.labels["deterministic"] else beyond)).sum())
    note = f"{transfer.trial}; {alone} of {len(drop)} images survive the white box and not the transfer, beyond chance"
    return _not_run_if_too_weak(
        _loss("white-box-beats-transfer", what, best.minus(transfer), POINT, source, note), _too_few(transfer)
    )


def random_noise_is_harmless(evidence: Evidence) -> Finding:
    """Random points of the ball must be far weaker than the attack, where the attack takes anything at all."""
    what = "accuracy under the attack less that under random points"
    source = "protocol 5, T0"
    random, best = next(iter(evidence.of("T0")), None), white_box_minimum(evidence)
    if random is None or best is None:
        return not_run("random-noise", what, source, "needs T0 and T4")
    points = int(random.attack["points"])
    return _not_run_if_too_weak(
        _loss("random-noise", what, best.minus(random), 0.0, source), _too_few(random, "points", points, POINTS)
    )


def more_draws_change_nothing(evidence: Evidence) -> Finding:
    """From the second largest number of draws to the largest, at most 3 points may be lost."""
    what, source = "accuracy lost from the second largest number of draws to the largest", "protocol T1"
    curve = evidence.of("T1")
    if len(curve) < 2:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T1"
        return not_run("more-draws", what, source, why)
    before, last = curve[-2:]
    finding = _loss("more-draws", what, before.minus(last), 3 * POINT, source, f"{before.trial} to {last.trial}")
    return _not_run_if_too_weak(finding, _too_few(last, "draws", int(last.attack["draws"]), DRAWS))


def more_steps_change_nothing(evidence: Evidence) -> Finding:
    """From the second longest run to the longest, or to restarts, at most 3 points may be lost."""
    what = "accuracy lost from the second longest run to the longest, or with restarts"
    source = "protocol T3; Carlini et al. 2019, section 3"
    lengths = evidence.of_roles(Role.LENGTH)
    if len(lengths) < 2:
        return not_run("more-steps", what, source, "needs T3")
    losses = [(lengths[-2].minus(lengths[-1]), f"{lengths[-2].trial} to {lengths[-1].trial}")]
    for entry in evidence.of_roles(Role.RESTARTED):
        single = next((run for run in lengths if run.attack["steps"] == entry.attack["steps"]), None)
        if single is not None:
            losses.append((single.minus(entry), f"{single.trial} to {entry.trial}"))
    loss, note = max(losses, key=lambda found: found[0].low)
    return _loss("more-steps", what, loss, 3 * POINT, source, note)


def rand_finds_no_more(evidence: Evidence) -> Finding:
    """AutoAttack `rand` may not be stronger than T4's minimum by more than a point."""
    what, source = "accuracy under T4's minimum less that under AutoAttack rand", "protocol T5"
    rand, best = strongest(evidence.of("T5")), white_box_minimum(evidence)
    if rand is None or best is None:
        return not_run("rand-finds-no-more", what, source, "needs T5 and T4, and a randomised defence")
    return _loss("rand-finds-no-more", what, best.minus(rand), POINT, source)


def certificate_below_attack(evidence: Evidence) -> Finding:
    """A certificate above an attack is a bug in one of the two, always."""
    what, source = "largest excess of what certificates leave over what was attacked, beyond chance", "protocol 7, T12"
    attacked = [entry.result for entry in evidence.entries]
    found = [comparison for comparison in comparisons(evidence.certificates, attacked) if comparison.same_images]
    if not found:
        return not_run("certificate-above-attack", what, source, "no certificate of these weights, noise and images")
    excess = [(comparison.floor - comparison.allowed - comparison.attacked, str(comparison)) for comparison in found]
    worst, note = max(excess)
    note = f"{len(found)} comparisons" + (f"; {note}" if worst > 0 else "")
    return judged("certificate-above-attack", what, worst, "<=", 0.0, source, note=note, otherwise="bug")


def steep_m_curve(evidence: Evidence) -> Finding:
    """A curve that falls steeply with the draws of a gradient is a sign of noise in gradients, not of robustness."""
    what, source = "accuracy with one draw per gradient less that with the most draws", "sources S6.3"
    one_draw, curve = evidence.get(Role.ONE_DRAW), evidence.of("T1")
    if one_draw is None or len(curve) < 2:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T1"
        return not_run("steep-m-curve", what, source, why)
    return _loss("steep-m-curve", what, one_draw.minus(curve[-1]), 5 * POINT, source)


def aa_above_pgd(evidence: Evidence) -> Finding:
    """As published, an ensemble of attacks cannot leave more than one of its kind, but by its bookkeeping."""
    what, source = "accuracy under AA as published less that under PGD as published", "sources S6.1, S6.2"
    aa, pgd = evidence.get(Role.PUBLISHED_AA), evidence.get(Role.PUBLISHED_PGD)
    if aa is None or pgd is None:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T15"
        return not_run("aa-above-pgd", what, source, why)
    return _loss("aa-above-pgd", what, aa.minus(pgd), POINT, source)


def replay_above_worst(evidence: Evidence) -> Finding:
    """What the published evaluation overstates on these weights."""
    what, source = "accuracy by the published evaluation less the worst case", "protocol 5, T15"
    top = evidence.replay
    if top is None or evidence.worst is None:
        return not_run("replay-above-worst", what, source, "needs T15 and T11")
    return _loss("replay-above-worst", what, top.minus(evidence.worst), 3 * POINT, source, top.trial)


def bank_and_fresh_agree(evidence: Evidence) -> Finding:
    """What was found on a bank must hold on fresh draws, or else the attack is fitted to the bank."""
    what, source = "accuracy on fresh draws less that on the bank that was attacked, largest bank", "protocol T6"
    banks = [(entry, entry.other("bank")) for entry in evidence.of("T6")]
    found = [(entry, bank) for entry, bank in banks if bank is not None]
    if not found:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T6"
        return not_run("bank-and-fresh", what, source, why)
    entry, bank = found[-1]
    assert bank is not None
    gap = entry.estimate.value - bank.value
    return judged("bank-and-fresh", what, gap, "<=", 5 * POINT, source, note=entry.trial)


def emulation_agrees(evidence: Evidence) -> Finding:
    """Our replay of the published evaluation must be that of the package it was made with, where that is installed."""
    what = "largest difference between torchattacks' own attacks and our emulation, ends of the paired intervals nearest 0"
    source = "protocol 5, T15"
    found = []
    for theirs, ours in ((Role.THEIR_AA, Role.EMULATED_AA), (Role.THEIR_PGD, Role.CORRECTED_PGD)):
        a, b = evidence.get(theirs), evidence.get(ours)
        if a is not None and b is not None:
            gap = b.minus(a)
            words = f"{b.trial}: {100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
            found.append((max(gap.low, -gap.high, 0.0), words))
    if not found:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T15 and the extra torchattacks"
        return not_run("emulation-agrees", what, source, why)
    return judged("emulation-agrees", what, max(found)[0], "<=", POINT, source, note="; ".join(text for _, text in found))


def repeated_queries(evidence: Evidence) -> Finding:
    """An attacker who may ask ten times needs one wrong prediction."""
    what, source = "accuracy in one prediction less that in any of ten", "protocol T11"
    any_ten = None if evidence.worst is None else evidence.worst.any_of(10)
    if evidence.worst is None or any_ten is None:
        why = "the defence is deterministic" if evidence.labels.get("deterministic") else "needs T11 with K >= 10"
        return not_run("repeated-queries", what, source, why)
    return judged("repeated-queries", what, evidence.worst.estimate.value - any_ten.value, "<=", 10 * POINT, source)


def same_through_both_doors(evidence: Evidence) -> Finding:
    """The randomised code path without noise must give AutoAttack's numbers on a deterministic network."""
    what, source = "largest difference between AutoAttack and our randomised code path without noise", "protocol T16"
    pairs = []
    ours = {entry.result.labels["on"]: entry for entry in evidence.of_roles(Role.OUR_PATH)}
    for entry in evidence.of_roles(Role.REFERENCE):
        other = ours.get(without_noise(entry.result.labels["on"]))
        if other is not None:
            n = len(entry.correct)
            # one image of n is the least difference there is
            allowed, gap = max(0.003, 1.001 / n), entry.minus(other)
            beyond = max(gap.low, -gap.high) - allowed
            pairs.append((beyond, allowed, gap, f"{entry.trial} less ours, n={n}"))
    if not pairs:
        return not_run("same-through-both-doors", what, source, "needs T16 and a deterministic model in the store")
    beyond, allowed, gap, note = max(pairs, key=lambda pair: pair[0])
    low, high = (0.0 if gap.low <= 0 <= gap.high else min(abs(gap.low), abs(gap.high))), max(abs(gap.low), abs(gap.high))
    return _loss("same-through-both-doors", what, Estimate(abs(gap.value), low, high), allowed, source, note)
