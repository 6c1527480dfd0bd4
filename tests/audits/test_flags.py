"""Flags: sound defences raise none, each defect raises its own, figures against values by hand."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from rush_bench.audits import flags as module
from rush_bench.audits.flags import flags
from rush_bench.defenses import Defense, Deterministic, Smoothed
from rush_bench.defenses.randomised import Randomised
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream, Uniform
from rush_bench.threats import Threat

SHAPE, STREAM, THREAT = (1, 4, 4), Stream(0, "flags"), Threat("linf", 0.025)


class Wrapped(nn.Module):
    """A network between a function of the images and one of the logits."""

    def __init__(self, network, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.network, self.before, self.after = network, before, after
        self.eval()

    def forward(self, x):
        return self.after(self.network(self.before(x)))


@pytest.fixture
def parts(linear, grey):
    """A milder linear network (the mean top probability is 0.9), so that float32 resolves every probability."""
    with torch.no_grad():
        linear.linear.weight /= 4
        linear.linear.bias /= 4
    return linear, grey.floats(), grey.labels


def only_flagged(findings):
    return {finding.check for finding in findings if finding.status not in ("pass", "not run")}


@pytest.mark.parametrize("randomised", [False, True])
def test_sound_defences_raise_no_flag(parts, randomised):
    network, images, labels = parts
    defense = (
        Smoothed(network, noise=Uniform(0.05), votes=8, shape=SHAPE) if randomised else Deterministic(network, shape=SHAPE)
    )
    q = np.linspace(0, 1, 40).round()
    found = {f.check: f for f in flags(defense, images, labels, THREAT, STREAM, white_box=q, square=q)}
    assert {f.status for f in found.values()} == {"pass"} and len(found) == 8
    assert found["randomised-output"].figure == 0
    assert found["loss-of-the-prediction"].figure < 1e-5
    assert found["probabilities-for-logits"].figure == 0


def test_a_declared_draw_is_no_flag_and_a_hidden_one_is(parts):
    network, images, labels = parts
    quiet = Wrapped(network)
    generator = torch.Generator().manual_seed(0)
    for defense in (Deterministic(quiet, shape=SHAPE), Smoothed(quiet, noise=Uniform(0.05), votes=4, shape=SHAPE)):
        assert module.hidden_randomness(defense, images, STREAM).status == "pass"
        # a network that draws already when it is given is refused at once: this one starts later
        defense.body.network.after = lambda z: z + 0.1 * torch.randn(z.shape, generator=generator)
        assert "randomised-output" in only_flagged(flags(defense, images, labels, THREAT, STREAM))


def test_the_figure_of_randomness_is_the_distance_of_normalised_outputs(parts):
    network, images, _ = parts
    logs = [(scale * network(images)).log_softmax(1).detach() for scale in (1, 1.5)]

    class Two(Defense):
        name, classes, shape, calls = "two", 5, SHAPE, 0

        def predict(self, images, stream):
            self.calls += 1
            inner = Deterministic(Wrapped(network, after=lambda z: z * (1 + 0.5 * (self.calls > 1))), shape=SHAPE)
            return inner.predict(images, stream)

    one, other = (each.double() / each.double().norm(dim=1, keepdim=True) for each in logs)
    expected = float((one - other).norm(dim=1).max())
    found = module.hidden_randomness(Two(), images, STREAM, calls=2)
    assert found.figure == pytest.approx(expected, rel=1e-3) and expected > 1e-2 and found.status == "flag"


def test_killed_gradients_are_flagged(parts):
    network, images, labels = parts
    defense = Deterministic(Wrapped(network, before=lambda x: (x * 255).round() / 255), shape=SHAPE)
    found = {f.check: f for f in flags(defense, images, labels, THREAT, STREAM)}
    assert found["zero-gradients"].figure == 1
    assert only_flagged(found.values()) == {"zero-gradients"}


def test_a_gradient_that_is_not_finite_is_none(parts):
    """Given or refused."""
    network, images, labels = parts

    class NotFinite(Deterministic):
        refused = False

        def gradient(self, *args):
            if self.refused:
                raise RushBenchError("the gradient of image 0 is not finite")
            found = super().gradient(*args)
            return dataclasses.replace(found, gradient=torch.full_like(found.gradient, torch.nan))

    defense = NotFinite(network, shape=SHAPE)
    for defense.refused in (False, True):
        assert module.zero_gradients(defense, images, labels, STREAM).status == "flag"
        assert "zero-gradients" in only_flagged(flags(defense, images, labels, THREAT, STREAM))


def test_a_softmax_that_saturates_is_no_missing_gradient(parts):
    network, images, labels = parts

    class Saturating(Deterministic):
        """CE as plain float32 has it; a network of ours keeps a small slope."""

        def gradient(self, images, labels, loss, draws, stream):
            found = super().gradient(images, labels, loss, draws, stream)
            p = self.predict(images, stream).probabilities.gather(1, labels[:, None])
            return dataclasses.replace(found, gradient=found.gradient * (p < 1)[..., None, None]) if loss == "ce" else found

    for kind in (Saturating, Deterministic):
        hot = kind(Wrapped(network, after=lambda z: 1000 * z), shape=SHAPE)
        gradient = hot.gradient(images, labels, "ce", 1, STREAM).gradient
        assert gradient.flatten(1).abs().amax(1).eq(0).any() == (kind is Saturating)
        assert not only_flagged(flags(hot, images, labels, THREAT, STREAM))


def test_a_softmax_over_probabilities_is_flagged(parts):
    """`Body` sees outputs that sum to 1; shifted by a constant they do not, and the softmax over them is the same."""
    network, images, labels = parts
    with torch.no_grad():
        network.linear.weight *= 50
        network.linear.bias *= 50
    flat = Deterministic(Wrapped(network, after=lambda z: z.softmax(1) + 1), shape=SHAPE)
    found = module.flat_probabilities(flat, images, STREAM)
    assert found.figure == 1 and found.status == "flag"

    class Mixed(Deterministic):
        """Predicts as it should, but hands attacks the gradient of the flat one."""

        def gradient(self, *args):
            return flat.gradient(*args)

    mixed = Mixed(network, shape=SHAPE)
    assert module.flat_probabilities(mixed, images, STREAM).status == "pass"
    found = module.loss_of_the_prediction(mixed, images, labels, STREAM)
    p = network(images).softmax(1).detach()
    expected = (p.softmax(1) - p).gather(1, labels[:, None]).abs().mean()
    assert found.figure == pytest.approx(float(expected), rel=1e-4) and found.status == "flag"


def test_square_against_the_white_box():
    white, square = np.ones(400), np.ones(400)
    square[:3] = 0
    found = module.square_beats_white_box(THREAT, white, square)
    assert found.figure == pytest.approx(3 / 400) and found.status == "pass"
    for broken, status in (
        (5, "pass"),
        (8, "pass"),
        (9, "flag"),
    ):  # Clopper-Pearson of 8 in 400 begins at 0.87 %, of 9 at 1.03 %
        square[:broken] = 0
        found = module.square_beats_white_box(THREAT, white, square)
        assert found.figure == pytest.approx(broken / 400) and found.status == status
        assert found.low == pytest.approx(stats.binomtest(broken, 400).proportion_ci(0.95, "exact").low)
    assert module.square_beats_white_box(THREAT, square, white).figure == 0  # the white box found more
    assert module.square_beats_white_box(THREAT, white, None).status == "not run"
    with pytest.raises(BadInput, match="same images"):
        module.square_beats_white_box(THREAT, white, square[:-1])


def test_noise_of_the_scores_is_no_drop():
    """Two estimates of the same q from 50 predictions: their minimum is lower by 0.04 on average, yet nothing dropped."""
    rng = np.random.default_rng(0)
    q = rng.uniform(0.2, 0.8, 500)
    white, square = (rng.binomial(50, q) / 50 for _ in range(2))
    assert np.mean(white - np.minimum(white, square)) > 0.03
    assert module.square_beats_white_box(THREAT, white, square, repeats=50).status == "pass"
    assert module.square_beats_white_box(THREAT, white, square).status == "flag"
    assert module.square_beats_white_box(THREAT, white, rng.binomial(50, q / 2) / 50, repeats=50).figure > 0.1


def test_optimising_at_inference_is_counted(parts):
    network, images, _ = parts

    class Purifier(nn.Module):
        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                z = x.clone().requires_grad_()
                for _ in range(3):
                    (slope,) = torch.autograd.grad((z - 0.5).square().sum(), z, create_graph=True)
                    z = z - 0.01 * slope
            return network(z)

    before = sys.getprofile()
    found = module.gradients_at_inference(Deterministic(Purifier().eval(), shape=SHAPE), images, STREAM)
    assert found.figure == 3 and found.status == "flag" and sys.getprofile() is before


def test_an_image_whose_output_depends_on_its_neighbours_is_flagged(parts):
    network, images, labels = parts
    dependent = Deterministic(Wrapped(network), shape=SHAPE)
    dependent.body.network.before = lambda x: x - 0.1 * (x.mean(0) - 0.5)  # refused where it does so already when it is given
    found = {f.check: f for f in flags(dependent, images, labels, THREAT, STREAM)}
    assert only_flagged(found.values()) == {"batch-dependence"}

    def output(x):
        scores = dependent.body.network(x).log_softmax(1)
        return scores / scores.norm(dim=1, keepdim=True)

    together = output(images)
    alone = [float((output(images[k : k + 1])[0] - together[k]).norm()) for k in range(4)]
    beside = [torch.cat([images[k : k + 1], 1 - images[:3]]) for k in range(4)]
    beside = [float((output(batch)[0] - together[k]).norm()) for k, batch in enumerate(beside)]
    assert found["batch-dependence"].figure == pytest.approx(max(alone + beside), rel=1e-3)


def test_noise_does_not_count_as_dependence_on_the_batch(parts):
    network, images, _ = parts
    defense = Smoothed(network, noise=Uniform(0.3), votes=3, shape=SHAPE)
    at = Stream(4, "elsewhere", torch.arange(40) + 7)
    assert module.batch_dependence(defense, images, at).figure < 1e-5


@pytest.mark.parametrize(("mean", "deviation", "name"), [(0.1307, 0.3081, "MNIST"), (0.0, 1 / 255, "0 to 255")])
@pytest.mark.parametrize("randomised", [False, True])
def test_normalisation_left_outside_is_flagged(parts, mean, deviation, name, randomised):
    """A network made for z = (x - mean) / deviation: fed with z it is as good as the sound one."""
    network, images, labels = parts
    outside = Wrapped(network, before=lambda z: z * deviation + mean)
    if randomised:
        defense = Smoothed(outside, noise=Uniform(1e-4), votes=3, shape=SHAPE)
    else:
        defense = Deterministic(outside, shape=SHAPE)
    found = module.other_pixel_range(defense, images, labels, STREAM)
    sound, fed = ((net(images).argmax(1) == labels).float().mean() for net in (network, outside))
    assert found.figure == pytest.approx(float(sound - fed), abs=0.03) and found.figure > 0.3
    assert found.status == "flag" and name in found.note


def test_colour_constants_shift_each_channel():
    """Red minus blue, seen through ImageNet's constants; those of one channel shift nothing there."""
    images = 0.4 + 0.2 * torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in module.CONSTANTS["ImageNet"])
    level = images.mean((2, 3))
    labels = (level[:, 0] > level[:, 2]).long()

    class Redder(nn.Module):
        def forward(self, z):
            x = z * deviation + mean
            gap = 100 * (x[:, 0] - x[:, 2]).mean((1, 2))
            return torch.stack([-gap, gap], 1)

    found = module.other_pixel_range(Deterministic(Redder().eval(), shape=(3, 4, 4)), images, labels, STREAM)
    # fed raw, red is 0.229 x + 0.485 and blue 0.225 x + 0.406: always redder
    assert found.figure == pytest.approx(float(1 - labels.float().mean()))
    assert found.status == "flag" and "1.000 with the constants of ImageNet" in found.note


def test_what_cannot_be_run_says_so(parts):
    network, images, labels = parts
    unkeyed = Randomised(Wrapped(network, after=lambda z: z + torch.rand(z.shape)), shape=SHAPE)
    found = module.batch_dependence(unkeyed, images, STREAM)
    assert found.status == "not run" and "inside the network" in found.note
    assert module.hidden_randomness(unkeyed, images, STREAM).status == "pass"  # seeded from the stream
    smoothed = Smoothed(network, noise=Uniform(0.05), votes=2, shape=SHAPE)
    assert module.other_pixel_range(smoothed.bank(4, 0), images, labels, STREAM).status == "pass"
    assert module.other_pixel_range(smoothed, images[:3], labels[:3], STREAM).status == "not run"


def test_a_network_that_is_defined_on_its_own_pixels_alone(parts):
    """x ** 0.9 is not finite below 0: fed shifted pixels it is worth nothing, and the check has an answer."""
    network, images, labels = parts
    root = Deterministic(Wrapped(network, before=lambda x: x**0.9), shape=SHAPE)
    found = module.other_pixel_range(root, images, labels, STREAM)
    assert found.status == "pass" and np.isfinite(found.figure)
