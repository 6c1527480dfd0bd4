"""The verdict on a claim, by the rules of docs/verdict.md, which were written before any result. Nothing else applies them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rush_bench.audits.finding import Finding
from rush_bench.records.statistics import ROUNDING, Estimate

Word = Literal["stands", "weakened", "refuted", "cannot say"]
REFUTED, WEAKENED, ABOVE_CHANCE = 0.20, 0.03, 0.03

# Flags about what is predicted, not about its gradients.
OUTPUTS = (
    "probabilities-for-logits",
    "loss-of-the-prediction",
    "batch-dependence",
    "randomised-output",
    "optimises-at-inference",
    "same-under-gradients",
    "same-in-later-calls",
)
# A flag of one of these keeps a claim from standing. The rest are signs that explain, or the reverse of the coin.
STRENGTH = (
    "zero-gradients",
    "true-gradient",
    "unavailable-gradients",
    "unstable-predictions",
    "silent-success",
    "incomplete-optimisation",
    "transfer-failure",
    "unconstrained-attack-failure",
    "binarization",
    "reaches-chance",
    "larger-eps-never-helps",
    "square-beats-white-box",
    "white-box-beats-transfer",
    "iterative-beats-single-step",
    "random-noise",
    "more-draws",
    "more-steps",
    "rand-finds-no-more",
    "other-pixel-range",
    "same-through-both-doors",
    *OUTPUTS,
)
PREMISES = ("labels-in-order", "images-distinct")  # without these no accuracy says anything of the defence
BUGS = ("certificate-above-attack",)  # a failure of these is a bug, and may be the attack's
REQUIRED = (
    "zero-gradients",
    "true-gradient",
    "unconstrained-attack-failure",
    "reaches-chance",
    "square-beats-white-box",
    "random-noise",
)
REQUIRED_RANDOMISED = (*REQUIRED, "white-box-beats-transfer", "more-draws")


@dataclass(frozen=True)
class Claim:
    """An accuracy under attack, as a fraction, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Verdict:
    """The word, the numbers it follows from, the rule of docs/verdict.md and the checks that decided."""

    word: Word
    claim: Claim
    worst: Estimate
    rule: int
    reason: str
    decided_by: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, JSON-able."""
        return {**asdict(self), "worst": self.worst._asdict()}


def images_needed(worst: Estimate, images: int) -> int:
    """At how many images the interval of `worst`, measured on `images`, would reach only 3 points to either side."""
    return math.ceil(images * ((worst.high - worst.low) / 2 / WEAKENED) ** 2)


def verdict(
    claim: Claim,
    worst: Estimate,
    findings: Sequence[Finding],
    *,
    classes: int,
    deterministic: bool,
    images: int,
    largest_class: float,
) -> Verdict:
    """Apply the rules in order. `worst` is the worst case with its interval.

    It was measured on `images` images, of which the most frequent class is a share of `largest_class`.
    """

    def by_rule(word: Word, rule: int, reason: str, by: Sequence[str] = ()) -> Verdict:
        return Verdict(word, claim, worst, rule, reason, tuple(by))

    by_name = {finding.check: finding for finding in findings}
    bugs = [finding.check for finding in findings if finding.status == "bug"]
    cannot_be = "a check found what cannot be: one of our own programs is wrong"
    if set(bugs) & set(BUGS):
        return by_rule("cannot say", 1, cannot_be, bugs)
    wrong = [name for name in PREMISES if name in by_name and by_name[name].status == "flag"]
    if wrong:
        reason = (
            "clean accuracy is below chance: the labels are not in the order of the network's outputs, so nothing was measured"
        )
        return by_rule("cannot say", 0, reason, wrong)
    if claim.value <= 1 / classes + ABOVE_CHANCE + ROUNDING:
        return by_rule("cannot say", 0, f"the claim is no more than chance ({1 / classes:.1%}): there is nothing to settle")
    gap = claim.value - worst.high - ROUNDING
    text = f"the worst case is at most {worst.high:.1%} (95 %), the claim {claim.value:.1%}"
    flags = [name for name in STRENGTH if name in by_name and by_name[name].status == "flag"]
    if gap > REFUTED or worst.high < claim.value / 2 - ROUNDING:
        lost = "more than 20 points are gone" if gap > REFUTED else "more than half of it is gone"
        also = f"; a better attack might take even more ({', '.join(flags)})" if flags else ""
        return by_rule("refuted", 2, f"{text}: {lost}{also}", ["worst case"])
    if gap > WEAKENED:
        also = f"; the attack may still be too weak ({', '.join(flags)})" if flags else ""
        return by_rule("weakened", 3, f"{text}: more than 3 points are gone{also}", ["worst case", *flags])
    if bugs:  # of a search; what another search found is a proof all the same
        return by_rule("cannot say", 1, cannot_be, bugs)
    depends = by_name.get("depends-on-image")
    blind = depends is not None and depends.status == "flag" and worst.low <= largest_class
    if blind and not set(flags) & set(OUTPUTS):
        reason = "it stands as what it is: its predictions do not depend on the image, so no attack has an effect on them"
        return by_rule("stands", 4, reason, ["depends-on-image"])
    if flags:
        return by_rule("cannot say", 4, f"{text}, but the attack is not known to work", flags)
    required = REQUIRED if deterministic else REQUIRED_RANDOMISED
    missing = [name for name in required if name not in by_name or by_name[name].status == "not run"]
    if missing:
        lacks = dict.fromkeys(by_name[name].note.rpartition("; ")[2] for name in missing if name in by_name)
        why = "; ".join(filter(None, lacks))
        return by_rule("cannot say", 4, f"{text}, but required checks were not run{f' ({why})' if why else ''}", missing)
    needed = images_needed(worst, images)
    enough = f"about {needed} would tell 3 points" if needed > images else f"{needed} would do"
    few = f"{images} images leave it between {worst.low:.1%} and {worst.high:.1%}, {enough}"
    if claim.value - worst.value > WEAKENED + ROUNDING:
        return by_rule("cannot say", 4, f"the worst case is {worst.value:.1%}, which may be chance: {few}", ["worst case"])
    if claim.value - worst.low > REFUTED + ROUNDING:
        return by_rule("cannot say", 4, f"{text}, but a loss of more than 20 points would look the same: {few}", ["worst case"])
    margin = f"to within {100 * (worst.value - worst.low):.1f} points ({few})"
    reason = f"the worst case is {worst.value:.1%}, the claim {claim.value:.1%}: under attacks that are known to work, {margin}"
    return by_rule("stands", 5, reason, ["worst case", *required])
