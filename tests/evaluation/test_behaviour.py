"""What the guard sees that accuracy on a few images would not, and what it must let pass."""

import contextlib
import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from rush_bench.datasets import Images, as_images
from rush_bench.defenses import Defense, Deterministic, Gradient, Prediction, Randomised, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation import behaviour
from rush_bench.evaluation.behaviour import IMAGES, OTHERS, Changed, check_behaviour, sample_of

SHAPE = (1, 4, 4)
LAST = torch.tensor([0.0, 0, 0, 0, 1])


class Reversed(torch.autograd.Function):
    """The same values; the gradient of the first rows of pixels points the other way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.cat([-gradient[..., :2, :], gradient[..., 2:, :]], -2)


class Coded(nn.Module):
    """A network whose code can be changed and whose weights, hence its key, stay."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    code = staticmethod(lambda net, x: net(x))

    def forward(self, x: Tensor) -> Tensor:
        return type(self).code(self.linear, x)


CODES = {
    "plain": lambda net, x: net(x),
    "noise in the last digit": lambda net, x: net(x) * (1 + 1e-5 * torch.sin(1000 * x.flatten(1).sum(1, keepdim=True))),
    "coarse pixels": lambda net, x: net((x * 15).round() / 15),
    "gradient reversed": lambda net, x: net(Reversed.apply(x)),
    "gradient lost": lambda net, x: net(x.detach()) + 0 * x.sum(),
    "logits x 1e-7": lambda net, x: net(x) * 1e-7,
    "logits x 1e-7, coarse": lambda net, x: net((x * 15).round() / 15) * 1e-7,
    "logits x 30": lambda net, x: net(x) * 30,
    "logits x 30, coarse": lambda net, x: net((x * 15).round() / 15) * 30,
    "last class masked": lambda net, x: net(x) - 1e4 * LAST,
    "fourth class masked": lambda net, x: net(x) - 1e4 * LAST.roll(-1),
    "noisy": lambda net, x: net(x + 0.02 * torch.randn_like(x)),
    "noise after": lambda net, x: net(1 - x) + 0.02 * torch.randn_like(net(x)),
    "noisier": lambda net, x: net(x + 0.06 * torch.randn_like(x)),
}


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ("plain", "plain", None),
        ("plain", "noise in the last digit", None),
        ("plain", "coarse pixels", "probabilities|gradients"),
        ("plain", "gradient reversed", "directions of gradients"),
        ("plain", "gradient lost", "gradients"),
        ("plain", "logits x 1e-7", "probabilities"),
        ("logits x 1e-7", "logits x 1e-7, coarse", "gradients"),
        ("plain", "logits x 30", "probabilities|gradients"),
        ("logits x 30", "logits x 30, coarse", "probabilities|gradients|scores of classes"),
    ],
)
def test_code_without_weights(linear, grey, tmp_path, monkeypatch, before, after, differs) -> None:
    monkeypatch.setattr(Coded, "code", staticmethod(CODES[before]))

    def make():
        return Deterministic(Coded(linear).eval(), shape=SHAPE, name="net")

    check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))
    monkeypatch.setattr(Coded, "code", staticmethod(CODES[after]))
    with pytest.raises(Changed, match=rf"({differs}) differ.*--out") if differs else contextlib.nullcontext():
        check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))


@pytest.mark.parametrize(
    ("after", "other_draws", "refused"), [("noisy", 0, 0), ("noisy", 1, 0), ("noisier", 0, 1), ("noise after", 1, 1)]
)
def test_one_that_draws_inside_its_network(linear, grey, tmp_path, monkeypatch, after, other_draws, refused) -> None:
    """Elsewhere its draws are others: `other_draws` stands for another device."""
    monkeypatch.setattr(Coded, "code", staticmethod(CODES["noisy"]))

    def make():
        return Randomised(Coded(linear).eval(), votes=8, shape=SHAPE, name="net")

    check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))
    monkeypatch.setattr(Coded, "code", staticmethod(CODES[after]))
    real = behaviour.Stream
    if other_draws:
        monkeypatch.setattr(behaviour, "Stream", lambda seed, *rest: real(seed + 1, *rest))
        monkeypatch.setattr(behaviour, "_where", lambda defense: "elsewhere")
    with pytest.raises(Changed) if refused else contextlib.nullcontext():
        check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))


def test_what_was_written_before_there_were_directions_is_still_compared(linear, grey, tmp_path, monkeypatch) -> None:

    def make():
        return Deterministic(Coded(linear).eval(), shape=SHAPE, name="net")

    check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))
    (path,) = (tmp_path / "behaviour").iterdir()
    said = json.loads(path.read_text())
    path.write_text(json.dumps({key: said[key] for key in ("defense", "probabilities", "gradient")}))
    check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))
    monkeypatch.setattr(Coded, "code", staticmethod(CODES["gradient lost"]))
    with pytest.raises(Changed, match="gradients"):
        check_behaviour(tmp_path, make(), grey.take(slice(0, 8)))


def without_the_last(grey: Images, linear: nn.Module) -> Images:
    """The eight images that are the least like the last class."""
    return grey.take(linear(grey.floats()).log_softmax(1)[:, 4].argsort()[:8])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("make", [Deterministic, Smoothed])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_class_that_no_image_is_of_is_missed_in_the_scores(linear, grey, tmp_path, monkeypatch, older, make, scale) -> None:
    with torch.no_grad():
        for each in linear.parameters():
            each.mul_(scale)
    noise = {"noise": "gaussian:0.02", "votes": 4} if make is Smoothed else {}

    def defense():
        return make(Coded(linear).eval(), shape=SHAPE, name="net", **noise)

    check_behaviour(tmp_path, defense(), without_the_last(grey, linear))
    if older:
        (path,) = (tmp_path / "behaviour").iterdir()
        said = json.loads(path.read_text())
        path.write_text(json.dumps({key: said[key] for key in ("defense", "probabilities", "gradient")}))
        check_behaviour(tmp_path, defense(), without_the_last(grey, linear))
    monkeypatch.setattr(Coded, "code", staticmethod(CODES["last class masked"]))
    with pytest.raises(Changed, match="scores of classes differ"):
        check_behaviour(tmp_path, defense(), without_the_last(grey, linear))


def test_a_mask_that_was_always_there_hides_nothing_and_is_no_change(linear, grey, tmp_path, monkeypatch) -> None:
    def met(code: str) -> None:
        monkeypatch.setattr(Coded, "code", staticmethod(lambda net, x: CODES[code](net, x) - 1e9 * LAST))
        check_behaviour(tmp_path, Deterministic(Coded(linear).eval(), shape=SHAPE, name="net"), without_the_last(grey, linear))

    met("plain")
    met("noise in the last digit")
    with pytest.raises(Changed):
        met("fourth class masked")


class Votes(Defense):
    """Of which no scores are known: one-hot probabilities."""

    name, classes, shape = "votes", 5, SHAPE

    def __init__(self, net: nn.Module, masked: bool) -> None:
        self.net, self.masked, self.passes = net, masked, Deterministic(net, shape=SHAPE).passes

    def predict(self, images, stream):
        labels = (self.net(images) - 1e4 * LAST * self.masked).argmax(1)
        votes = nn.functional.one_hot(labels, 5)
        return Prediction(labels, votes, votes.float())

    def gradient(self, images, labels, loss, draws, stream):
        return Gradient(torch.zeros_like(images), torch.zeros(len(images)))


def test_a_class_beyond_the_first_images_has_an_image_of_its_own(linear, grey, tmp_path) -> None:
    data = grey.take(torch.cat([torch.nonzero(grey.labels < 4)[:8, 0], torch.arange(40)]))
    check_behaviour(tmp_path, Votes(linear, masked=False), sample_of(data))
    check_behaviour(tmp_path, Votes(linear, masked=False), sample_of(data))
    with pytest.raises(Changed, match="probabilities differ"):
        check_behaviour(tmp_path, Votes(linear, masked=True), sample_of(data))


def test_a_folder_from_when_only_the_first_images_were_looked_at(linear, grey, tmp_path) -> None:
    data = grey.take(torch.cat([torch.nonzero(grey.labels < 4)[:8, 0], torch.arange(40)]))
    check_behaviour(tmp_path, Votes(linear, masked=False), data.take(slice(0, 8)))
    (older,) = (tmp_path / "behaviour").iterdir()
    written = older.read_text()
    check_behaviour(tmp_path, Votes(linear, masked=False), sample_of(data))
    assert older.read_text() == written and len(list((tmp_path / "behaviour").iterdir())) == 2
    with pytest.raises(Changed, match="probabilities differ"):
        check_behaviour(tmp_path, Votes(linear, masked=True), sample_of(data))


@pytest.mark.parametrize(
    ("labels", "positions"),
    [
        ([0, 1, 2, 0, 1, 2, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 1], [0, 1, 2, 3, 4, 5, 6, 7, 9, 11]),
        ([1, 0], [0, 1]),
    ],
)
def test_the_sample(labels, positions) -> None:
    data = as_images(torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), torch.tensor(labels))
    assert sample_of(data).index.tolist() == positions
    assert sample_of(sample_of(data)).digest == sample_of(data).digest


def test_of_many_classes_the_sample_has_some_spread_over_them() -> None:
    data = as_images(torch.zeros(300, 1, 4, 4, dtype=torch.uint8), torch.arange(300) % 100)
    others = sample_of(data).labels[IMAGES:].tolist()
    assert len(others) == OTHERS and min(others) < 12 and max(others) > 92
    assert max(second - first for first, second in itertools.pairwise(others)) <= 4


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"probabilities": 3, "gradient": []}'])
def test_a_damaged_one_is_named(linear, grey, tmp_path, content) -> None:
    defense = Deterministic(Coded(linear).eval(), shape=SHAPE, name="net")
    check_behaviour(tmp_path, defense, grey.take(slice(0, 8)))
    (path,) = (tmp_path / "behaviour").iterdir()
    path.write_text(content)
    with pytest.raises(BadInput, match=path.name):
        check_behaviour(tmp_path, defense, grey.take(slice(0, 8)))
