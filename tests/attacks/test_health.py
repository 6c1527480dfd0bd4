"""Gradient health: every kind of untrue gradient shows, whatever the scale of the logits; none of a sound network does."""

import pytest
import torch
from torch import Tensor, nn

from rush_bench.attacks.health import FEW, UNTRUE, drawn, health, no_gradient
from rush_bench.defenses import Defense, Deterministic, Randomised, Smoothed
from rush_bench.defenses.base import Gradient, Prediction
from rush_bench.defenses.losses import cross_entropy
from rush_bench.errors import BadInput
from rush_bench.noise import Stream
from rush_bench.threats import Threat

SHAPE = (1, 16, 16)
THREATS = [Threat("linf", 0.1), Threat("linf", 4 / 255), Threat("l2", 0.5)]


class Function(nn.Module):
    """A module of a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Backward(torch.autograd.Function):
    """`forward(x)`, with `backward(x, upstream)` for a gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.save_for_backward(x)
        ctx.way = backward
        return forward(x)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.way(ctx.saved_tensors[0], upstream), None, None


def layers(activation=nn.ReLU, pool=nn.AvgPool2d) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    norm.running_mean.normal_(0, 0.1)
    first, second = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 2, 1)
    return nn.Sequential(first, norm, activation(), pool(2), second, activation(), nn.Flatten(), nn.Linear(256, 10)).eval()


def behind(function) -> nn.Module:
    """The network fed a function of the image."""
    return nn.Sequential(Function(function), layers()).eval()


def backward(way, forward=torch.clone) -> nn.Module:
    return behind(lambda x: Backward.apply(x, forward, way))


def sure(function, shift: float = 0) -> nn.Module:
    """A function of linear logits that are as far apart as a trained network's, and lie elsewhere for other images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10), Function(lambda z: function(100 * z + shift))).eval()


def strokes() -> Tensor:
    """On black, in whole sixteenths: (8, 1, 16, 16)."""
    x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    return (16 * (2 * x - 1).clamp_min(0)).round() / 16


def logits(function, width: int = 8) -> nn.Module:
    """A function of logits that tell the images apart, each a class of its own."""
    linear, own = nn.Linear(256, width), strokes().flatten(1)[:width]
    with torch.no_grad():
        linear.weight.copy_(own)
        linear.bias.copy_(-own.square().sum(1) / 2)
    return nn.Sequential(nn.Flatten(), linear, Function(function)).eval()


def winner(z: Tensor, rest: float = 0.0) -> Tensor:
    """The largest logit alone."""
    return torch.where(z == z.amax(1, keepdim=True), z, rest)


def in_16_bits(network: nn.Module, kind: torch.dtype = torch.bfloat16) -> nn.Module:
    """The network in autocast, float32 outside."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", kind):
            return network(x).float()

    return Function(forward).eval()


def pooled_first(before=torch.clone) -> nn.Module:
    """A max-pool of the image itself, where equal pixels tie."""
    torch.manual_seed(0)
    return nn.Sequential(
        Function(before), nn.MaxPool2d(2), nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    ).eval()


SIGNS = 1 - 2 * (torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.25).float()
SCALES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).exp()


def on_grid(x: Tensor) -> Tensor:
    """Which images (B, 1, 1, 1) hold whole sixteenths, as clean ones do and attacked ones do not."""
    return (16 * x == (16 * x).round()).all(3, keepdim=True).all(2, keepdim=True).all(1, keepdim=True)


UNTRUTHS = {
    "wrong sign on a quarter of the pixels": lambda: backward(lambda x, g: g * SIGNS),
    "scaled by pixel": lambda: backward(lambda x, g: g * SCALES),
    "reversed": lambda: backward(lambda x, g: -g),
    "right at the image, reversed elsewhere": lambda: backward(lambda x, g: torch.where(on_grid(x), g, -g)),
    "straight through 8 bits": lambda: backward(lambda x, g: g, lambda x: (255 * x).round() / 255),
    "straight through 4 levels": lambda: backward(lambda x, g: g, lambda x: (3 * x).round() / 3),
    "a detached half": lambda: behind(lambda x: torch.cat([x[..., :8].detach(), x[..., 8:]], -1)),
    "a detached share": lambda: behind(lambda x: 0.6 * x + 0.4 * x.detach()),
    "shattered": lambda: behind(lambda x: x + 0.01 * torch.sin(1e3 * x)),
    "shattered finely": lambda: behind(lambda x: x + 1e-3 * torch.sin(1e5 * x)),
    "rounded": lambda: behind(lambda x: (255 * x).round() / 255 + 0 * x),
    "a saturated sigmoid": lambda: sure(lambda z: 10 * z.sigmoid()),
    "a saturated tanh": lambda: sure(lambda z: 20 * (z / 2).tanh() - 5),
    "log of a saturated sigmoid": lambda: sure(nn.functional.logsigmoid, 10),
    "exp": lambda: sure(lambda z: -(-z).exp()),
    "the winner alone": lambda: logits(winner),
    "the winner, others at -20": lambda: logits(lambda z: winner(z, -20.0)),
    "the winner alone of two": lambda: logits(lambda z: winner(z, -200.0), 2),
    "the winner alone, normalised": lambda: logits(lambda z: winner(z).log_softmax(1)),
    "what is far above 0": lambda: logits(lambda z: (z - 5).relu()),
    "16 bits, reversed": lambda: in_16_bits(backward(lambda x, g: -g)),
    "16 bits, the winner alone": lambda: in_16_bits(logits(winner)),
}
SOUND = {
    "relu": layers,
    "silu": lambda: layers(nn.SiLU),
    "max-pool": lambda: layers(nn.ReLU, nn.MaxPool2d),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval(),
    "tiny logits": lambda: nn.Sequential(layers(), Function(lambda z: 1e-7 * z)).eval(),
    "huge logits": lambda: nn.Sequential(layers(), Function(lambda z: 1e7 * z)).eval(),
    "max-pool of the image": pooled_first,
    "bfloat16 inside": lambda: in_16_bits(layers()),
    "float16 inside": lambda: in_16_bits(layers(), torch.float16),
    "classes masked by a constant": lambda: logits(lambda z: torch.cat([z[:, :3], torch.full_like(z[:, 3:], -50.0)], 1)),
    "the same, normalised": lambda: logits(lambda z: torch.cat([z[:, :3], torch.full_like(z[:, 3:], -50.0)], 1).log_softmax(1)),
    "classes masked by -1e9": lambda: logits(lambda z: z - 1e9 * (torch.arange(8) % 5 == 2)),
    "two classes, one of them 0": lambda: logits(lambda z: torch.cat([0 * z, z], 1), 1),
    "a sigmoid that is not saturated": lambda: nn.Sequential(layers(), Function(lambda z: 10 * z.sigmoid())).eval(),
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return strokes()


def of(defense: Defense, images: Tensor, threat: Threat = THREATS[0], looked: int = 4):
    labels = defense.predict(images, Stream(0, "label")).labels
    return health(defense, images, labels, threat, Stream(0, "health"), looked=looked)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", UNTRUTHS)
def test_untrue_gradients_show(name, threat, images):
    found = of(Deterministic(UNTRUTHS[name](), shape=SHAPE), images, threat, looked=2)
    assert found.untrue > FEW or bool(found.zero.all())


@pytest.mark.parametrize("name", UNTRUTHS)
def test_untrue_gradients_show_in_a_search_of_16_bits(name, images):
    found = of(Deterministic(UNTRUTHS[name](), shape=SHAPE, precision="bfloat16"), images, looked=2)
    assert found.untrue > FEW or bool(found.zero.all())


class Lifted(nn.Module):
    """ReLU of a sum and a number that is taken away again: 16 bits round away what they have in common."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(
            nn.functional.linear(x, torch.eye(64).to(x.dtype), torch.full((64,), self.by).to(x.dtype)) - self.by
        )


@pytest.mark.parametrize(
    ("by", "precision", "marked"),
    [(1.0, "float32", False), (1.0, "bfloat16", False), (64.0, "float32", False), (64.0, "bfloat16", True)],
)
def test_rounding_of_a_search_in_16_bits_counts_where_it_ruins_the_gradient(by, precision, marked, images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), Lifted(by), nn.Linear(64, 10)).eval()
    assert (of(Deterministic(network, shape=SHAPE, precision=precision), images).untrue > FEW) == marked


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", SOUND)
def test_sound_gradients_are_true(name, threat, images):
    defense = Deterministic(SOUND[name](), shape=SHAPE)
    found = of(defense, images, threat)
    assert found.error[:4].max() < UNTRUE and found.error[4:].isnan().all()
    assert found.untrue == 0 and not found.zero.any() and found.frozen[:4].max() == 0
    assert defense.passes.backwards == 0


def test_sure_probabilities_are_no_silent_classes(images):
    """Nearly one-hot: all but two are below what float32 holds."""
    network = nn.Sequential(logits(lambda z: 10 * z), nn.Softmax(1)).eval()
    assert of(Deterministic(network, shape=SHAPE, outputs="probabilities"), images).untrue == 0


def test_a_mask_is_frozen_in_front_of_a_max_pool_too(images):
    masked = pooled_first(lambda x: torch.where((x > 0) & (x < 1), x, x.detach()))
    assert of(Deterministic(masked, shape=SHAPE), images * (images > 0.6)).frozen[:4].min() > 0.05


def test_a_step_in_l2_is_short_for_a_pixel(images):
    """By eps / 4 over the root of their number: waves of the scores that l-inf's steps skip are followed in l2."""
    wavy = nn.Sequential(layers(nn.SiLU), Function(lambda z: z + torch.sin(100 * z) / 100)).eval()
    assert of(Deterministic(wavy, shape=SHAPE), images, Threat("l2", 0.05)).untrue == 0


def test_the_worst_point_of_the_path_counts(images):
    """True near the image, reversed where an attack of 4/255 goes."""

    def reversed_afar(x, g):
        afar = (16 * x - (16 * x).round()).abs().mean((1, 2, 3), keepdim=True) / 16 > 0.006
        return torch.where(afar, -g, g)

    defense = Deterministic(backward(reversed_afar), shape=SHAPE)
    assert of(defense, images, Threat("linf", 1 / 255)).untrue == 0
    found = of(defense, images, Threat("linf", 4 / 255))
    assert found.untrue == 1 and found.error[:4].min() > 1


def test_a_linear_network_is_exact_and_the_scale_of_logits_changes_nothing(images):
    label, stream = torch.zeros(8, dtype=torch.int64), Stream(0, "health")
    defenses = [Deterministic(SOUND[name](), shape=SHAPE) for name in ("linear", "relu", "tiny logits", "huge logits")]
    linear, plain, tiny, huge = (health(one, images, label, THREATS[0], stream).error[:4] for one in defenses)
    assert linear.max() < 1e-3
    assert torch.allclose(plain, tiny, atol=1e-3) and torch.allclose(plain, huge, atol=1e-3)


def dropout() -> nn.Module:
    network = nn.Sequential(nn.Dropout(0.2), layers())
    network[0].train()
    return network


KINDS = {
    "smoothed": lambda: Smoothed(layers(), noise="gaussian:0.25", votes=4, shape=SHAPE),
    "bank": lambda: Smoothed(layers(), noise="uniform:0.3", votes=4, shape=SHAPE).bank(8, 0),
    "draws inside the network": lambda: Randomised(dropout(), votes=4, shape=SHAPE),
    "probabilities": lambda: Deterministic(nn.Sequential(layers(), nn.Softmax(1)).eval(), shape=SHAPE, outputs="probabilities"),
    "bfloat16 inside": lambda: Deterministic(in_16_bits(nn.Sequential(layers(), nn.LogSoftmax(1))), shape=SHAPE),
    "bfloat16": lambda: Deterministic(layers(), shape=SHAPE, precision="bfloat16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_defence_is_measured_on_fixed_draws(kind, images):
    found = of(KINDS[kind](), images)
    assert found.untrue == 0 and not found.zero.any()


def test_smoothing_hides_no_wrong_sign(images):
    defense = Smoothed(UNTRUTHS["wrong sign on a quarter of the pixels"](), noise="gaussian:0.25", votes=4, shape=SHAPE)
    assert of(defense, images).untrue == 1


class Own(Defense):
    """A defence of somebody's own: CE alone, no network to look into. `factor` of its gradient."""

    name, classes, shape = "own", 10, SHAPE

    def __init__(self, factor: float) -> None:
        self.network, self.factor = layers().requires_grad_(False), factor

    def predict(self, images, stream):
        p = self.network(images).softmax(1)
        return Prediction(p.argmax(1), p.round().long(), p)

    def gradient(self, images, labels, loss, draws, stream):
        if loss not in ("ce", "margin"):
            raise BadInput("only ce")
        with torch.enable_grad():
            x = images.clone().requires_grad_()
            value = cross_entropy(self.network(x).log_softmax(1), labels)
            (g,) = torch.autograd.grad(value.sum(), x)
        return Gradient(self.factor * g, value.detach())


def test_ce_alone_may_vanish_on_a_sure_network(images):
    own = Own(1.0)
    own.network = nn.Sequential(layers(), Function(lambda z: 1e3 * z)).eval().requires_grad_(False)
    assert of(own, images).untrue == 0


@pytest.mark.parametrize("error", [BadInput, NotImplementedError, KeyError], ids=lambda error: error.__name__)
def test_a_loss_may_be_unknown_in_many_words(images, error, monkeypatch):
    gradient = Own.gradient

    def only_ce(self, x, labels, loss, draws, stream):
        if loss != "ce":
            raise error(loss)
        return gradient(self, x, labels, loss, draws, stream)

    monkeypatch.setattr(Own, "gradient", only_ce)
    assert of(Own(1.0), images).untrue == 0
    assert of(Own(-1.0), images).untrue == 1


def test_probabilities_that_float32_rounds_to_0_tell_nothing(images):
    """The gradient is exact, of log-probabilities that the prediction does not have."""
    own = Own(1.0)
    own.network = nn.Sequential(layers(), Function(lambda z: 1e3 * z)).eval().requires_grad_(False)
    found = of(own, images)
    assert found.untrue == 0 and bool(found.error[:4].isnan().any())


class Blurred(Deterministic):
    """Prepares the image in `predict` alone: the gradient is that of the network without it."""

    def predict(self, images, stream):
        return super().predict(nn.functional.avg_pool2d(images, 3, 1, 1), stream)


class BlurredDraws(Smoothed):
    def predict(self, images, stream):
        return super().predict(nn.functional.avg_pool2d(images, 3, 1, 1), stream)


@pytest.mark.parametrize(
    "make", [lambda n: Blurred(n, shape=SHAPE), lambda n: BlurredDraws(n, noise="uniform:0.1", votes=4, shape=SHAPE)]
)
def test_a_gradient_of_another_function_than_the_prediction_shows(images, make):
    assert of(make(layers()), images).untrue > FEW


def bounded(images: Tensor, f) -> nn.Module:
    """Trained by nobody: logits times 50, with `f` and a bound that the median winner reaches."""
    network = nn.Sequential(layers(), Function(lambda z: 50 * z)).eval()
    with torch.no_grad():
        bound = float(network(images).amax(1).median())
    return nn.Sequential(network, Function(lambda z: f(z, bound))).eval()


BOUNDED = {
    "clamp(max=)": (lambda z, bound: z.clamp(max=bound), True),
    "clamp both ways": (lambda z, bound: z.clamp(-bound, bound), True),
    "relative to the winner": (lambda z, bound: z - z.amax(1, keepdim=True), False),
    "log-softmax": (lambda z, bound: z.log_softmax(1), False),
    "sure log-softmax": (lambda z, bound: (20 * z).log_softmax(1), False),
    "a bound that no winner reaches": (lambda z, bound: z.clamp(max=10 * bound), False),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_winner_at_its_bound_shows(images, name):
    f, marked = BOUNDED[name]
    found = of(Deterministic(bounded(images, f), shape=SHAPE), images, looked=8)
    assert (found.untrue > FEW) == marked


def test_images_that_are_looked_at_are_drawn_by_image():
    stream = Stream(0, "health")
    order = drawn(stream.at(torch.arange(40)), 40)
    assert sorted(order.tolist()) == list(range(40)) and order[:8].tolist() != list(range(8))
    place = torch.arange(40).roll(7)
    assert torch.equal(place[drawn(stream.at(place), 40)], order)


def test_a_defence_of_ones_own_needs_no_targeted_loss(images):
    assert of(Own(1.0), images).untrue == 0
    assert of(Own(-1.0), images).untrue == 1
    assert bool(of(Own(0.0), images).zero.all())


def test_no_gradient_is_said_per_image_and_saturation_is_none(images):
    blind = Deterministic(behind(lambda x: torch.where(x.amax((1, 2, 3), True) > 0.9, x, (9 * x).round() / 9)), shape=SHAPE)
    dark = images * torch.tensor([1.0, 0.5] * 4)[:, None, None, None]
    labels = torch.zeros(8, dtype=torch.int64)
    assert no_gradient(blind, dark, labels, Stream(0, "x")).tolist() == [False, True] * 4
    huge = Deterministic(SOUND["huge logits"](), shape=SHAPE)
    right = huge.predict(images, Stream(0, "x")).labels
    assert huge.gradient(images, right, "ce", 1, Stream(0, "x")).gradient.abs().max() < 1e-10
    assert not no_gradient(huge, images, right, Stream(0, "x")).any()


def test_pixels_frozen_at_the_edge_of_the_box_are_counted(images):
    class Clamp(torch.autograd.Function):  # torch's own by its newest version: no gradient at the very edge
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(0, 1)

        @staticmethod
        def backward(ctx, upstream):
            (x,) = ctx.saved_tensors
            return upstream * ((x > 0) & (x < 1))

    found = of(Deterministic(behind(Clamp.apply), shape=SHAPE), images)
    edge = ((images == 0) | (images == 1)).flatten(1).double().mean(1)
    assert torch.equal(found.frozen[:4], edge[:4]) and found.untrue == 0
