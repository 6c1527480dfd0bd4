"""Whether what is attacked is what is judged; no probe depends on the scale of the logits."""

import numpy as np
import pytest
import torch
from torch import nn

from rush_bench.audits.flags import flags
from rush_bench.audits.indicators import indicators
from rush_bench.audits.scale import usual_scale
from rush_bench.audits.truth import depends_on_image, same_in_later_calls, same_under_gradients, true_gradient, truth
from rush_bench.defenses import Deterministic, Randomised, Smoothed
from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Stream
from rush_bench.threats import Threat

THREAT = Threat("linf", 0.1)


class Of(nn.Module):
    """The network of a function of the images, its logits times `factor`."""

    def __init__(self, network, before=lambda x: x, factor=1.0) -> None:
        super().__init__()
        self.network, self.before, self.factor = network, before, factor
        self.eval()

    def forward(self, x):
        return self.factor * self.network(self.before(x))


class _WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        signs = torch.rand(upstream.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.25
        return torch.where(signs, -upstream, upstream)


def stream(images):
    return Stream(0, "audit/truth", torch.arange(len(images)))


@pytest.mark.parametrize("name", ["base", "robust", "line"])
def test_what_is_sound_is_true_and_the_same(zoo, name) -> None:
    defense = Deterministic(getattr(zoo, name), shape=zoo.shape)
    found = truth(defense, zoo.images, zoo.labels, THREAT, stream(zoo.images), calls=20)
    assert [finding.status for finding in found] == ["pass"] * 5, found


def test_a_wrong_backward_pass_is_flagged_and_a_rounded_input_too(zoo) -> None:
    for before in (_WrongSign.apply, lambda x: (255 * x).round() / 255):
        defense = Deterministic(Of(zoo.base, before), shape=zoo.shape)
        assert true_gradient(defense, zoo.images, zoo.labels, THREAT, stream(zoo.images))[0].status == "flag"


def test_logits_of_the_winner_alone_are_flagged(zoo) -> None:
    class Alone(Of):
        def forward(self, x):
            z = super().forward(x)
            return torch.where(z == z.amax(1, keepdim=True), z, -20.0)

    found = true_gradient(Deterministic(Alone(zoo.base), shape=zoo.shape), zoo.images, zoo.labels, THREAT, stream(zoo.images))
    assert found[0].status == "flag" and "true-gradient" in found[0].check


def test_what_float32_cannot_tell_was_not_run(zoo) -> None:
    """A constant of a million is added to all logits: their differences are lost in rounding."""

    class Far(nn.Module):
        def forward(self, x):
            return 1e-4 * zoo.base(x) + 1e4

    found = true_gradient(Deterministic(Far().eval(), shape=zoo.shape), zoo.images, zoo.labels, THREAT, stream(zoo.images))
    assert [finding.status for finding in found] == ["not run"] and "rounding" in found[0].note


def test_depends_on_image(zoo, noisy) -> None:
    place = stream(zoo.images)
    for defense in (
        Deterministic(zoo.base, shape=zoo.shape),
        Deterministic(zoo.broken["temperature"], shape=zoo.shape),
        Deterministic(Of(zoo.base, factor=1e-7), shape=zoo.shape),
        Smoothed(noisy, noise=Gaussian(1.0), votes=4, shape=zoo.shape),
    ):
        assert depends_on_image(defense, zoo.images, place).status == "pass"
        # one image, and images that are all alike, are no reason to believe that it does not
        assert depends_on_image(defense, zoo.images[:1], place.at(torch.arange(1))).status == "pass"
        assert depends_on_image(defense, zoo.images[:1].expand(8, -1, -1, -1), place.at(torch.arange(8))).status == "pass"
    blind = Smoothed(Of(noisy, lambda x: x - x.round()), noise=Gaussian(1.0), votes=4, shape=zoo.shape)
    blind.body.network.before = lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    assert depends_on_image(blind, zoo.images, place).status == "flag"


@pytest.mark.parametrize("name", ["base", "quantised", "sigmoids"])
def test_nothing_depends_on_the_scale_of_the_logits(zoo, name) -> None:
    """All findings of a network and of the same one at 1e-7 and 1e7 times its logits."""
    network = zoo.base if name == "base" else zoo.broken[name]
    images, labels = zoo.images[:4], zoo.labels[:4]
    place = stream(images)

    def found(factor):
        defense = usual_scale(Deterministic(Of(network, factor=factor), shape=zoo.shape), images, place)
        each = flags(defense, images, labels, THREAT, place) + truth(defense, images, labels, THREAT, place, calls=10)
        each += indicators(defense, images, labels, THREAT, place, steps=6, neighbours=3)
        return {f.check: (f.status, -1.0 if f.figure is None else f.figure) for f in each}

    plain = found(1.0)
    for factor in (1e-7, 1e7):
        other = found(factor)
        assert {check: status for check, (status, _) in other.items()} == {check: s for check, (s, _) in plain.items()}
        assert np.allclose([figure for _, figure in other.values()], [figure for _, figure in plain.values()], atol=0.02)


class Moody(nn.Module):
    """Another answer where a gradient is asked for, or from some call on."""

    def __init__(self, network, late: int | None) -> None:
        super().__init__()
        self.network, self.late, self.calls = network, late, 0
        self.eval()

    def forward(self, x):
        self.calls += 1
        other = x.requires_grad if self.late is None else self.calls > self.late
        return self.network(x.flip(3) if other else x)


def past_the_door(defense, late: int | None):
    """The defence with a network that it would have been refused with."""
    defense.body.network = defense.body.search = Moody(defense.body.network, late)
    return defense


@pytest.mark.parametrize("votes", [0, 4])
def test_another_answer_under_gradients_or_in_later_calls_is_flagged(zoo, noisy, votes) -> None:
    images, labels, place = zoo.images, zoo.labels, stream(zoo.images)

    def made(late):
        if votes:
            return past_the_door(Smoothed(noisy, noise=Gaussian(1.0), votes=votes, shape=zoo.shape), late)
        return past_the_door(Deterministic(zoo.base, shape=zoo.shape), late)

    assert same_under_gradients(made(None), images, labels, place).status == "flag"
    assert same_in_later_calls(made(None), images, labels, place, calls=20).status == "pass"
    assert same_under_gradients(made(60), images, labels, place).status == "pass"
    assert same_in_later_calls(made(60), images, labels, place, calls=60).status == "flag"


@pytest.mark.strangers
def test_a_network_that_answers_otherwise_is_refused_where_it_shows_at_once(zoo) -> None:
    for late, says in ((None, "while gradients are recorded"), (10, "from call to call")):
        with pytest.raises(BadInput, match=says):
            Deterministic(Moody(zoo.base, late), shape=zoo.shape)


def test_randomised_defences_are_compared_on_the_same_draws(zoo, noisy) -> None:
    images, labels, place = zoo.images, zoo.labels, stream(zoo.images)
    dropping = nn.Sequential(nn.Dropout(0.1), zoo.base).eval()
    dropping[0].train()
    for defense in (
        Smoothed(noisy, noise=Gaussian(1.0), votes=4, shape=zoo.shape),
        Randomised(dropping, votes=3, shape=zoo.shape),
    ):
        assert same_under_gradients(defense, images, labels, place).status == "pass"
        assert same_in_later_calls(defense, images, labels, place, calls=10).status == "pass"
