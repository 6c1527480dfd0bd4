"""The binarization test: planted points are there, sound defences pass, an attack without gradients does not."""

import pytest
import torch
from torch import nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.control import RandomNoise
from rush_bench.audits import binarization as module
from rush_bench.audits.binarization import Binarization, binarization, boundary_point, fisher
from rush_bench.audits.finding import judged, within_chance
from rush_bench.datasets import load_dataset
from rush_bench.defenses import Defense, Deterministic, Randomised, Smoothed
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.noise import Gaussian, Stream, Uniform
from rush_bench.records.statistics import clopper_pearson
from rush_bench.threats import Threat

STREAM, THREATS = Stream(0, "binarization"), [Threat("linf", 0.1), Threat("l2", 1.0)]
FEW = Binarization(inner=60, draws=8, judging=64, points=10)
QUICK = EOTAPGD(steps=20, draws=8, losses=("margin",), select_draws=16)
SHAPE = (1, 16, 16)


class Quantised(nn.Module):
    """Pixels rounded to 33 levels before the network: no gradient passes."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x):
        return self.network((32 * x).round() / 32)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "test", 12).floats()


@pytest.fixture(scope="module")
def mlp():
    """256-48-10, trained on digits for a second."""
    data = load_dataset("digits", "train", 600)
    images, labels = data.floats(), data.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10))
    optimiser = torch.optim.Adam(network.parameters(), 0.005)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    assert (network(images).argmax(1) == labels).float().mean() > 0.95
    return network.eval()


def defended(network, randomised, votes=4, **options):
    if randomised:
        return Smoothed(network, noise=Uniform(0.2), votes=votes, shape=SHAPE, **options)
    return Deterministic(network, shape=SHAPE, **options)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_points_of_the_edge_lie_on_it(threat):
    images = torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(0))
    images[:25] = images[:25].round()  # corners of the box, of which half of the l-inf ball is cut off
    points = boundary_point(images, threat, STREAM)
    assert threat.size(points - images).tolist() == pytest.approx([threat.eps] * 50, rel=1e-4)
    assert (points >= 0).all() and (points <= 1).all()
    assert not torch.equal(points[0] - images[0], points[1] - images[1])


def test_fisher_by_hand():
    """Spread diag(2, 1/2) about (0, 0), the point at (2, 1): the direction is (1, 2)."""
    inside = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    assert fisher(inside, torch.tensor([2.0, 1.0])).tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5], rel=1e-5)
    shifted = fisher(inside + 7, torch.tensor([9.0, 8.0]))
    assert shifted.tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5], rel=1e-5)
    flat = fisher(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([0.0, 3.0]))  # no spread along the second axis
    assert flat.tolist() == pytest.approx([0, 1], abs=1e-4)


def fitted(defense, images, threat, settings=FEW):
    layer = module._Layer(module.last_weighted(defense, images[:1], STREAM))
    return module._fit(defense, layer, images, threat, STREAM, settings)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("randomised", [False, True])
def test_the_planted_point_is_adversarial_by_construction(mlp, digits, randomised, threat):
    binary, sound = fitted(defended(mlp, randomised), digits, threat)
    assert sound.float().mean() > 0.7
    planted, judge = boundary_point(digits, threat, STREAM.named("planted")), STREAM.named("judge")
    assert (binary.median_log_odds(planted, judge, FEW.judging)[sound] > 0).all()
    assert (binary.median_log_odds(digits, judge, FEW.judging)[sound] <= 0).all()
    inner = Threat(threat.norm, 0.95 * threat.eps)
    lost = [(binary.median_log_odds(inner.start(digits, Stream(k, "other")), judge, FEW.judging)[sound] > 0) for k in range(10)]
    assert torch.stack(lost).float().mean() < 0.1


def test_logits_of_the_new_layer_spread_as_those_of_the_network(mlp, digits):
    threat = THREATS[0]
    binary, _ = fitted(defended(mlp, False), digits, threat)
    for k in (0, 5):
        own = STREAM.at(torch.arange(60) + 60 * k).named("inner")
        inside = Threat("linf", 0.095).start(digits[k].expand(60, -1, -1, -1), own)
        points = torch.cat([boundary_point(digits, threat, STREAM.named("planted"))[k : k + 1], digits[k : k + 1], inside])
        logits = mlp(points)
        spread = (logits.max(1).values - logits.min(1).values).mean()
        odds = binary.median_log_odds(points, STREAM.at(torch.full((62,), k)), 1)
        assert float(odds.abs().max()) == pytest.approx(float(spread.detach()), rel=1e-4)
        assert odds[0] > 0 and (odds[1:] < 0).all()


@pytest.mark.parametrize("randomised", [False, True])
def test_gradients_of_a_linear_network_are_the_heads(digits, randomised):
    """Features are the pixels: the log-odds of class 1 are w.x - t, whatever the noise, and w is their gradient."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
    defense = defended(network, randomised, memory=2**20)  # small pieces: draws of one image apart
    assert not randomised or defense.body.rows < 2000
    binary, _ = fitted(defense, digits, Threat("linf", 0.1), Binarization(inner=300, draws=4, judging=16))
    weight, labels = binary.sampler.heads[:, :-1], torch.zeros(12, dtype=torch.int64)
    at = binary.gradient(digits, labels, "margin@logits", 5, STREAM)
    assert torch.allclose(at.gradient.flatten(1), weight, atol=1e-4 * float(weight.abs().max()))
    order = torch.tensor([7, 0, 11])  # heads follow the images' positions in the data set, not in the batch
    some = binary.gradient(digits[order], labels[:3], "margin@logits", 5, STREAM.at(order))
    assert torch.allclose(some.gradient, at.gradient[order], atol=1e-5)
    assert torch.allclose(some.loss, at.loss[order], atol=1e-3)
    if not randomised:
        odds = (digits.flatten(1) * weight).sum(1) - binary.sampler.heads[:, -1]
        assert torch.allclose(at.loss, odds, atol=1e-3)


def test_the_defence_itself_stays_as_it_was(mlp, digits):
    defense = defended(mlp, True)
    before = defense.predict(digits, STREAM).probabilities
    binarization(defense, digits, THREATS[0], STREAM, attack=QUICK, settings=FEW)
    assert torch.equal(before, defense.predict(digits, STREAM).probabilities)
    assert not any(module._forward_pre_hooks for module in mlp.modules())


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("randomised", [False, True])
def test_our_attack_passes_on_a_trained_network(mlp, digits, randomised, threat):
    found, hard = binarization(defended(mlp, randomised), digits, threat, STREAM, attack=QUICK, settings=FEW)
    assert (found.status, hard.status) == ("pass", "pass")
    assert found.figure == 1 and hard.figure < 0.5 and found.low < 0.95 < found.high
    assert found.threshold == 0.95 and found.check == "binarization" and hard.check == "binarization-random"


def test_one_vote_is_judged_by_most_of_its_draws(mlp, digits):
    found, _ = binarization(defended(mlp, True, votes=1), digits, THREATS[0], STREAM, attack=QUICK, settings=FEW)
    assert found.status == "pass"


def test_a_network_whose_rows_share_a_draw_has_its_images_one_by_one(mlp, digits):
    shared = Randomised(mlp, transform=lambda images: images * (0.9 + 0.2 * torch.rand(1)), votes=2, shape=SHAPE)
    assert shared.sampler.one_call_per_draw
    few = Binarization(inner=20, draws=2, judging=4, points=2)
    attack = EOTAPGD(steps=5, draws=2, select_draws=2)
    found, _ = binarization(shared, digits[:4], THREATS[0], STREAM, attack=attack, settings=few)
    assert found.status == "pass"


def test_our_networks_show_their_features(digits):
    network = build({"name": "tiny", "classes": 10, "channels": 1, "size": 16, "blocks": [1, 1], "width": 8}, seed=1).eval()
    defense = Smoothed(network, noise=Gaussian(0.05), votes=2, shape=SHAPE)
    linear = module.last_weighted(defense, digits[:1], STREAM)
    assert linear[True] is defense.body.network.head is not linear[False]  # the search network is a folded copy
    binary, _ = fitted(defense, digits[:2], THREATS[0], Binarization(inner=5, draws=2, judging=4))
    given = binary.features(digits[:2], STREAM, 1)
    noisy = digits[:2] + STREAM.noise(Gaussian(0.05), 2, 1, SHAPE, "cpu")[:, 0]
    assert torch.allclose(given[:, 0, :-1], network.encoder(noisy), atol=1e-5)


@pytest.mark.parametrize("side", [1, 2])
def test_a_convolution_for_a_head_is_replaced_too(mlp, digits, side):
    """A 1x1 convolution over features, or one over a map of 2x2; the gradients are there, or an input is rounded."""
    layers = [*list(mlp)[:-1], nn.Unflatten(1, (-1, side, side))]
    layers += [nn.Conv2d(list(mlp)[-1].in_features // side**2, 10, side), nn.Flatten()]
    network = nn.Sequential(*layers).eval()
    found, _ = binarization(defended(network, False), digits, THREATS[0], STREAM, attack=QUICK, settings=FEW)
    assert found.status == "pass" and found.figure == 1
    rounded, _ = binarization(defended(Quantised(network), False), digits, THREATS[0], STREAM, attack=QUICK, settings=FEW)
    assert rounded.status == "flag"


@pytest.mark.parametrize(("broken", "status"), [(32, "pass"), (30, "pass"), (28, "pass"), (27, "flag"), (16, "flag")])
def test_the_interval_decides(broken, status):
    low, high = clopper_pearson(broken, 32)
    found = judged("binarization", "w", broken / 32, ">=", 0.95, "s", low=low, high=high)
    assert within_chance(found).status == status
    assert ("within chance" in within_chance(found).note) == (broken / 32 < 0.95 and status == "pass")


@pytest.mark.parametrize("randomised", [False, True])
def test_an_attack_without_gradients_is_flagged(mlp, digits, randomised):
    """Pixels rounded to 33 levels: the points are there, the gradients are not. Of sound gradients, noise finds none."""
    defense = defended(Quantised(mlp), randomised)
    found, hard = binarization(defense, digits, THREATS[0], STREAM, attack=QUICK, settings=FEW)
    assert found.status == "flag" and found.figure <= 0.5 and hard.status == "pass"
    weak = binarization(defended(mlp, randomised), digits, THREATS[0], STREAM, attack=RandomNoise(points=3), settings=FEW)[0]
    assert weak.status == "flag" and weak.figure < 0.2


def test_a_test_that_luck_passes_is_not_run(mlp, digits):
    """With 3 inner points and the threshold right behind them, most random corners look like the planted one."""
    easy = Binarization(inner=3, closeness=0.0001, points=40)
    found, hard = binarization(defended(mlp, False), digits, THREATS[0], STREAM, attack=QUICK, settings=easy)
    assert found.status == hard.status == "not run" and hard.figure > 0.5 and "too easy" in found.note


def test_what_cannot_be_binarized_says_so(mlp, digits):

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(10, 256))

        def forward(self, x):
            return x.flatten(1) @ self.matrix.T

    bank = defended(mlp, True).bank(4, 0)
    for defense in (defended(Functional().eval(), False), bank, type("Own", (Defense,), {"name": "own"})()):
        (found,) = binarization(defense, digits, THREATS[0], STREAM)
        assert found.status == "not run" and found.note
    constant = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Linear(4, 10)).eval()
    with torch.no_grad():
        constant[1].weight.zero_()
    (found,) = binarization(defended(constant, False), digits, THREATS[0], STREAM, settings=FEW)
    assert found.status == "not run" and "12 of 12 images left out" in found.note
    binary, _ = fitted(defended(mlp, False), digits[:2], THREATS[0])
    with pytest.raises(BadInput, match="keeps the stream"):
        binary.as_module(STREAM)
    with pytest.raises(BadInput, match="white-box"):
        binary.base()
