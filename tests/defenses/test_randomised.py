"""Defences that draw at random themselves: exact gradients through their draws, keys, banks, refusals, and RoCL's row."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from torch import nn

from rush_bench.attacks.suites import parse_suite
from rush_bench.cli import main
from rush_bench.datasets import load_dataset
from rush_bench.datasets.views import VIEW_NUMBERS, SimCLRViews
from rush_bench.defenses import LOSSES, Deterministic, Randomised, RandomViews, Smoothed, as_module, load_defense, resolve
from rush_bench.defenses.randomised import transform_from
from rush_bench.errors import BadInput
from rush_bench.evaluation import attack
from rush_bench.networks import build
from rush_bench.noise import Stream, Uniform
from rush_bench.report.tables import table as table_of
from rush_bench.training import train

SHAPE = (1, 4, 4)
STREAM = Stream(0, "test")


@dataclasses.dataclass(frozen=True)
class Fade:
    """Each copy darker or brighter by its own factor, one number per image and draw."""

    least: float = 0.5

    def __call__(self, images, stream, draws):
        u = stream.uniform(len(images), draws, (1, 1, 1), images.device)
        return images[:, None] * (self.least + (1 - self.least) * u)


class Noisy(nn.Module):
    """Adds noise from torch's global generator, and remembers it."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        noise = 0.3 * torch.randn_like(x)
        self.seen.append(noise)
        return self.network(x + noise)


@pytest.fixture(scope="module")
def conv():
    return build({"name": "resnet", "blocks": [1], "width": 8, "classes": 5, "channels": 1, "size": 4}, seed=1).eval()


@pytest.fixture
def images():
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))


def expected_gradient(network, copies_of, images, labels, loss, average):
    """The loss of the averaged draws (k, B, ...) and its gradient, by autograd over all draws at once."""
    x = images.clone().requires_grad_()
    logits = torch.stack([network(copy) for copy in copies_of(x)])
    scores = logits.mean(0).log_softmax(1) if average == "logits" else logits.softmax(2).mean(0).log()
    value = LOSSES[loss](scores, labels)
    return torch.autograd.grad(value.sum(), x)[0], value.detach()


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("average", ["vote", "probability", "logits"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("rows", [10**6, 14, 3])
def test_gradient_through_a_transform_is_that_of_a_loop(conv, images, rows, loss, average):
    defense = Randomised(conv, transform=Fade(), votes=7, average=average, shape=SHAPE)
    defense.body.rows = rows
    labels = torch.arange(6) % 5
    found = defense.gradient(images, labels, loss, 7, STREAM)
    factors = 0.5 + 0.5 * STREAM.uniform(6, 7, (1, 1, 1))
    gradient, value = expected_gradient(conv, lambda x: [x * factors[:, j] for j in range(7)], images, labels, loss, average)
    assert torch.allclose(found.loss, value, rtol=1e-4, atol=1e-4)
    assert close(found.gradient, gradient)


@pytest.mark.parametrize("average", ["vote", "logits"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("rows", [10**6, 3])
def test_gradient_of_a_network_that_draws_is_that_of_the_noise_it_drew(conv, images, rows, loss, average):
    """Whichever way the draws are cut, the backward pass meets the noise of the forward pass."""
    network = Noisy(conv).eval()
    defense = Randomised(network, votes=7, average=average, shape=SHAPE)
    defense.body.rows, labels = rows, torch.arange(6) % 5
    calls = defense.body.network.seen
    calls.clear()
    found = defense.gradient(images, labels, loss, 7, STREAM)
    if rows == 3:  # one image a block, draws 3 + 3 + 1; twice where the slope of a draw depends on the others
        twice = loss == "margin" or average == "logits"
        assert len(calls) == 18 * (1 + twice)
        blocks = [calls[6 * i : 6 * i + 3] if twice else calls[3 * i : 3 * i + 3] for i in range(6)]
        if twice:
            assert all(torch.equal(a, b) for i in range(6) for a, b in zip(blocks[i], calls[6 * i + 3 :], strict=False))
        noise = torch.stack([torch.cat(block) for block in blocks])
    else:
        (noise,) = [call.unflatten(0, (6, 7)) for call in calls]
    assert len(noise.flatten().unique()) == noise.numel()  # every image and draw has noise of its own
    gradient, value = expected_gradient(conv, lambda x: [x + noise[:, j] for j in range(7)], images, labels, loss, average)
    assert torch.allclose(found.loss, value, rtol=1e-4, atol=1e-4)
    assert close(found.gradient, gradient)


def test_a_transforms_draws_depend_on_image_and_draw_alone(conv, images):
    defense = Randomised(conv, transform=Fade(), votes=9, shape=SHAPE)
    positions = torch.tensor([10, 3, 99, 7, 0, 5])
    whole = defense.predict(images, STREAM.at(positions))
    for rows in ([0], [4, 1], [5, 4, 3, 2, 1, 0]):
        part = defense.predict(images[rows], STREAM.at(positions[rows]))
        assert torch.allclose(part.probabilities, whole.probabilities[rows], atol=1e-6)
    defense.body.rows = defense.body.brisk = 2
    assert torch.allclose(defense.predict(images, STREAM.at(positions)).probabilities, whole.probabilities, atol=1e-6)
    other = defense.predict(images, STREAM.at(positions).skip(9))
    assert not torch.allclose(other.probabilities, whole.probabilities, atol=1e-3)


class Coin(nn.Module):
    """Class 0 if dropout keeps the image, else class 1: the share of votes is a binomial."""

    def __init__(self, dropped):
        super().__init__()
        self.dropout = nn.Dropout(dropped)

    def forward(self, x):
        kept = self.dropout(torch.ones(len(x), 1)) > 0
        return torch.where(kept, torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])) + 0 * x.sum((1, 2, 3))[:, None]


def test_dropout_at_test_votes_as_often_as_it_keeps_and_leaves_the_global_state(images):
    network = Coin(0.3)
    network.dropout.train()
    votes = 4000
    torch.manual_seed(5)
    before = torch.get_rng_state()
    defense = Randomised(network, votes=votes, shape=SHAPE)
    first, again = (defense.predict(images, STREAM) for _ in range(2))
    as_module(defense)(images)
    defense.gradient(images, torch.zeros(6, dtype=torch.int64), "ce", 8, STREAM)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.votes, again.votes)
    assert not torch.equal(first.votes, defense.predict(images, Stream(0, "another")).votes)
    low, high = stats.binom.interval(1 - 1e-6, votes, 0.7)
    assert ((first.votes[:, 0] >= low) & (first.votes[:, 0] <= high)).all()
    assert len(first.votes[:, 0].unique()) > 1  # images have draws of their own


@pytest.mark.parametrize("kind", ["transform", "network"])
@pytest.mark.parametrize("rows", [10**6, 3])
def test_a_bank_is_a_function_of_the_image_alone(conv, images, kind, rows):
    options = {"transform": Fade()} if kind == "transform" else {}
    defense = Randomised(conv if options else Noisy(conv).eval(), votes=4, shape=SHAPE, **options)
    defense.body.rows = rows
    bank = defense.bank(5, seed=3)
    assert bank.deterministic
    first = bank.predict(images, STREAM)
    again = bank.predict(images.flip(0), Stream(9, "other", torch.arange(50, 56)))
    alone = bank.predict(images[2:3], STREAM)
    assert torch.allclose(first.probabilities.flip(0), again.probabilities, atol=1e-6)
    assert torch.allclose(first.probabilities[2:3], alone.probabilities, atol=1e-6)
    assert (first.votes.sum(1) == 5).all()
    labels = torch.arange(6) % 5
    expected = bank.gradient(images, labels, "ce", 0, STREAM)
    x = images.clone().requires_grad_()
    scores = as_module(bank)(x)
    assert torch.allclose(scores.exp(), first.probabilities, atol=1e-5)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(scores, labels, reduction="sum"), x)
    assert close(gradient, expected.gradient)
    assert bank.identity() != defense.bank(5, seed=4).identity() != defense.identity()


def test_the_three_averages_choose_as_said():
    """Two draws for class 1 by a logit of 3, one for class 0 by 20: votes and probabilities say 1, logits say 0."""

    class Code(nn.Module):
        def forward(self, x):
            draw = x[:, 0, 0, 0]
            return torch.stack([torch.where(draw == 0, 20.0, 0.0), torch.where(draw == 0, 0.0, 3.0)], 1) + 0 * draw[:, None]

    def number(images, stream, draws):
        j = stream.first_draw + torch.arange(draws)
        return 0 * images[:, None] + j.view(1, -1, 1, 1, 1)

    image = torch.full((1, *SHAPE), 0.5)
    found = {
        how: Randomised(Code().eval(), transform=number, votes=3, average=how, shape=SHAPE).predict(image, STREAM)
        for how in ("vote", "probability", "logits")
    }
    assert {how: int(at.labels) for how, at in found.items()} == {"vote": 1, "probability": 1, "logits": 0}
    assert all(at.votes.tolist() == [[1, 2]] for at in found.values())
    mean = torch.tensor([20.0, 6.0]) / 3
    assert torch.allclose(found["logits"].probabilities[0], mean.softmax(0))
    # what another package's attack sees is what the defence decides by
    defense = Randomised(Code().eval(), transform=number, votes=3, average="logits", shape=SHAPE)
    assert torch.allclose(as_module(defense, STREAM)(image)[0], mean.log_softmax(0), atol=1e-5)


def test_the_base_is_the_network_without_its_randomness(conv, images):
    base = Randomised(conv, transform=Fade(), votes=3, shape=SHAPE).base()
    alone = Deterministic(conv, shape=SHAPE)
    assert torch.equal(base.predict(images, STREAM).probabilities, alone.predict(images, STREAM).probabilities)
    assert base.identity() == alone.identity()
    noisy = Randomised(Noisy(conv).eval(), votes=3, plain=conv, shape=SHAPE)
    assert noisy.base().identity() == noisy.bank(4, 0).base().identity() == alone.identity()
    with pytest.raises(BadInput, match="plain="):
        Randomised(Noisy(conv).eval(), votes=3, shape=SHAPE).base()


class Learned(nn.Module):
    """A transform with a weight."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images, stream, draws):
        return self.scale * Fade()(images, stream, draws)


def test_identity_follows_transform_votes_and_average(conv):
    def made(**options):
        return json.dumps(Randomised(conv, shape=SHAPE, **options).identity())

    one = made(transform=Fade(), votes=3)
    assert one == made(transform=Fade(), votes=3, name="another")
    others = [
        made(transform=Fade(0.4), votes=3),
        made(transform=Fade(), votes=4),
        made(transform=Fade(), votes=3, average="logits"),
        made(transform=RandomViews(), votes=3),
        json.dumps(Randomised(Noisy(conv).eval(), votes=3, shape=SHAPE).identity()),
        made(transform=Learned(1.0), votes=3),
        made(transform=Learned(2.0), votes=3),
    ]
    assert len({one, *others}) == 8


class Numpy(Noisy):
    def forward(self, x):
        return self.network(x) + float(np.random.default_rng().normal())  # a shift of logits, yet another number


class NumpyNoise(Noisy):
    def forward(self, x):
        return self.network(x + float(np.random.default_rng().normal()))


def careless(images, stream, draws):
    return images[:, None] * torch.rand(len(images), draws, 1, 1, 1)


@pytest.mark.strangers
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda net: Deterministic(Noisy(net).eval(), shape=SHAPE), r"draws at random.*Randomised\(network"),
        (lambda net: Smoothed(Noisy(net).eval(), noise=Uniform(0.1), shape=SHAPE), r"draws at random.*Randomised\(network"),
        (lambda net: Deterministic(Numpy(net).eval(), shape=SHAPE), "draws at random"),
        (lambda net: Randomised(Noisy(net).eval(), transform=Fade(), shape=SHAPE), "draws at random"),
        (lambda net: Randomised(net, shape=SHAPE), "draws nothing"),
        (lambda net: Randomised(NumpyNoise(net).eval(), shape=SHAPE), "elsewhere than torch's global generator"),
        (lambda net: Randomised(net, transform=careless, shape=SHAPE), "elsewhere than from its stream"),
        (lambda net: Randomised(net, transform=lambda x, s, k: x, shape=SHAPE), "must return copies"),
        (lambda net: Randomised(net, transform=lambda x, s: x, shape=SHAPE), r"\(images, stream, draws\), not \(x, s\)"),
        (lambda net: Randomised(net, transform=lambda x, s, k: Fade()(x, s, k).detach(), shape=SHAPE), "BPDA"),
        (lambda net: Randomised(net, transform=Fade(), votes=0, shape=SHAPE), "at least 1 vote"),
        (lambda net: Randomised(net, transform=Fade(), average="logit", shape=SHAPE), "did you mean 'logits'"),
        (lambda net: Randomised(nn.Sequential(nn.BatchNorm2d(1), net), shape=SHAPE), "BatchNorm is in train mode"),
    ],
)
def test_what_is_refused(conv, wrap, says):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(BadInput, match=says):
        wrap(conv.requires_grad_(False))
    assert torch.equal(torch.get_rng_state(), before)


NETS = """
import torch
from torch import nn
from rush_bench import Randomised

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 10)

    def forward(self, x):
        return self.linear((x * (torch.rand_like(x) < 0.9)).flatten(1))

def build():
    torch.manual_seed(0)
    return Net().eval()

def defense():
    return Randomised(build(), votes=4, shape=(1, 16, 16), name="mine@4")
"""


@pytest.mark.strangers
def test_the_command_line_names_the_fix_and_takes_it(tmp_path, monkeypatch):
    (tmp_path / "random_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = ["attack", "--suite", "linf25.5-quick", "--dataset", "digits", "--n", "10", "--out", "out", "--json"]
    refused = CliRunner().invoke(main, [*line, "--model", "random_nets:build"])
    assert refused.exit_code == 2 and "Randomised(network, votes=1, shape=(C, H, W))" in refused.stderr
    taken = CliRunner().invoke(main, [*line, "--model", "random_nets:defense", "--set", "eot.steps=2"])
    assert taken.exit_code == 0, taken.stderr
    assert {row["defense"] for row in json.loads(taken.stdout)["table"]} == {"mine@4"}


@pytest.mark.parametrize("channels", [1, 3])
def test_views_from_numbers_are_those_of_a_generator(channels):
    views = SimCLRViews(crop_floor=0.3)
    x = torch.rand(16, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = views(x, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    u = torch.cat([torch.rand(rows, 16, generator=generator) for rows in (VIEW_NUMBERS - 10, 9, 1)])
    assert torch.equal(views.view(x, u), expected)


def test_views_are_differentiable():
    """Finite differences in float64, pixel by pixel of what a sum of squares sees; away from the kinks of colour."""
    x = 0.3 + 0.4 * torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = torch.rand(VIEW_NUMBERS, 8, generator=torch.Generator().manual_seed(2))
    views = SimCLRViews(crop_floor=0.5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(views.view(x, u).square().sum(), x)
    step, flat = 1e-6, x.detach().flatten(1)
    for pixel in range(0, 48, 5):
        shift = step * nn.functional.one_hot(torch.tensor(pixel), 48)
        up, down = (views.view((flat + s * shift).view_as(x), u).square().flatten(1).sum(1) for s in (1, -1))
        assert torch.allclose((up - down) / (2 * step), gradient.flatten(1)[:, pixel], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small = ("size=8", "n_train=600", "network.name=resnet", "network.blocks=1", "network.width=8")
    longer = ("pretrain.epochs=1", "finetune.epochs=12", "finetune.lr=0.3")
    train("rocl", dataset="digits", preset="smoke", sets=(*small, *longer), store=folder)
    return folder


def test_rocl_averages_the_logits_of_random_views(store):
    card = json.loads((store / "rocl-digits" / "card.json").read_text())
    views = SimCLRViews(crop_floor=0.3, flip=0.0, gray_p=0.0)  # what it was pre-trained on
    assert transform_from(card["transform"]) == RandomViews(views)
    assert resolve(["rocl"], store) == ["rocl-digits"]
    assert resolve(["rocl@30"], store) == ["rocl-digits@30"]
    plain, smooth = load_defense("rocl-digits", store=store), load_defense("rocl@30", store=store)
    assert plain.deterministic and isinstance(smooth, Randomised) and smooth.averaging.geometric
    assert (smooth.name, smooth.draws) == ("rocl-digits@30", 30)
    data = load_dataset("digits", "test", 12, size=8)
    images = data.floats()
    u = STREAM.uniform(12, 30, (VIEW_NUMBERS,))
    with torch.no_grad():
        logits = torch.stack([plain.body.network(views.view(images, u[:, j].T)) for j in range(30)])
    assert torch.equal(smooth.predict(images, STREAM).labels, logits.mean(0).argmax(1))
    assert smooth.base().identity() == plain.identity()


def test_rocl_is_attacked_through_its_views(store, tmp_path):
    defenses = [load_defense(name, store=store) for name in ("rocl-digits", "rocl@6")]
    data = load_dataset("digits", "test", 20, size=8)
    suite = parse_suite("linf51-quick", only=("clean", "pgd", "apgd"), overrides={"apgd.steps": 5})
    run = attack(defenses, suite, data, out=tmp_path, quiet=True)
    assert run.complete
    rate = {(r.labels["defense"], r.labels["attack"]): r.frame["correct"].sum() / r.frame["repeats"].sum() for r in run.results}
    for name in ("rocl-digits", "rocl-digits@6"):
        assert rate[name, "pgd"] < rate[name, "clean"] - 0.15
    table = table_of(run.results)
    assert set(table["defense"]) == {"rocl-digits", "rocl-digits@6"}
