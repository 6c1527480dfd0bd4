"""The rules of docs/verdict.md, one by one, and that its names are names of checks."""

import re
from pathlib import Path

import pytest

from rush_bench.audit.finding import Finding, judged, not_run
from rush_bench.audit.verdict import BUGS, REQUIRED, REQUIRED_RANDOMISED, STRENGTH, Claim, verdict
from rush_bench.evaluation.statistics import Estimate

ROOT = Path(__file__).parents[2]


def finding(check: str, status: str = "pass") -> Finding:
    return Finding(check, "what", 0.0, 0.0, "<=", "source", status)  # type: ignore[arg-type]


def passing(**other: str) -> list[Finding]:
    """All checks that can decide pass, but for those given: `reaches_chance="flag"`; `none` leaves one out."""
    names = dict.fromkeys([*STRENGTH, *BUGS, "depends-on-image", "steep-m-curve"], "pass")
    names |= {name.replace("_", "-"): status for name, status in other.items()}
    return [finding(name, status) for name, status in names.items() if status != "none"]


def said(claim: float, high: float, findings: list[Finding], classes: int = 10, deterministic: bool = False):
    return verdict(
        Claim(claim, "test"), Estimate(high - 0.02, high - 0.04, high), findings, classes=classes, deterministic=deterministic
    )


@pytest.mark.parametrize(
    ("claim", "high", "others", "word", "rule", "by"),
    [
        # 5: everything passes and high is within 3 points, or above
        (0.80, 0.80, {}, "stands", 5, "worst case"),
        (0.80, 0.95, {}, "stands", 5, "worst case"),
        (0.80, 0.77, {}, "stands", 5, "worst case"),  # exactly 3 points are not more than 3
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
    for name in ("checks", "flags", "indicators", "binarization", "run"):
        text = (ROOT / "rush_bench" / "audit" / f"{name}.py").read_text()
        names |= set(re.findall(r'(?:judged|not_run|_loss)\(\s*"([a-z-]+)"', text))
        names |= {"zero-gradients", "zero-gradients-margin"} if name == "flags" else set()  # put together; test_flags has them
    return names


def test_names_that_decide_are_names_that_are_made() -> None:
    """A misspelt name in the tables of the verdict would never be flagged, or always be missing."""
    decide = {*STRENGTH, *BUGS, *REQUIRED, *REQUIRED_RANDOMISED, "depends-on-image"}
    assert decide <= produced(), decide - produced()
    assert len(STRENGTH) == len(set(STRENGTH)) and set(REQUIRED_RANDOMISED) <= set(STRENGTH)


def test_the_document_has_every_check_and_no_other() -> None:
    text = (ROOT / "docs" / "verdict.md").read_text()
    checks = text[text.index("## Checks") :]
    strength, signs = checks[: checks.index("**Signs of masking**")], checks[checks.index("**Signs of masking**") :]
    rows = {part: re.findall(r"^\| (`.*?) \|", text, re.M) for part, text in (("strength", strength), ("signs", signs))}
    named = {part: set(re.findall(r"`([a-z-]+)`", " ".join(lines))) for part, lines in rows.items()}
    assert named["strength"] == {*STRENGTH, "binarization-random"}
    assert named["strength"] | named["signs"] | set(BUGS) == produced()
    required = text[text.index("Required for *stands*") : text.index("## Changed since")]
    assert set(re.findall(r"`([a-z-]+)`", required)) == set(REQUIRED_RANDOMISED)


def test_findings_follow_from_their_figures() -> None:
    assert judged("a", "w", 0.1, "<=", 0.1, "s").status == "pass"
    assert judged("a", "w", 0.11, "<=", 0.1, "s").status == "flag"
    assert judged("a", "w", 0.09, ">=", 0.1, "s", otherwise="bug").status == "bug"
    assert not_run("a", "w", "s", "why").to_dict()["note"] == "why"


@pytest.mark.parametrize(("low", "word", "rule"), [(0.61, "stands", 5), (0.60, "stands", 5), (0.59, "cannot say", 4)])
def test_a_wide_interval_lets_nothing_stand(low, word, rule) -> None:
    """With so few images a refuted claim would look the same."""
    found = verdict(Claim(0.8, "test"), Estimate(0.7, low, 0.8), passing(), classes=10, deterministic=True)
    assert (found.word, found.rule) == (word, rule)
    assert ("too few images" in found.reason) == (word == "cannot say")
