"""What the guard sees that accuracy on a few images would not, and what it must let pass."""

import contextlib
import json

import pytest
import torch
from torch import Tensor, nn

from rush_bench.defenses import Deterministic, Randomised
from rush_bench.errors import BadInput
from rush_bench.evaluation import behaviour
from rush_bench.evaluation.behaviour import Changed, check_behaviour

SHAPE = (1, 4, 4)


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
        ("logits x 30", "logits x 30, coarse", "probabilities|gradients"),
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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"probabilities": 3, "gradient": []}'])
def test_a_damaged_one_is_named(linear, grey, tmp_path, content) -> None:
    defense = Deterministic(Coded(linear).eval(), shape=SHAPE, name="net")
    check_behaviour(tmp_path, defense, grey.take(slice(0, 8)))
    (path,) = (tmp_path / "behaviour").iterdir()
    path.write_text(content)
    with pytest.raises(BadInput, match=path.name):
        check_behaviour(tmp_path, defense, grey.take(slice(0, 8)))
