"""The attacks of the waterfall (T15) and of T2, T5, T6, T9: against the author's arithmetic, torchattacks and closed forms."""

import importlib.metadata
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from rush_bench.attacks.ablation import Ablation
from rush_bench.attacks.autoattack import AutoAttack, QuickAPGD, RandAutoAttack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.pgd import EOT, PGD
from rush_bench.attacks.published import PublishedAutoAttack, PublishedPGD
from rush_bench.attacks.suites import parse_suite
from rush_bench.attacks.torchattacks_own import TorchattacksAutoAttack, TorchattacksPGDRS
from rush_bench.datasets import load_dataset
from rush_bench.defenses import Defense, Deterministic, Passes, Prediction, Smoothed, as_module
from rush_bench.errors import BadInput, MissingPackage
from rush_bench.evaluation import attack as run_suite
from rush_bench.evaluation.score import score
from rush_bench.noise import Gaussian, Stream, Uniform
from rush_bench.records.statistics import paired_difference
from rush_bench.threats import Threat

SMALL, DIGIT = (1, 4, 4), (1, 8, 8)
STREAM = Stream(0, "attack")
LINF = Threat("linf", 0.1)


@pytest.fixture
def digits(digits):
    """Of 60 images."""
    network, images, labels = digits
    return network, images[:60], labels[:60]


def _rate(defense, attacked, labels, repeats=40):
    found = score(defense, attacked, labels, torch.arange(len(labels)), Stream(7, "score"), repeats)
    return found["correct"], found["repeats"]


def _unchanged(attacked, images):
    return (attacked == images).flatten(1).all(1)


# --- settings and keys


def test_settings_that_came_later_leave_the_keys_of_older_records_as_they_were(linear):
    """The dictionaries are those of the records committed under results/ before the settings existed."""
    old = {
        "steps": 20,
        "step": 0.25,
        "restarts": 1,
        "random_start": True,
        "draws": 0,
        "loss": "ce",
        "select_draws": 32,
        "select_every": 5,
    }  # and CE of logits as they are
    still = Deterministic(linear, shape=SMALL)
    assert PGD(steeper=False).on(still).settings() == old
    assert PGD().on(still).settings() == old | {"steeper": True}
    assert (
        PublishedPGD().on(still).settings() == PublishedPGD().on(Smoothed(linear, noise="uniform:0.1", shape=SMALL)).settings()
    )
    looks = {"select_draws": 64, "select_every": 10, "stop": True}
    assert EOT(steeper=False).settings() == old | {"steps": 100, "step": 0.025, "draws": 64, **looks}
    old = PGD().settings()
    assert (old["select_draws"], old["select_every"], old["stop"]) == (24, 10, True)
    for later in ({"redraw": 0}, {"redraw": 10}, {"clamp": "graph"}, {"keep": "last"}):
        assert Ablation(**later).settings() == {"name": "pgd"} | old | later
    assert Ablation(of="eot", **EOT().settings()).settings() == {"name": "eot"} | EOT().settings()
    assert AutoAttack().settings() == {"bank": 0, "least_bank": 16, "bank_seed": 0, "parts": (), "steps": 0}


def test_as_published():
    """S2.1: 40 steps of 2/255 at 8/255, zero start, the defence's m draws fixed, in-graph clamp, last iterate."""
    attack = PublishedPGD()
    assert (attack.steps, attack.step * 8 / 255, attack.draws) == (40, pytest.approx(2 / 255), 0)
    assert (attack.random_start, attack.redraw, attack.clamp, attack.keep) == (False, 0, "graph", "last")
    parts = PublishedAutoAttack()
    assert (parts.steps, parts.queries, parts.fab, parts.hand_back) == (100, 5000, "untargeted", "clean")


# --- PGD: which draws, which clamp


@pytest.mark.parametrize(("redraw", "sets"), [(0, 1), (1, 20), (10, 2), (7, 3)])
def test_how_often_draws_are_renewed(linear, grey, redraw, sets):
    class Spy(Smoothed):
        def gradient(self, images, labels, loss, draws, stream):
            seen.append(stream.uniform(len(images), draws, SMALL))
            return super().gradient(images, labels, loss, draws, stream)

    seen: list[torch.Tensor] = []
    defense = Spy(linear, noise=Uniform(0.3), votes=3, shape=SMALL)
    Ablation(steps=20, redraw=redraw, stop=False).run(defense, grey.floats(), grey.labels, LINF, STREAM)
    assert len({noise.numpy().tobytes() for noise in seen}) == sets
    assert len(torch.stack(seen).flatten().unique()) > 0.99 * sets * seen[0].numel()  # and no draw comes twice


class Turning(nn.Module):
    """Logits (0, v): v rises with pixel 0 while pixel 1 is below 0.51 and falls with it above; with pixel 1 it always rises."""

    def forward(self, images):
        a, b = images[:, 0, 0, 0], images[:, 0, 0, 1]
        v = 20 * a * (0.51 - b) + 40 * b
        return torch.stack([torch.zeros_like(v), v], 1)


@pytest.mark.parametrize(("clamp", "ends"), [("project", 0.88), ("graph", 1.0), ("straight-through", 0.88)])
def test_a_pixel_outside_the_box_freezes_under_the_graph_clamp_alone(clamp, ends):
    """Pixel 0 goes from 0.98 to 1.005 in the first step. From then on the loss wants it low."""
    images = torch.full((1, 1, 1, 2), 0.5)
    images[..., 0] = 0.98
    defense = Deterministic(Turning().eval(), shape=(1, 1, 2))
    attack = Ablation(steps=10, random_start=False, clamp=clamp, keep="last")
    attacked = attack.run(defense, images, torch.tensor([0]), LINF, STREAM)
    assert attacked[0, 0, 0].tolist() == pytest.approx([ends, 0.6], abs=1e-6)


def _author(network, images, labels, noise, threat, steps):
    """The author's public code in words of our own (S2.1), float64, an image at a time: (B, C, H, W)."""
    network, out = network.double(), []
    for image, label, draws in zip(images.double(), labels, noise.double(), strict=True):
        delta = torch.zeros_like(image)
        for _ in range(steps):
            delta.requires_grad_()
            at = image + delta
            # clamp with a slope of 1 at its very edge, as torch had it until 2.13; now it is 0 there
            kept = torch.where((at >= 0) & (at <= 1), at, at.detach().clamp(0, 1))
            p = network(kept + draws).softmax(1)[:, label].mean()
            (slope,) = torch.autograd.grad(-p.clamp_min(1e-20).log(), delta)
            delta = (delta.detach() + 0.25 * threat.eps * slope.sign()).clamp(-threat.eps, threat.eps)
        out.append((image + delta).clamp(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize(("law", "votes"), [(Uniform(0.3), 1), (Gaussian(0.2), 6)], ids=repr)
def test_pgd_published_is_the_authors_arithmetic(law, votes):
    def mlp():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5)).requires_grad_(False).eval()

    with torch.random.fork_rng():
        network, double = mlp(), mlp()
    for layer in (network[1], double[1]):
        layer.weight.mul_(6)  # bent enough that the way of the iterates counts
        layer.bias.sub_(layer.weight.sum(1) / 2)
    images = torch.rand(6, *SMALL, generator=torch.Generator().manual_seed(4))
    images = (1.6 * images - 0.3).clamp(0, 1)  # many pixels at the box's edge, where they freeze
    defense = Smoothed(network, noise=law, votes=votes, shape=SMALL)
    labels = defense.predict(images, STREAM).labels
    threat = Threat("linf", 0.25)
    attacked = PublishedPGD().run(defense, images, labels, threat, STREAM)
    noise = STREAM.named("gradient0").noise(law, 6, votes, SMALL, "cpu")
    expected = _author(double, images, labels, noise, threat, 40)
    assert ((attacked - expected).abs() < 1e-5).float().mean() > 0.99  # a slope of zero may round either way
    for other in ({"clamp": "project"}, {"redraw": 1}, {"random_start": True}):  # or the agreement would say little
        else_ = PublishedPGD(**other).run(defense, images, labels, threat, STREAM)
        assert ((else_ - expected).abs() > 1e-3).float().mean() > 0.02


def test_keeping_the_best_is_never_worse_on_the_draws_that_judge(digits):
    network, images, labels = digits
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    last, best = (PublishedPGD(keep=keep, stop=False).run(defense, images, labels, LINF, STREAM) for keep in ("last", "best"))
    worth = []
    for found in (last, best):
        judge = BestSoFar(defense, images, labels, STREAM, PGD().select_draws)
        judge.offer(found)
        worth.append(judge.value)
    assert (worth[1] >= worth[0]).all() and (worth[1] > worth[0] + 0.01).any()


# --- AutoAttack's bookkeeping


class CoinModule(nn.Module):
    """Right nine times in ten whatever the input; a faint slope so that no attack stands still."""

    def __init__(self, truth, stream):
        super().__init__()
        self.truth, self.stream = truth, stream

    def forward(self, images):
        right = self.stream.uniform(len(images), 1, (1,))[:, 0, 0] < 0.9
        self.stream = self.stream.skip(1)
        labels = torch.where(right, self.truth, (self.truth + 1) % 5)
        slope = torch.linspace(-1, 1, 80).view(16, 5)
        return 10 * nn.functional.one_hot(labels, 5) + 1e-3 * images.flatten(1) @ slope


class Coin(Defense):
    """All images are of class 2."""

    name, classes, shape, draws = "coin", 5, SMALL, 1

    def __init__(self):
        self.passes = Passes()

    def predict(self, images, stream):
        labels = CoinModule(torch.tensor(2), stream)(images).argmax(1)
        votes = nn.functional.one_hot(labels, 5)
        return Prediction(labels, votes, votes.float())

    def as_module(self, stream):
        return CoinModule(torch.tensor(2), stream)


N = 1500
COINS = torch.full((N, *SMALL), 0.5), torch.full((N,), 2)


def _near(found, expected):
    return abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / N)


def test_the_coin_under_rand_counts_a_filter_at_each_stage_and_ours_does_not():
    """One pass before and one after each of two components: 0.9^3 = 0.729. The package itself says as much."""
    import pyautoattack

    images, labels = COINS
    attack = RandAutoAttack(eot_iter=2, steps=30, select_draws=8)
    attacked, extra = attack.recorded(Coin(), images, labels, LINF, STREAM)
    assert _near(extra["official_correct"].mean(), 0.9**3) and (extra["official_repeats"] == 1).all()
    assert (attacked != images).flatten(1).any(1).all()
    correct, repeats = _rate(Coin(), attacked, labels)
    assert abs(correct.sum() / repeats.sum() - 0.9) < 0.006
    with torch.random.fork_rng():
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        package = pyautoattack.AutoAttack(CoinModule(torch.tensor(2), Stream(1, "package")), eps=0.1, version="rand", seed=0)
        package.apgd.n_iter, package.apgd.eot_iter = 30, 2
        _, found = package.run_standard_evaluation(images, labels, batch_size=N)
    assert _near(float((found == labels).float().mean()), 0.9**3)


def test_the_coin_as_published_hands_back_what_stood_four_passes():
    """A_resc of sources S6.2 with q = p = 0.9: the share that stands is 0.9^4, and all of it comes back clean."""
    images, labels = COINS
    attack = PublishedAutoAttack(steps=3, queries=4)
    attacked, extra = attack.recorded(Coin(), images, labels, LINF, STREAM)
    stood = extra["official_correct"] == 1
    assert _near(stood.mean(), 0.9**4)
    assert _unchanged(attacked, images)[torch.from_numpy(stood)].all()
    correct, repeats = _rate(Coin(), attacked, labels)
    assert abs(correct.sum() / repeats.sum() - 0.9) < 0.006
    best = PublishedAutoAttack(steps=3, queries=4, hand_back="best", select_draws=4).run(Coin(), images, labels, LINF, STREAM)
    assert not _unchanged(best, images).any()


def test_the_first_correction_changes_what_was_handed_back_and_nothing_else(digits):
    network, images, labels = digits
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    threat, found, counts = Threat("linf", 0.12), {}, {}
    for how in ("clean", "best"):
        attack = PublishedAutoAttack(steps=5, queries=20, hand_back=how)
        found[how], extra = attack.recorded(defense, images, labels, threat, STREAM)
        counts[how] = extra["official_correct"]
    clean = _unchanged(found["clean"], images)
    assert np.array_equal(counts["clean"], counts["best"]) and clean[torch.from_numpy(counts["clean"] == 1)].all()
    assert 3 <= clean.sum() < len(images) and not _unchanged(found["best"], images).any()
    assert torch.equal(found["clean"][~clean], found["best"][~clean])
    rates = {how: np.divide(*_rate(defense, x, labels))[clean.numpy()].mean() for how, x in found.items()}
    assert rates["best"] < rates["clean"] - 0.1
    assert found["best"][clean].sub(images[clean]).abs().max() <= threat.eps + 1e-6


def test_rand_returns_points_at_least_as_strong_as_one_apgd_run_of_the_package(digits):
    """Its own `best_loss` point of APGD-CE is among the candidates, so the mean over fresh draws cannot be much above it."""
    from pyautoattack.autopgd_base import APGDAttack

    network, images, labels = digits
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    attack = RandAutoAttack(eot_iter=4, steps=20)
    attacked, extra = attack.recorded(defense, images, labels, LINF, STREAM)
    official = extra["official_correct"]
    with torch.random.fork_rng(), torch.no_grad():
        package = APGDAttack(as_module(defense, Stream(3, "package")), n_iter=20, eot_iter=4, eps=0.1, device="cpu")
        theirs = package.perturb(images, labels, best_loss=True)
    ours, other = (np.divide(*_rate(defense, x, labels)).mean() for x in (attacked, theirs))
    assert ours <= other + 0.03
    assert official.mean() < ours  # it gives images away to luck


def test_too_few_classes_for_torchattacks_are_refused(grey):
    three = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(BadInput, match="classes"):
        TorchattacksAutoAttack().run(Deterministic(three, shape=SMALL), grey.floats(), grey.labels, LINF, STREAM)


# --- the bank and banks that were not seen (T6)


def test_x_of_a_bank_is_scored_on_five_others(digits):
    network, images, labels = digits
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    attack = QuickAPGD(bank=1, bank_seed=10)
    attacked, extra = attack.recorded(defense, images, labels, LINF, STREAM)
    rights = [defense.bank(1, 10 + k).predict(attacked, STREAM).labels == labels for k in range(6)]
    assert np.array_equal(extra["bank_correct"], rights[0].long())
    assert np.array_equal(extra["unseen_correct"], torch.stack(rights[1:]).sum(0))
    assert (extra["unseen_repeats"] == 5).all()
    assert extra["unseen_correct"].mean() / 5 > extra["bank_correct"].mean() + 0.1  # it was fitted to one draw


def test_records_hold_what_the_attacks_say_besides(digits, tmp_path):
    network = digits[0]
    data = load_dataset("digits", "test", n=10, size=8)
    suite = parse_suite(
        "linf25.5",
        only=("aa", "aa-rand", "aa-published"),
        overrides={
            "aa.parts": "apgd-ce",
            "aa.steps": 3,
            "aa-rand.steps": 3,
            "aa-published.steps": 3,
            "aa-published.queries": 3,
        },
    )
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT, name="digits@1")
    run = run_suite([defense], suite, data, out=tmp_path, chunk=8, repeats=2, quiet=True)
    assert run.complete, run.failed
    frames = {result.labels["attack"]: result.frame for result in run.results}
    assert set(frames["aa"]["unseen_repeats"]) == {5} and frames["aa"]["unseen_correct"].between(0, 5).all()
    for name in ("aa-rand", "aa-published"):
        assert frames[name]["official_correct"].isin([0, 1]).all() and len(frames[name]) == 10


# --- torchattacks itself


def test_aa_published_is_torchattacks_image_by_image(digits):
    """On a deterministic network: which images break, which come back clean, and nearly every pixel of x'."""
    pytest.importorskip("torchattacks")
    network, images, labels = digits
    defense, threat = Deterministic(network, shape=DIGIT), Threat("linf", 0.06)
    ours = PublishedAutoAttack(steps=10, queries=100, fab="targeted").run(defense, images, labels, threat, STREAM)
    theirs = TorchattacksAutoAttack(queries=100).run(defense, images, labels, threat, STREAM)
    right = [defense.predict(x, STREAM).labels == labels for x in (ours, theirs)]
    assert 0.1 < right[0].float().mean() < 0.9  # or agreement would say nothing
    assert (right[0] == right[1]).float().mean() >= 0.99
    assert (_unchanged(ours, images) == _unchanged(theirs, images)).float().mean() >= 0.99
    assert _unchanged(ours, images).sum() >= 5
    assert ((ours - theirs).abs() < 1e-4).float().mean() > 0.95


def test_aa_published_scores_as_torchattacks_on_a_randomised_network(digits):
    pytest.importorskip("torchattacks")
    network, images, labels = digits
    defense, threat = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT), Threat("linf", 0.12)
    ours = PublishedAutoAttack(steps=10, queries=50, fab="targeted")
    rates = [
        _rate(defense, attack.run(defense, images, labels, threat, Stream(seed, "attack")), labels)
        for seed, attack in ((1, ours), (2, TorchattacksAutoAttack(queries=50)))
    ]
    gap = paired_difference(*rates[0], *rates[1])
    assert gap.low <= 0 <= gap.high and abs(gap.value) < 0.08
    # and with the same noise at every pass they are the same attack
    same = [a.run(defense, images, labels, threat, STREAM) for a in (ours, TorchattacksAutoAttack(queries=50))]
    assert (_unchanged(same[0], images) == _unchanged(same[1], images)).float().mean() > 0.9
    assert _unchanged(same[0], images).any()


@pytest.mark.parametrize("law", [Uniform(0.3), Gaussian(0.2)], ids=repr)
def test_pgdrs_is_our_pgd_with_its_settings(digits, law):
    pytest.importorskip("torchattacks")
    network, images, labels = digits
    still = Deterministic(network, shape=DIGIT)
    theirs, ours = (a.run(still, images, labels, LINF, STREAM) for a in (TorchattacksPGDRS(), PublishedPGD()))
    assert ((theirs - ours).abs() < 1e-5).float().mean() > 0.99  # without noise there is nothing to choose
    defense = Smoothed(network, noise=law, votes=4, shape=DIGIT)
    fresh = PublishedPGD(redraw=1)  # the later class draws anew at each step
    rates = [_rate(defense, a.run(defense, images, labels, LINF, STREAM), labels) for a in (fresh, TorchattacksPGDRS())]
    gap = paired_difference(*rates[0], *rates[1])
    assert gap.low <= 0 <= gap.high and abs(gap.value) < 0.05
    clean = _rate(defense, images, labels)[0].mean()
    assert rates[1][0].mean() < 0.8 * clean  # it does attack


def test_what_pgdrs_cannot_do_is_said(linear, grey):
    defense = Smoothed(linear, noise=Uniform(0.1), votes=2, shape=SMALL)
    with pytest.raises(BadInput, match="for l-inf"):
        TorchattacksPGDRS().run(defense, grey.floats(), grey.labels, Threat("l2", 0.1), STREAM)
    with pytest.raises(BadInput, match="uniform and Gaussian noise, coin has"):
        TorchattacksPGDRS().run(Coin(), *COINS, LINF, STREAM)


@pytest.mark.parametrize("attack", [TorchattacksPGDRS(), TorchattacksAutoAttack()], ids=lambda a: type(a).__name__)
def test_without_the_extra_they_say_how_to_install_it(linear, grey, attack, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    defense = Smoothed(linear, noise=Uniform(0.1), votes=2, shape=SMALL)
    with pytest.raises(MissingPackage, match=r"pip install 'rush-bench\[torchattacks\]'"):
        attack.run(defense, grey.floats(), grey.labels, LINF, STREAM)
