"""The rules of docs/verdict.md, one by one, and that its names are names of checks."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from rush_bench.audits.finding import Finding, judged, not_run
from rush_bench.audits.verdict import BUGS, PREMISES, REQUIRED, REQUIRED_RANDOMISED, STRENGTH, Claim, images_needed, verdict
from rush_bench.records.statistics import Estimate, interval

ROOT = Path(__file__).parents[2]


def finding(check: str, status: str = "pass") -> Finding:
    return Finding(check, "what", 0.0, 0.0, "<=", "source", status)  # type: ignore[arg-type]


def passing(**other: str) -> list[Finding]:
    """All checks that can decide pass, but for those given: `reaches_chance="flag"`; `none` leaves one out."""
    names = dict.fromkeys([*STRENGTH, *BUGS, "depends-on-image", "steep-m-curve"], "pass")
    names |= {name.replace("_", "-"): status for name, status in other.items()}
    return [finding(name, status) for name, status in names.items() if status != "none"]


OTHERS = {"images": 1_000, "largest_class": 0.9}


def said(claim: float, high: float, findings: list[Finding], classes: int = 10, deterministic: bool = False):
    worst = Estimate(high - 0.02, high - 0.04, high)
    return verdict(Claim(claim, "test"), worst, findings, classes=classes, deterministic=deterministic, **OTHERS)


@pytest.mark.parametrize(
    ("claim", "high", "others", "word", "rule", "by"),
    [
        # 5: everything passes and the worst case, 2 points below high, is within 3 points, or above
        (0.80, 0.80, {}, "stands", 5, "worst case"),
        (0.80, 0.95, {}, "stands", 5, "worst case"),
        (0.80, 0.79, {}, "stands", 5, "worst case"),  # exactly 3 points are not more than 3
        # 4: it is not, though high is
        (0.80, 0.789, {}, "cannot say", 4, "worst case"),
        (0.80, 0.77, {}, "cannot say", 4, "worst case"),
        # 3: more than 3 points, up to 20
        (0.80, 0.769, {}, "weakened", 3, "worst case"),
        (0.80, 0.60, {}, "weakened", 3, "worst case"),  # exactly 20 points, floats notwithstanding
        (0.24, 0.12, {}, "weakened", 3, "worst case"),  # exactly half
        # 2: more than 20 points or below half
        (0.80, 0.599, {}, "refuted", 2, "worst case"),
        (0.24, 0.119, {}, "refuted", 2, "worst case"),
        # 1: a bug comes before everything
        (0.80, 0.10, {"certificate_above_attack": "bug"}, "cannot say", 1, "certificate-above-attack"),
        (0.80, 0.80, {"larger_eps_never_helps": "bug"}, "cannot say", 1, "larger-eps-never-helps"),
        # but for one that cannot be the attack's: a defence whose gradients vanish at a larger eps would undo what is proven
        (0.80, 0.10, {"larger_eps_never_helps": "bug"}, "refuted", 2, "worst case"),
        (0.80, 0.70, {"larger_eps_never_helps": "bug"}, "weakened", 3, "worst case"),
        # labels in another order: nothing was measured, though the attacks took all
        (0.80, 0.00, {"labels_in_order": "flag"}, "cannot say", 0, "labels-in-order"),
        (0.80, 0.80, {"images_distinct": "flag"}, "cannot say", 0, "images-distinct"),
        (0.80, 0.80, {"labels_in_order": "flag", "depends_on_image": "flag"}, "cannot say", 0, "labels-in-order"),
        (0.80, 0.10, {"labels_in_order": "not run"}, "refuted", 2, "worst case"),
        (
            0.80,
            0.10,
            {"labels_in_order": "flag", "certificate_above_attack": "bug"},
            "cannot say",
            1,
            "certificate-above-attack",
        ),
        (0.12, 0.12, {"certificate_above_attack": "bug"}, "cannot say", 1, "certificate-above-attack"),
        (
            0.80,
            0.80,
            {"certificate_above_attack": "bug", "depends_on_image": "flag"},
            "cannot say",
            1,
            "certificate-above-attack",
        ),
        # chance is no robustness, and a guess is not refuted
        (0.13, 0.01, {}, "cannot say", 0, None),
        (0.131, 0.13, {}, "stands", 5, "worst case"),
        # 4: flags of strength and missing required checks
        (0.80, 0.80, {"reaches_chance": "flag"}, "cannot say", 4, "reaches-chance"),
        (0.80, 0.80, {"binarization": "not run"}, "stands", 5, "worst case"),  # not a required one
        (0.80, 0.80, {"random_noise": "not run"}, "cannot say", 4, "random-noise"),
        (0.80, 0.80, {"random_noise": "none"}, "cannot say", 4, "random-noise"),
        # flags do not undo what is proven
        (0.80, 0.10, {"reaches_chance": "flag"}, "refuted", 2, "worst case"),
        (0.80, 0.70, {"reaches_chance": "flag"}, "weakened", 3, "reaches-chance"),
        # signs explain and do not decide
        (0.80, 0.80, {"steep_m_curve": "flag"}, "stands", 5, "worst case"),
        # the exception to 4, and to 4 alone
        (0.80, 0.80, {"depends_on_image": "flag", "reaches_chance": "flag"}, "stands", 4, "depends-on-image"),
        (0.80, 0.80, {"depends_on_image": "flag", "random_noise": "none"}, "stands", 4, "depends-on-image"),
        (0.80, 0.80, {"depends_on_image": "flag", "randomised_output": "flag"}, "cannot say", 4, "randomised-output"),
        (0.98, 0.98, {"depends_on_image": "flag", "reaches_chance": "flag"}, "cannot say", 4, "reaches-chance"),  # above 0.9
        (0.80, 0.70, {"depends_on_image": "flag"}, "weakened", 3, "worst case"),
        (0.80, 0.10, {"depends_on_image": "flag"}, "refuted", 2, "worst case"),
    ],
)
def test_the_rules(claim, high, others, word, rule, by) -> None:
    found = said(claim, high, passing(**others))
    assert (found.word, found.rule) == (word, rule), found
    assert (by in found.decided_by) if by else found.decided_by == ()


def test_every_flag_of_strength_keeps_a_claim_from_standing_and_every_required_check_is_missed() -> None:
    for name in STRENGTH:
        found = said(0.8, 0.8, passing(**{name: "flag"}))
        assert (found.word, found.decided_by) == ("cannot say", (name,))
    for name in REQUIRED_RANDOMISED:
        found = said(0.8, 0.8, passing(**{name: "not run"}))
        assert (found.word, found.decided_by) == ("cannot say", (name,))


def test_a_missing_check_says_what_it_lacks() -> None:
    lacks = "too little to have failed: 30 images, 50 are needed"
    findings = [
        dataclasses.replace(found, status="not run", note=f"85.0% at 0.4; {lacks}") if found.check.startswith("re") else found
        for found in passing()
    ]
    assert said(0.8, 0.8, findings).reason.endswith(f"but required checks were not run ({lacks})")


@pytest.mark.parametrize("name", ["more-draws", "white-box-beats-transfer"])
def test_what_is_asked_of_randomised_defences_alone(name) -> None:
    missing = passing(**{name: "not run"})
    assert said(0.8, 0.8, missing, deterministic=True).word == "stands"
    assert said(0.8, 0.8, missing, deterministic=False).decided_by == (name,)


def test_chance_hangs_on_the_number_of_classes() -> None:
    assert said(0.53, 0.5, passing(), classes=2).rule == 0
    assert said(0.53, 0.53, passing(), classes=3).word == "stands"


def test_the_reason_names_flags_beside_what_is_proven() -> None:
    for high, word in ((0.70, "weakened"), (0.10, "refuted")):
        found = said(0.80, high, passing(binarization="flag"))
        assert found.word == word and "binarization" in found.reason


def test_a_verdict_is_plain_values() -> None:
    plain = said(0.8, 0.8, passing()).to_dict()
    assert plain["word"] == "stands" and plain["worst"]["high"] == 0.8 and plain["claim"]["source"] == "test"


def produced() -> set[str]:
    """The names under which any check or probe makes a finding, from their sources: the first argument as it is written."""
    names: set[str] = set()
    for name in ("checks", "flags", "truth", "indicators", "binarization"):
        text = (ROOT / "rush_bench" / "audits" / f"{name}.py").read_text()
        names |= set(re.findall(r'(?:judged|not_run|_loss)\(\s*"([a-z-]+)"', text))
    return names


def test_names_that_decide_are_names_that_are_made() -> None:
    """A misspelt name in the tables of the verdict would never be flagged, or always be missing."""
    decide = {*STRENGTH, *BUGS, *PREMISES, *REQUIRED, *REQUIRED_RANDOMISED, "depends-on-image"}
    assert decide <= produced(), decide - produced()
    assert len(STRENGTH) == len(set(STRENGTH)) and set(REQUIRED_RANDOMISED) <= set(STRENGTH)


def test_the_document_has_every_check_and_no_other() -> None:
    text = (ROOT / "docs" / "verdict.md").read_text()
    checks = text[text.index("## Checks") :]
    strength, rest = checks[: checks.index("**Signs of masking**")], checks[checks.index("**Signs of masking**") :]
    signs, premises = rest[: rest.index("**Premise**")], rest[rest.index("**Premise**") :]
    parts = {"strength": strength, "signs": signs, "premises": premises}
    rows = {part: re.findall(r"^\| (`.*?) \|", text, re.M) for part, text in parts.items()}
    named = {part: set(re.findall(r"`([a-z-]+)`", " ".join(lines))) for part, lines in rows.items()}
    assert named["strength"] == {*STRENGTH, "binarization-random"}
    assert named["premises"] == set(PREMISES)
    assert named["strength"] | named["signs"] | set(BUGS) | set(PREMISES) == produced()
    required = text[text.index("Required for *stands*") : text.index("A required check that passes")]
    assert set(re.findall(r"`([a-z-]+)`", required)) == set(REQUIRED_RANDOMISED)


def test_findings_follow_from_their_figures() -> None:
    assert judged("a", "w", 0.1, "<=", 0.1, "s").status == "pass"
    assert judged("a", "w", 0.11, "<=", 0.1, "s").status == "flag"
    assert judged("a", "w", 0.09, ">=", 0.1, "s", otherwise="bug").status == "bug"
    assert not_run("a", "w", "s", "why").to_dict()["note"] == "why"


@pytest.mark.parametrize(("low", "word", "rule"), [(0.61, "stands", 5), (0.60, "stands", 5), (0.59, "cannot say", 4)])
def test_a_wide_interval_lets_nothing_stand(low, word, rule) -> None:
    """With so few images a refuted claim would look the same."""
    found = verdict(Claim(0.8, "test"), Estimate(0.78, low, 0.8), passing(), classes=10, deterministic=True, **OTHERS)
    assert (found.word, found.rule) == (word, rule)
    assert ("would look the same" in found.reason) == (word == "cannot say")


@pytest.mark.parametrize(("right", "images"), [(29, 100), (92, 100), (140, 200), (700, 1_000)])
def test_a_claim_near_the_measurement_stands_to_a_margin_that_is_named(right, images) -> None:
    """Claims 3 points below the measurement stand and 10 above do not, at few images as at many."""
    worst = interval(np.arange(images) < right, 1, True)

    def word(claim: float) -> str:
        options = {"classes": 10, "deterministic": True, "images": images, "largest_class": 0.1}
        found = verdict(Claim(claim, "test"), worst, passing(), **options)
        if found.word == "stands":
            assert f"to within {100 * (worst.value - worst.low):.1f} points ({images} images" in found.reason
        return found.word

    assert [word(worst.value + gap) for gap in (-0.10, -0.03, 0.01, 0.03)] == ["stands"] * 4
    assert "stands" not in [word(min(worst.value + gap, 1.0)) for gap in (0.031, 0.05, 0.10, 0.25)]


def test_images_needed_give_three_points() -> None:
    for right, images in ((50, 100), (160, 200)):
        needed = images_needed(interval(np.arange(images) < right, 1, True), images)
        low, high = interval(np.arange(needed) < needed * right // images, 1, True)[1:]
        assert (high - low) / 2 == pytest.approx(0.03, rel=0.05)
    assert 950 < images_needed(interval(np.arange(100) < 50, 1, True), 100) < 1_150
