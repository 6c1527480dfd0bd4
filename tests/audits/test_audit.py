"""Audits from end to end at tiny budgets: what only looks robust never stands, what is sound does, the coin as what it is."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.pgd import EOT
from rush_bench.audits import checks as rules
from rush_bench.audits import run as room
from rush_bench.audits.binarization import Binarization
from rush_bench.audits.finding import Finding
from rush_bench.audits.roles import Role
from rush_bench.audits.run import judge, probe
from rush_bench.audits.settle import settle
from rush_bench.audits.verdict import STRENGTH, Claim, verdict
from rush_bench.datasets import as_images, load_dataset
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense, Deterministic, Gradient, Passes, Prediction, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation.score import score
from rush_bench.noise import Gaussian, Stream
from rush_bench.records.statistics import paired_difference
from rush_bench.report.audits import lay_out, sentence, write
from rush_bench.threats import Threat

EPS = 0.1
THREAT = Threat("linf", EPS)
ONLY = ["T3", "T7", "T10", "T11", "T15"]  # what the flags and the claim of a test need; the others run all experiments


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits", "test", 24)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch) -> None:
    """Probes that ask less of a network, whose own tests hold them to all of it."""
    attack, settings = EOTAPGD(steps=20, restarts=2), Binarization(inner=100, points=20)
    monkeypatch.setattr(room, "truth", functools.partial(room.truth, calls=20))
    monkeypatch.setattr(room, "binarization", functools.partial(room.binarization, attack=attack, settings=settings))


@pytest.fixture
def audit(digits, tiny, models, tmp_path):
    """The audit of a defence, and the evidence that it is of."""

    def audit(defense, data=digits, claim=None, eps=EPS, steps=None, queries=20, probed=True, **options):
        budget = dataclasses.replace(tiny, queries=(queries,))
        if steps:  # where every prediction is many, or none has an effect
            shorter = dict.fromkeys(("steps", "losses_steps", "sweep_steps", "part_steps"), steps)
            shorter |= {"rand_steps": 2, "long": 2 * steps, "lengths": (2, steps, 2 * steps), "sweep": (1, 4), "points": 3}
            budget = dataclasses.replace(budget, **shorter)
        run = settle([defense], data, budget=budget, eps=eps, store=models, out=tmp_path, quiet=True, **options)
        assert run.complete, run.failed
        probes = probe([defense], data, Threat("linf", eps), tmp_path, quiet=True, count=10) if probed else {}
        return judge(run.evidence[0], probes.get(defense.name, ()), claim)

    return audit


def flagged(audit) -> set[str]:
    return {finding.check for finding in audit.findings if finding.status in ("flag", "bug")}


class Coin(Defense):
    """One toss per prediction, right with probability 0.9, that never looks at the image."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.name, self.classes, self.shape, self.draws, self.passes = "coin@1", 5, (1, 4, 4), 1, Passes()
        self.truth = labels

    def _right(self, stream, batch, draws):
        return stream.uniform(batch, draws, (1,))[:, :, 0] < 0.9

    def predict(self, images, stream):
        one = self.predictions(images, stream, 1)
        return Prediction(one.labels[0], one.votes[0], one.probabilities[0])

    def predictions(self, images, stream, repeats, *, exact=True):
        right, labels = self._right(stream, len(images), repeats).T, self.truth[stream.images]
        labels = torch.where(right, labels, (labels + 1) % 5)
        votes = nn.functional.one_hot(labels, 5)
        return Prediction(labels, votes, votes.float())

    def gradient(self, images, labels, loss, draws, stream):
        share = self._right(stream, len(images), draws).float().mean(1)
        noise = stream.named("gradient").uniform(len(images), 1, self.shape)[:, 0] - 0.5
        return Gradient(noise, -share.clamp_min(0.01).log())


@pytest.mark.parametrize("blind", [True, False])
def test_the_coin_stands_as_what_it_is_unless_it_knows_more_than_a_blind_one_can(audit, blind) -> None:
    labels = torch.zeros(25, dtype=torch.int64) if blind else torch.arange(25) % 5
    images = as_images(torch.full((25, 1, 4, 4), 128, dtype=torch.uint8), labels, classes=list("abcde"), name="coins")
    found = audit(Coin(labels), images, repeats=20, steps=3, only=None if blind else ONLY)
    assert {"reaches-chance", "depends-on-image"} <= flagged(found)
    if not blind:  # right in 90 % where no class is more than a fifth: it has the labels from elsewhere
        assert (found.verdict.word, found.verdict.rule) == ("cannot say", 4)
        return
    assert (found.verdict.word, found.verdict.rule, found.verdict.decided_by) == ("stands", 4, ("depends-on-image",))
    assert found.verdict.worst.low <= 0.9 <= found.verdict.worst.high
    # no attack has an effect: whatever was tried, it is 0.90 at every eps
    for entry in found.evidence.entries:
        assert entry.estimate.low - 0.005 <= 0.9 <= entry.estimate.high + 0.005, entry.trial
    assert "does not depend" in sentence(found) or "do not depend" in sentence(found)


def test_what_only_looks_robust_never_stands_and_its_files_say_why(zoo, audit, tmp_path) -> None:
    found = audit(Deterministic(zoo.broken["killed gradient"], shape=zoo.shape, name="mine"), queries=200, steps=5, only=ONLY)
    assert found.verdict.word == "refuted" and found.verdict.claim.value > 0.9  # by PGD-20 it seems to be
    flags = {"zero-gradients", "true-gradient", "square-beats-white-box", "reaches-chance"}
    assert flags <= flagged(found), flags - flagged(found)
    assert any(name in found.verdict.reason for name in flags & set(STRENGTH))
    claim = Claim(0.9, "stated with --claim")
    agree(dataclasses.replace(found, verdict=dataclasses.replace(found.verdict, claim=claim)), tmp_path)


def agree(found, folder) -> None:
    """The files of a refuted audit say what it found."""
    paths = write(found, folder)
    assert [path.suffix for path in paths] == [".json", ".md"] and all(path.parent.name == "audit" for path in paths)
    said, text = json.loads(paths[0].read_text()), paths[1].read_text()
    assert said["defense"] == "mine" and said["verdict"]["word"] == found.verdict.word == "refuted"
    assert sentence(found) in text and "REFUTED" in text and "stated with --claim" in text
    assert said["verdict"]["claim"]["value"] == 0.9 and "90.0 %" in text
    assert said["verdict"]["decided_by"] and all(name in text for name in said["verdict"]["decided_by"])
    assert [finding["check"] for finding in said["findings"]] == [finding.check for finding in found.findings]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(found.findings) and all(f.check in text for f in found.findings)
    header, lines = lay_out(found)
    assert len({len(header), *map(len, lines)}) == 1
    weighs = {line[0]: line[4] for line in lines}
    assert (weighs["reaches-chance"], weighs["steep-m-curve"], weighs["certificate-above-attack"]) == (
        "strength",
        "sign",
        "bug",
    )


@pytest.mark.parametrize("name", ["line", "robust"])
def test_what_is_sound_stands_and_draws_no_flag_of_strength(zoo, audit, name, monkeypatch) -> None:
    network = getattr(zoo, name)
    monkeypatch.setattr(rules, "QUERIES", 100)  # what a small network's Square needs
    digits = load_dataset("digits", "test", 80)  # fewer leave an interval that is too wide to stand
    found = audit(Deterministic(network, shape=zoo.shape, name=name), digits, queries=100)
    assert not flagged(found) & set(STRENGTH), flagged(found)
    worst = found.verdict.worst
    options = {"classes": 10, "deterministic": True, "images": len(digits), "largest_class": 0.2}
    said = verdict(Claim(worst.value + 0.01, "near it"), worst, found.findings, **options)
    assert (said.word, said.rule) == ("stands", 5), said
    if name == "line":  # whose worst case is known: the margin less eps times the l1 distance of the two rows, but for the box
        weight, bias = network[1].weight, network[1].bias
        x, y = digits.floats().flatten(1), digits.labels
        logits = x @ weight.T + bias
        room_up, room_down = (1 - x).clamp_max(EPS), x.clamp_max(EPS)
        slope = weight[None] - weight[y][:, None]  # (n, 10, 256)
        rise = torch.where(slope > 0, slope * room_up[:, None], -slope * room_down[:, None]).sum(2)
        survives = ((logits + rise - logits.gather(1, y[:, None])).scatter(1, y[:, None], -1) < 0).all(1)
        assert abs(found.verdict.worst.value - float(survives.double().mean())) <= 1.001 / len(digits)


def test_a_smoothed_network_whose_replay_is_far_above_its_worst_case(noisy, audit, digits) -> None:
    defense = Smoothed(noisy, noise=Gaussian(1.0), votes=1, shape=(1, 16, 16), name="noisy@1")
    few, only = load_dataset("digits", "test", 12), ["T3", "T11", "T12", "T15"]
    found = audit(defense, few, repeats=10, steps=2, probed=False, only=only)
    replay = found.evidence.get(Role.PUBLISHED_AA).estimate.value
    assert found.verdict.word in ("refuted", "weakened")
    assert found.verdict.claim.value == pytest.approx(max(replay, found.evidence.get(Role.PUBLISHED_PGD).estimate.value))
    assert "as published" in found.verdict.claim.source and found.verdict.claim.value - found.verdict.worst.high > 0.03
    assert "replay-above-worst" in flagged(found)
    text = sentence(found)
    assert f"{100 * found.verdict.worst.value:.1f} %" in text and f"{100 * found.verdict.claim.value:.1f} %" in text
    certified = next(finding for finding in found.findings if finding.check == "certificate-above-attack")
    assert certified.status == "pass" and "comparisons" in certified.note


def test_the_curve_of_m_falls_and_flattens(noisy) -> None:
    """As in Cohen's own records (0.554 at m=1 to 0.452 at m=128): EOT's first draws matter, the last ones do not."""
    data = load_dataset("digits", "test", 150)
    defense = Smoothed(noisy, noise=Gaussian(0.5), votes=16, shape=(1, 16, 16), name="noisy@16")
    images, labels, counts = data.floats(), data.labels, {}
    for m in (1, 16, 64):
        attack = EOT(steps=3, step=2.5 / 3, draws=m, select_draws=16, steeper=False)  # as in those records
        attacked = attack.run(defense, images, labels, Threat("linf", 0.1), Stream(0, "attack", data.index))
        scored = score(defense, attacked, labels, data.index, Stream(0, "score"), 10)
        counts[m] = scored["correct"], scored["repeats"]
    first, second = (paired_difference(*counts[a], *counts[b]) for a, b in ((1, 16), (16, 64)))
    assert first.low > 0 and first.value > 0.03
    assert second.value < first.value / 3 and second.low <= 0


def test_no_verdict_without_all_trials_probes_and_certificates(made_by_hand) -> None:
    worst = made_by_hand.entry("T11", "worst case over all", made_by_hand.share(0.5), attack="worst")
    open_trial = made_by_hand.entry("T1", "m=1", made_by_hand.share(0.5), complete=False)
    claim = Claim(0.9, "test")
    assert judge(made_by_hand.evidence(worst), (), claim).verdict.word == "refuted"
    for evidence, probes in (
        (made_by_hand.evidence(worst), None),
        (made_by_hand.evidence(worst, open_trial), ()),
        (made_by_hand.evidence(), ()),
        (room.Evidence("made", worst.result.labels, (worst,), uncertified=1), ()),
    ):
        found = judge(evidence, probes, claim)
        assert found.verdict is None and "no verdict yet" in sentence(found)


def test_the_claim_is_the_highest_replay_where_nothing_is_said(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    bars = [
        entry("T15", "AA as published", share(0.8)),
        entry("T15", "PGD as published", share(0.7)),
        entry("T15", "best", share(0.9)),
    ]
    claim = room.replayed(made_by_hand.evidence(*bars))
    assert claim.value == pytest.approx(0.8) and "AA as published" in claim.source
    with pytest.raises(BadInput, match="--claim"):
        room.replayed(made_by_hand.evidence())


def test_probes_are_kept_shared_and_fail_alone(zoo, digits, tmp_path, monkeypatch) -> None:
    calls: list[str] = []

    def fake(name, fails=""):
        def made(defense, *rest):
            calls.append(f"{defense.name} {name}")
            if defense.name == fails:
                raise ValueError("no such luck")
            return [Finding(name, "w", 0.0, 0.0, "<=", "s", "pass")]

        return made

    monkeypatch.setattr(room, "flags", fake("flags"))
    monkeypatch.setattr(room, "truth", fake("truth"))
    monkeypatch.setattr(room, "indicators", fake("indicators", "two"))
    monkeypatch.setattr(room, "binarization", fake("binarization"))
    one, two = Deterministic(zoo.base, shape=zoo.shape, name="one"), Deterministic(zoo.line, shape=zoo.shape, name="two")
    assert (
        probe([one, two], digits, THREAT, tmp_path, quiet=True, deadline=Deadline(0.0)) == {} and not calls
    )  # the time was up
    failed: dict[str, str] = {}
    found = probe([one, two], digits, THREAT, tmp_path, quiet=True, failed=failed)
    assert [finding.check for finding in found["one"]] == ["flags", "truth", "indicators", "binarization"]
    assert "two" not in found and list(failed) == ["two probe indicators"]
    assert "ValueError: no such luck" in failed["two probe indicators"]
    calls.clear()
    monkeypatch.setattr(room, "indicators", fake("indicators"))
    assert set(probe([one, two], digits, THREAT, tmp_path, quiet=True)) == {"one", "two"}
    assert calls == ["two indicators"]  # the rest lay there
    calls.clear()
    probe([one], digits, Threat("linf", 0.2), tmp_path, quiet=True)
    probe([one], digits, THREAT, tmp_path, quiet=True, seed=1)
    assert len(calls) == 8


@pytest.mark.parametrize(("own_order", "some"), [(True, 10), (False, 10), (True, 60), (True, 100)])
def test_probes_look_at_images_from_everywhere(zoo, tmp_path, monkeypatch, own_order, some) -> None:
    """Images in an order of their own may be sorted, and what is masked stand last; those of `n` are drawn already."""
    seen: list[torch.Tensor] = []
    for name in ("flags", "truth", "indicators", "binarization"):
        monkeypatch.setattr(room, name, lambda defense, images, *rest: seen.append(images) or [])
    data = load_dataset("digits", "test", n=None if own_order else 60)
    data = data.take(slice(60))
    defense = Deterministic(zoo.line, shape=zoo.shape, name="line")
    probe([defense], data, THREAT, tmp_path, quiet=True, count=some)
    places = [int((data.floats() == image).flatten(1).all(1).int().argmax()) for image in seen[0]]
    assert len({*places}) == min(some, 60) and all(torch.equal(seen[0], images) for images in seen)
    assert (places != list(range(10))) == own_order if some == 10 else places == list(range(60))


def test_findings_read_back_as_they_were(zoo, digits, tmp_path) -> None:
    defense = Deterministic(zoo.line, shape=zoo.shape, name="line")
    first, second = (probe([defense], digits, THREAT, tmp_path, quiet=True, count=8)["line"] for _ in range(2))
    assert first == second and all(isinstance(finding, Finding) for finding in second)
    assert np.isfinite([finding.figure for finding in second if finding.figure is not None]).all()
