"""Controls: what only looks robust is refused or flagged, and broken by the right attack; what is sound draws no flag."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.autoattack import QuickAPGD
from rush_bench.attacks.control import RandomNoise
from rush_bench.attacks.pgd import EOT, PGD
from rush_bench.attacks.square import Square
from rush_bench.attacks.transfer import Transfer
from rush_bench.audits.flags import flags
from rush_bench.audits.indicators import indicators
from rush_bench.audits.scale import usual_scale
from rush_bench.defenses import Defense, Deterministic, Gradient, Passes, Prediction, Randomised
from rush_bench.defenses.aggregate import objective_named
from rush_bench.errors import BadInput
from rush_bench.evaluation.score import check, score
from rush_bench.noise import Stream
from rush_bench.threats import Threat

THREAT = Threat("linf", 0.1)


def accuracy(defense, attack, images, labels, repeats=20):
    """Over fresh draws, of x' that is checked to be in the ball; without an attack, of the images."""
    index = torch.arange(len(images))
    attacked = images
    if attack is not None:
        attacked = attack.run(defense, images, labels, THREAT, Stream(0, "attack", index))
        check(attacked, images, index, THREAT)
    found = score(defense, attacked, labels, index, Stream(1, "score"), 1 if defense.deterministic else repeats)
    return float((found["correct"] / found["repeats"]).mean())


def flagged(defense, images, labels, **options):
    stream = Stream(2, "audit", torch.arange(len(images)))
    defense = usual_scale(defense, images, stream)
    found = flags(defense, images, labels, THREAT, stream)
    found += indicators(defense, images, labels, THREAT, stream, **options)
    return {finding.check for finding in found if finding.status in ("flag", "bug")}


def plain(zoo, name):
    """What is refused for its batch statistics goes behind the door here: a defence of one's own need not come through it."""
    if name == "batch statistics":
        defense = Deterministic(zoo.base, shape=zoo.shape, name=name)
        defense.body.network = defense.body.search = zoo.broken[name]
        return defense
    if name == "saturated":
        return Own(zoo.broken["temperature"], zoo.shape)
    return Deterministic(zoo.broken[name], shape=zoo.shape, name=name)


class Own(Defense):
    """A defence of a user's own, whose gradient is autograd's in float32: CE's is 0 where the softmax saturates."""

    def __init__(self, network, shape) -> None:
        self.network, self.name, self.classes, self.shape, self.passes = network, "own", 10, shape, Passes()

    def predict(self, images, stream):
        p = self.network(images).softmax(1)
        return Prediction(p.argmax(1), nn.functional.one_hot(p.argmax(1), 10), p)

    def gradient(self, images, labels, loss, draws, stream):
        function, _ = objective_named(loss)
        x = images.clone().requires_grad_()
        value = function(self.network(x).log_softmax(1), labels)
        return Gradient(torch.autograd.grad(value.sum(), x)[0], value.detach())


@pytest.mark.strangers
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("probabilities", 'outputs="probabilities"'),
        ("detached", "BPDA"),
        ("pruned", r"Randomised\(network"),
        ("resized", r"Randomised\(network"),
        ("batch statistics", "other images of its batch"),
    ],
)
def test_refused_at_construction(zoo, name, says):
    with pytest.raises(BadInput, match=says):
        Deterministic(zoo.broken[name], shape=zoo.shape)


def test_refused_for_batchnorm_in_train_mode_and_for_normalised_images(zoo):
    network = nn.Sequential(nn.BatchNorm2d(1), zoo.base)
    with pytest.raises(BadInput, match="train mode"):
        Deterministic(network, shape=zoo.shape)
    with pytest.raises(BadInput, match=r"scale pixels to \[0,1\]"):
        Deterministic(zoo.base, shape=zoo.shape).predict((zoo.images - 0.5) / 0.2, Stream(0, "x"))


NO_GRADIENT = {"zero-gradients", "unavailable-gradients", "unconstrained-attack-failure"}


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("killed gradient", NO_GRADIENT),
        ("quantised", NO_GRADIENT),
        ("jpeg", NO_GRADIENT),
        ("sigmoids", {"probabilities-for-logits"}),
        ("normalised", {"other-pixel-range"}),
        ("batch statistics", {"batch-dependence"}),
    ],
)
def test_flagged(zoo, name, checks):
    assert checks <= flagged(plain(zoo, name), zoo.images, zoo.labels)


@pytest.mark.parametrize(
    ("name", "left", "breakers"),
    [
        ("killed gradient", 0.9, ("square", "transfer")),
        ("quantised", 0.9, ("square", "transfer")),
        ("jpeg", 0.9, ("square", "transfer")),
        ("saturated", 0.9, ("margin", "transfer")),
        ("sigmoids", 0.3, ("transfer",)),
    ],
)
def test_broken_by_the_right_attack(zoo, name, left, breakers):
    """PGD on logits as they are leaves `left`, attacks without that gradient almost what it leaves of the bare network."""
    defense, base = plain(zoo, name), Deterministic(zoo.base, shape=zoo.shape, name="base")
    attacks = {
        "square": Square(queries=400),
        "margin": EOTAPGD(steps=20, losses=("margin",)),
        "transfer": Transfer(source=base, steps=20),
    }
    assert accuracy(defense, PGD(steeper=False), zoo.images, zoo.labels) >= left
    for breaker in breakers:
        assert accuracy(defense, attacks[breaker], zoo.images, zoo.labels) <= 0.4, breaker


def test_the_temperature_of_a_network_of_ours_hides_nothing(zoo):
    """CE keeps its direction where its slope fades."""
    hot, base = plain(zoo, "temperature"), Deterministic(zoo.base, shape=zoo.shape)
    left = accuracy(base, PGD(), zoo.images, zoo.labels)
    assert left < 0.25
    assert accuracy(hot, PGD(), zoo.images, zoo.labels) <= left + 0.05
    assert not flagged(hot, zoo.images, zoo.labels)


def test_what_is_fed_right_is_broken_by_plain_pgd(zoo):
    """Normalisation inside the network; probabilities said to be so."""
    inside = Deterministic(zoo.inside, shape=zoo.shape)
    said = Deterministic(zoo.broken["probabilities"], shape=zoo.shape, outputs="probabilities")
    outside = plain(zoo, "normalised")
    assert accuracy(outside, None, zoo.images, zoo.labels) < 0.3
    for defense in (inside, said):
        assert accuracy(defense, None, zoo.images, zoo.labels) > 0.9
        assert accuracy(defense, PGD(), zoo.images, zoo.labels) < 0.3
        assert not flagged(defense, zoo.images, zoo.labels)


def randomised(zoo, name, votes):
    if name == "pruned":
        return Randomised(zoo.broken[name], votes=votes, plain=zoo.base, shape=zoo.shape, name=name)
    return Randomised(zoo.base, transform=zoo.resize_pad, votes=votes, shape=zoo.shape, name=name)


@pytest.mark.parametrize(("name", "votes"), [("resized", 1), ("pruned", 1)])
def test_randomness_is_broken_by_the_averaged_attack(zoo, name, votes):
    """The attack on one draw leaves more than EOT and the base's x' do, which leave next to what the base keeps."""
    defense, (images, labels) = randomised(zoo, name, votes), (zoo.images[:16], zoo.labels[:16])
    one_draw = Transfer(source=defense.bank(1, 0), steps=20)
    averaged = EOTAPGD(steps=10, losses=("ce",), draws=16, select_draws=16)
    clean, one, eot, base = (
        accuracy(defense, attack, images, labels) for attack in (None, one_draw, averaged, Transfer(steps=20))
    )
    assert clean > 0.75
    assert eot < clean - 0.5 and base < clean - 0.5
    assert one > eot + (0.1 if name == "resized" else 0)


def test_resizing_draws_no_flag_as_what_it_is(zoo):
    """It is broken in the open: as a `Randomised` its gradients are true, and nothing is hidden."""
    found = flagged(randomised(zoo, "resized", 4), zoo.images[:12], zoo.labels[:12], steps=20, held=16, neighbours=4)
    assert not found


@pytest.mark.parametrize(
    "attack",
    [
        None,
        PGD(steps=5),
        EOT(steps=5, draws=8),
        EOTAPGD(steps=10, losses=("ce", "margin"), select_draws=16),
        Square(queries=60, draws=4, redraw=20, select_draws=16),
        QuickAPGD(steps=5),
        RandomNoise(points=5),
        "repeated",
    ],
    ids=lambda attack: type(attack).__name__ if attack else "clean",
)
def test_a_coin_is_a_coin_under_every_attack(zoo, attack):
    """0.9 within the error of 60 x 50 throws, whatever an attack selects."""
    labels, repeats = torch.arange(60) % 10, 50
    defense = Randomised(zoo.coin, shape=zoo.shape)
    images = zoo.striped(labels)
    if attack == "repeated":  # who asks again until it falls wrong has a clean image
        attack = EOTAPGD(steps=3, restarts=3, losses=("ce",), select_draws=4)
    found = accuracy(defense, attack, images, labels, repeats)
    low, high = np.array(stats.binom.interval(1 - 1e-6, 60 * repeats, 0.9)) / (60 * repeats)
    assert low <= found <= high


def test_a_coin_draws_no_flag_as_what_it_is(zoo):
    labels = torch.arange(20) % 10
    how = {"steps": 10, "held": 16, "neighbours": 4}
    assert not flagged(Randomised(zoo.coin, shape=zoo.shape), zoo.striped(labels), labels, **how)


def closed_form(network, images, labels, eps):
    """The least margin of a linear network over ball and box, (B,): each pixel goes as far as both let it."""
    weight, bias = network[1].weight, network[1].bias
    flat = images.flatten(1)
    low, high = (flat - eps).clamp_min(0), (flat + eps).clamp_max(1)
    gap = weight[labels][:, None] - weight  # (B, K, pixels)
    worst = torch.where(gap > 0, low[:, None], high[:, None])
    margins = (gap * worst).sum(2) + bias[labels][:, None] - bias
    return margins.scatter(1, labels[:, None], torch.inf).min(1).values


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_the_strong_attack_reaches_the_closed_form_on_a_linear_network(zoo, eps):
    defense = Deterministic(zoo.line, shape=zoo.shape)
    stands = closed_form(zoo.line, zoo.images, zoo.labels, eps) > 0
    assert 0 < stands.float().mean() < 1
    attack = EOTAPGD(steps=30, losses=("margin", "margin-to"))
    attacked = attack.run(defense, zoo.images, zoo.labels, Threat("linf", eps), Stream(0, "attack"))
    assert torch.equal(defense.predict(attacked, Stream(0, "score")).labels == zoo.labels, stands)


@pytest.mark.parametrize("name", ["base", "robust", "line"])
def test_sound_networks_draw_no_flag(zoo, name):
    defense = Deterministic(getattr(zoo, name), shape=zoo.shape, name=name)
    assert not flagged(defense, zoo.images, zoo.labels)


def test_the_robust_network_is_robust_and_square_agrees(zoo):
    """Three times what plain training leaves; the attack without gradients takes no image that PGD's did not."""
    robust, base = (Deterministic(network, shape=zoo.shape) for network in (zoo.robust, zoo.base))
    strong = EOTAPGD(steps=30, losses=("margin", "margin-to"))
    left = accuracy(robust, strong, zoo.images, zoo.labels)
    assert left > 0.4 and left > 3 * accuracy(base, strong, zoo.images, zoo.labels)
    assert accuracy(robust, Square(queries=400), zoo.images, zoo.labels) >= left - 0.01


def test_the_jpeg_of_the_controls_is_a_dct_rounded(zoo):
    """Orthonormal; without rounding the image comes back, with it each block's coefficients are whole steps."""
    from scipy.fft import dct

    matrix = zoo.dct_matrix()
    assert np.allclose(matrix.numpy(), dct(np.eye(8), axis=0, norm="ortho"), atol=1e-6)
    grey = 0.4 + 0.2 * zoo.images  # far from where pixels are cut off
    again = zoo.jpeg(grey)
    assert 0.001 < float((again - grey).abs().mean()) < 0.05
    assert again.min() > 0 and again.max() < 1
    assert torch.allclose(zoo.jpeg(again), again, atol=1e-4)
