"""Other people's networks: what is a function of one image works as it was written, and comes back as it was given."""

import copy
import random
import re
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rush_bench.defenses import Defense, Deterministic, Gradient, Prediction, Randomised, Smoothed, as_module
from rush_bench.defenses.owner import structure, weights_digest
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream, Uniform

pytestmark = pytest.mark.strangers

SHAPE = (3, 8, 8)
STREAM = Stream(0, "test")


class Conv(nn.Module):
    """What the others are made of; `inside` may be another way to the same logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6 * 64, 5)

    def features(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


class View(Conv):
    def forward(self, x):
        return self.fc(self.features(x).view(-1, 6 * 64))


class ImageView(Conv):
    def forward(self, x):
        return self.fc(self.features(x.view(x.size(0), -1).view(x.size(0), 3, 8, 8)).flatten(1))


class InPlace(Conv):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


class Cached(Conv):
    """Keeps what it made in its first forward pass, for each batch size another, and its last features."""

    def __init__(self):
        super().__init__()
        self.weight, self.sizes = None, {}

    def forward(self, x):
        if self.weight is None:
            self.weight = torch.hann_window(x.shape[-1], periodic=False) + 0.1
        if len(x) not in self.sizes:
            self.sizes[len(x)] = torch.full((len(x), 1, 1, 1), 0.7)
        self.last = self.features(x * self.weight * self.sizes[len(x)])
        return self.fc(self.last.flatten(1))


class Buffers(Conv):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Squeezed(Conv):
    def forward(self, x):
        return super().forward(x).squeeze()


class HuggingFace(Conv):
    def forward(self, pixel_values, labels=None):
        return SimpleNamespace(logits=super().forward(pixel_values), hidden_states=None)


class Seeds(Conv):
    """A fixed mask, made by seeding the global generator at every call."""

    def forward(self, x):
        torch.manual_seed(3)
        return super().forward(x * (torch.rand(x.shape[1:]) + 0.5))


class Edges(Conv):
    """Neither its values nor its slopes are finite at 0."""

    def forward(self, x):
        return super().forward(x.log())


class Locked(Conv):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Hooked(Conv):
    """Reads its features from where a hook put them, a function of this object and not of a copy."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.norm.register_forward_hook(lambda module, inputs, output: self.kept.update(normed=output))

    def forward(self, x):
        super().forward(x)
        return self.fc(F.relu(self.kept["normed"]).flatten(1))


def hooked_and_used():
    net = Hooked().eval()
    net(torch.rand(7, *SHAPE))
    return net


class Quantised(Conv):
    """Steps inside, which rounding may take either way."""

    def features(self, x):
        return (super().features(x) * 16).round() / 16 + 0 * x.sum()


class Pooled(nn.Module):
    """Logits far from 0 whose differences are small, beside them a wide range of brightness."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(x.mean((2, 3))) + 1000


def double():
    return Conv().double()


def compiled():
    return torch.compile(Conv(), backend="eager")


def spectral():
    net = Conv()
    net.fc = (
        nn.utils.weight_norm(net.fc)
        if not hasattr(nn.utils, "parametrizations")
        else nn.utils.parametrizations.weight_norm(net.fc)
    )
    return net


def exported(batch=None):
    """A graph of torch.export, whose eval() is not supported."""
    sizes = None if batch is None else (batch,)
    return torch.export.export(Conv().eval(), (torch.rand(4, *SHAPE),), dynamic_shapes=sizes).module()


WORK = {
    "view": View,
    "view of the image": ImageView,
    "in place": InPlace,
    "cached": Cached,
    "buffers": Buffers,
    "squeeze": Squeezed,
    "logits attribute": HuggingFace,
    "seeds": Seeds,
    "edges": Edges,
    "cannot be copied": Locked,
    "hooked": Hooked,
    "hooked and used": hooked_and_used,
    "quantised": Quantised,
    "offset": Pooled,
    "float64": double,
    "compiled": compiled,
    "weight norm": spectral,
    "DataParallel": lambda: nn.DataParallel(Conv()),
    "script": lambda: torch.jit.script(Conv().eval()),
    "traced": lambda: torch.jit.trace(Conv().eval(), torch.rand(2, *SHAPE)),
    "exported": lambda: exported({0: torch.export.Dim.AUTO}),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(Conv().eval())),
    "channels_last": lambda: Conv().to(memory_format=torch.channels_last),
}


def state_of(network):
    """Everything about a network that its owner can see, as plain values."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return (
        {key: (t.dtype, t.stride(), t.requires_grad, t.detach().clone().tolist()) for key, t in tensors.items()},
        [getattr(part, "training", None) for part in network.modules()],
        [sorted(vars(part)) for part in network.modules()],
    )


def generators():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("wrap", ["deterministic", "smoothed"])
@pytest.mark.parametrize("kind", WORK)
def test_a_function_of_the_image_works_and_its_owners_object_is_as_it_was(kind, wrap):
    network = WORK[kind]()
    network = network if kind in ("frozen", "exported") else network.eval()
    before, states = state_of(network), generators()
    if wrap == "smoothed":
        defense = Smoothed(network, noise=Uniform(0.02), votes=3, shape=SHAPE)
    else:
        defense = Deterministic(network, shape=SHAPE)
    images = 0.1 + 0.8 * torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))
    given, labels = images.clone(), torch.arange(6) % 5
    for rows in (6, 1, 4):
        prediction = defense.predict(images[:rows], STREAM)
        found = defense.gradient(images[:rows], labels[:rows], "ce", 3, STREAM)
        as_module(defense, STREAM)(images[:rows].clone().requires_grad_()).sum().backward()
    assert torch.equal(images, given)
    assert state_of(network) == before and generators() == states
    # the same as the network itself gives, and its gradient as differences have it
    noise = STREAM.noise(Uniform(0.02), 4, 3, SHAPE, "cpu") if wrap == "smoothed" else torch.zeros(4, 1, *SHAPE)
    kind_of = torch.float64 if kind == "float64" else torch.float32

    def loss(x):
        with torch.no_grad():
            out = copy_of(network)((x[:, None] + noise).flatten(0, 1).to(kind_of))
        out = getattr(out, "logits", out).float().softmax(1).unflatten(0, noise.shape[:2]).mean(1)
        return out, -out.log().gather(1, labels[:4, None]).sum().double()

    mean, _ = loss(images[:4])
    assert torch.allclose(prediction.probabilities, mean, atol=1e-5)
    if kind not in ("quantised",):
        direction = found.gradient.sign()
        slope = (loss(images[:4] + 2e-3 * direction)[1] - loss(images[:4] - 2e-3 * direction)[1]) / 4e-3
        assert float(slope) == pytest.approx(float(found.gradient.abs().sum()), rel=0.05)


def copy_of(network):
    """The network for a reference: one that cannot be copied is taken as it is."""
    try:
        return network if isinstance(network, Hooked) else copy.deepcopy(network)
    except Exception:
        return network


class LessMean(Conv):
    share = 1.0

    def forward(self, x):
        z = super().forward(x)
        return z - self.share * z.mean(0)


class LessSomeMean(LessMean):
    share = 0.01


class MeanOfFeatures(Conv):
    def features(self, x):
        h = super().features(x)
        return h - 0.05 * h.mean((0, 2, 3), keepdim=True)


class BySize(Conv):
    def forward(self, x):
        return super().forward(x) * (1 if len(x) < 40 else -1)


class ByPlace(Conv):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.arange(len(x))[:, None] * torch.arange(5)


class FirstRules(Conv):
    def forward(self, x):
        return super().forward(x * (0.5 + x[:1].mean()))


class Normed(Conv):
    """BatchNorm that kept no statistics: those of the batch, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)


class Counts(Conv):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 if self.calls < 14 else -1)


SLOW = ("buffer", "data", "number", "list", "object", "gradient")


class SlowMean(Conv):
    """Takes a running mean off the images that moves by 1e-6 of the way at each call: no short look sees it move."""

    def __init__(self, kind="buffer"):
        super().__init__()
        self.register_buffer("running", torch.tensor(0.5))
        self.kind, self.number, self.listed, self.object = kind, 0.5, [torch.tensor(0.5)], SimpleNamespace(mean=0.5)

    def forward(self, x):
        mean = x.detach().mean()
        if self.kind == "buffer" or (self.kind == "gradient" and x.requires_grad):
            self.running += 1e-6 * (mean - self.running)
        elif self.kind == "data":
            self.running.data += 1e-6 * (mean - self.running)
        elif self.kind == "number":
            self.number += 1e-6 * (float(mean) - self.number)
        elif self.kind == "object":
            self.object.mean += 1e-6 * (float(mean) - self.object.mean)
        elif self.kind == "list":
            self.listed[0] = self.listed[0] + 1e-6 * (mean - self.listed[0])
        return super().forward(x - self.running - self.number - self.listed[0] - self.object.mean)


class Remembers(Conv):
    """Keeps what changes no answer: its calls, its last features and a copy of the images."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept = 0, []
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        self.calls, self.kept = self.calls + 1, [x.detach().clone()]
        self.seen += len(x)
        return super().forward(x)


class Modes(Conv):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_grad_enabled() else 1)


class Asks(Conv):
    def forward(self, x):
        return super().forward(x) * (2 if x.requires_grad else 1)


class Tuple(Conv):
    def forward(self, x):
        return super().forward(x), None


class Dict(Conv):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Maps(Conv):
    def forward(self, x):
        return super().forward(x)[:, :, None, None]


class Squashed(Conv):
    """Probabilities of every class for itself, or tanh; steep, as a trained network's are."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        z = super().forward(x)
        return self.function(500 * (z - z.mean(1, keepdim=True)))


class OneLogit(Conv):
    def forward(self, x):
        return super().forward(x)[:, :1]


class OneNumber(Conv):
    def forward(self, x):
        return super().forward(x)[:, 0]


class AloneFails(Conv):
    def forward(self, x):
        return super().forward(x.squeeze())


class TwoInputs(Conv):
    def forward(self, x, y):
        return super().forward(x)


class FirstBatch(Conv):
    """Centred by the mean of the first batch that it sees."""

    mean = None

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean().detach()
        return super().forward(x - self.mean)


class FirstMask(Conv):
    """A mask that is drawn at the first call, and kept."""

    mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = (torch.rand(x.shape[1:]) < 0.7).float()
        return super().forward(x * self.mask)


class NoGrad(Conv):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (LessMean, "other images of its batch"),
        (LessSomeMean, "other images of its batch"),
        (MeanOfFeatures, "other images of its batch"),
        (BySize, "on their number"),
        (ByPlace, "its place among them"),
        (FirstRules, "other images of its batch"),
        (Normed, "other images of its batch"),
        (Counts, "from call to call"),
        *((partial(SlowMean, kind), "from call to call") for kind in SLOW),
        (Modes, "while gradients are recorded"),
        (Asks, "while gradients are recorded"),
        (Tuple, r"not a tuple.*self.network\(x\)\[0\]"),
        (Dict, r"not a dict.*\['logits'\]"),
        (Maps, r"\(5, 5, 1, 1\); end its forward in .flatten\(1\)"),
        (partial(Squashed, torch.sigmoid), "return what goes into the sigmoid"),
        (partial(Squashed, torch.tanh), "return what goes into the tanh"),
        (OneLogit, r"torch.cat\(\[torch.zeros_like\(z\), z\], 1\)"),
        (OneNumber, r"torch.cat\(\[torch.zeros_like\(z\), z\], 1\)"),
        (AloneFails, r"batch of 1.*squeeze\(1\)"),
        (FirstBatch, "first call decides what it computes.*call it once"),
        (FirstMask, "first call decides what it computes.*call it once"),
        (TwoInputs, "does not take images of shape .*TypeError"),
        (NoGrad, "no gradient reaches the images"),
        (lambda: Conv().half(), r"16 bits.*network.float\(\)"),
        (lambda: Conv().bfloat16(), r"16 bits.*network.float\(\)"),
        (lambda: nn.LazyLinear(5), "run it once"),
    ],
)
def test_what_is_refused_says_the_way_out(network, says):
    with pytest.raises(BadInput, match=says) as error:
        Deterministic(network().eval(), shape=SHAPE)
    assert "\n" not in str(error.value).split(": ")[0]


def test_a_network_that_fails_on_the_default_shape_is_told_to_name_its_own():
    way_out = "; name the shape of your images: shape=images.shape (default (3, 32, 32))"
    with pytest.raises(BadInput, match="does not take images of shape") as error:
        Deterministic(Conv().eval())
    assert str(error.value).endswith(way_out)
    with pytest.raises(BadInput, match="does not take images of shape") as error:
        Deterministic(Conv().eval(), shape=(1, 8, 8))
    assert way_out not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outputs": "probability"}, "did you mean 'probabilities'"),
        ({"outputs": None}, "no outputs named 'None'"),
        ({"precision": "float16"}, "no precision named 'float16'"),
        *(({"shape": shape}, "channels, height, width") for shape in (None, (8, 8), (3, 8, 0), (3, 8.0, 8), (1, 3, 8, 8))),
    ],
)
def test_an_option_that_means_nothing_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        Deterministic(nn.Sequential(Conv(), nn.Softmax(1)).eval(), **{"shape": SHAPE, **options})


def test_a_graph_of_one_batch_size_is_told_how_to_be_exported():
    with pytest.raises(BadInput, match=r"export it with dynamic_shapes=\({0"):
        Deterministic(exported(), shape=SHAPE)
    with pytest.raises(BadInput, match="in train mode"):
        Deterministic(nn.Sequential(exported({0: torch.export.Dim.AUTO}), nn.Dropout()), shape=SHAPE)


def test_a_network_may_remember_what_changes_no_answer():
    network = Remembers().eval()
    images = torch.rand(3, *SHAPE)
    defense = Deterministic(network, shape=SHAPE)
    assert torch.equal(defense.predict(images, STREAM).labels, network(images).argmax(1))


def test_a_defence_is_made_of_a_network():
    for given in (lambda x: x, Deterministic(Conv().eval(), shape=SHAPE), None):
        with pytest.raises(BadInput, match=r"an nn\.Module, not of"):
            Deterministic(given, shape=SHAPE)


class Norms(nn.Module):
    """Exactly the inner network; the gradient is NaN where all pixels are below a half."""

    def __init__(self):
        super().__init__()
        self.net = Conv()

    def forward(self, x):
        above = (F.relu(x - 0.5) + 0 * x).flatten(1)
        return self.net(x) + 0 * above.pow(2).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("loss", ["ce", "margin", "ce@logits"])
@pytest.mark.parametrize(
    "wrap", [lambda n: Deterministic(n, shape=SHAPE), lambda n: Smoothed(n, noise="uniform:0.1", shape=SHAPE)]
)
def test_a_gradient_that_is_not_finite_names_the_image(wrap, loss):
    defense, labels = wrap(Norms().eval()), torch.arange(4)
    images = 0.5 + 0.4 * torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(2))
    stream = STREAM.at(torch.tensor([40, 41, 17, 43]))
    assert defense.gradient(images, labels, loss, 2, stream).gradient.isfinite().all()
    images[2] = 0.2
    with pytest.raises(RushBenchError, match="gradient of image 17 is not finite"):
        defense.gradient(images, labels, loss, 2, stream)
    with pytest.raises(RushBenchError, match="gradient of image 2 of the batch is not finite"):
        as_module(defense, STREAM)(images.requires_grad_()).sum().backward()
    defense.predict(images.detach(), stream)  # the function itself is fine


def test_a_defence_of_ones_own_is_checked_too():
    class Own(Smoothed):
        def gradient(self, images, labels, loss, draws, stream):
            found = super().gradient(images, labels, loss, draws, stream)
            found.gradient[1, 0] = torch.nan
            return found

        def predict(self, images, stream):
            found = super().predict(images, stream)
            found.probabilities[3] = torch.inf
            return found

    defense, images = Own(Conv().eval(), noise="uniform:0.1", shape=SHAPE), torch.rand(4, *SHAPE)
    with pytest.raises(RushBenchError, match="gradient of image 8 is"):
        defense.gradient(images, torch.zeros(4, dtype=torch.int64), "ce", 2, STREAM.at(torch.arange(7, 11)))
    with pytest.raises(RushBenchError, match="prediction of image 10 is"):
        defense.predict(images, STREAM.at(torch.arange(7, 11)))


@pytest.mark.parametrize("kind", [FirstBatch, FirstMask])
def test_what_a_first_call_decides_is_the_owners_to_decide(kind):
    network, images = kind().eval(), torch.rand(6, *SHAPE)
    expected = network(images)
    assert torch.equal(Deterministic(network, shape=SHAPE).predict(images, STREAM).labels, expected.argmax(1))


def own(parts=None, votes=lambda labels: labels[:, None] == torch.arange(5)):
    """A defence of somebody's own, whose gradient has these parts and whose prediction these votes."""
    parts = parts or (lambda images: (torch.zeros_like(images), torch.zeros(len(images))))

    class Own(Defense):
        name, classes, shape = "own", 5, SHAPE

        def predict(self, images, stream):
            p = images.flatten(1)[:, :5].softmax(1)
            return Prediction(p.argmax(1), votes(p.argmax(1)), p)

        def gradient(self, images, labels, loss, draws, stream):
            return Gradient(*parts(images))

    return Own()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (lambda x: (x[:1], torch.zeros(4)), r"returned gradient float32 \(1, .*must return a Gradient"),
        (lambda x: (x.flatten(1), torch.zeros(4)), "returned gradient float32"),
        (lambda x: (x.double(), torch.zeros(4)), "returned gradient float64"),
        (lambda x: (x, torch.tensor(0.5)), r"returned loss float32 \(\);"),
        (lambda x: (x, 0.5), "returned loss float;"),
    ],
)
def test_parts_of_a_gradient_of_another_shape_or_type_are_named(parts, says):
    images = torch.rand(4, *SHAPE)
    with pytest.raises(RushBenchError, match=says):
        own(parts).gradient(images, torch.zeros(4, dtype=torch.int64), "ce", 1, STREAM)


@pytest.mark.parametrize("votes", [lambda y: -torch.ones(len(y), 5), lambda y: torch.full((len(y), 5), torch.nan)])
def test_votes_that_are_no_counts_are_refused(votes):
    with pytest.raises(RushBenchError, match="votes that are negative or no numbers"):
        own(votes=votes).predict(torch.rand(4, *SHAPE), STREAM)


def test_what_a_defence_lacks_is_named():
    class Bare(Defense):
        name, classes, shape = "bare", 5, SHAPE

    images = torch.rand(2, *SHAPE)
    with pytest.raises(NotImplementedError, match="Bare has no predict"):
        Bare().predict(images, STREAM)
    with pytest.raises(NotImplementedError, match=r"Bare has no gradient.*square needs none"):
        Bare().gradient(images, torch.zeros(2, dtype=torch.int64), "ce", 1, STREAM)


def test_a_prediction_has_no_gradient_of_its_own():
    """An attack's x' is scored as numbers; a `predict` without torch.no_grad() is as good as one with it."""
    images = torch.rand(4, *SHAPE).requires_grad_()
    found = own().predict(images, STREAM)
    assert not found.probabilities.requires_grad and found.scores is None


@pytest.mark.parametrize("draws", [0, 3])
def test_votes_that_nobody_counted_are_the_labels(draws):
    defense = own(votes=lambda y: torch.zeros(len(y), 5, dtype=torch.int64))
    defense.draws = draws
    found = defense.predict(torch.rand(4, *SHAPE), STREAM)
    assert torch.equal(found.votes, max(draws, 1) * nn.functional.one_hot(found.labels, 5))
    assert (defense.passes.forwards, defense.passes.backwards) == (0, 0)


@pytest.mark.parametrize("votes", [0, -1, 1.5, True, "4", None, 10**9])
@pytest.mark.parametrize("kind", [partial(Smoothed, noise="uniform:0.1"), Randomised])
def test_votes_are_a_whole_number(kind, votes):
    with pytest.raises(BadInput, match=r"votes = .* at least 1 vote"):
        kind(Conv().eval(), votes=votes, shape=SHAPE)


@pytest.mark.parametrize(
    ("option", "values", "says"),
    [
        ("memory", (0, -1, float("nan"), "2"), "memory .* the bytes that a step may use"),
        ("device", ("gpu", 3.5), "--device auto"),
        ("name", (3, "a,b", "a\nb", "x" * 201), "name .* must be text of 1 to 200 letters on one line, without a comma"),
        ("noise", (0.3, 1), "has no law; write uniform:0.3"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, values, says):
    for value in values:
        with pytest.raises(BadInput, match=says):
            Smoothed(Conv().eval(), **{"noise": "uniform:0.1", "shape": SHAPE, option: value})


@pytest.mark.parametrize("draws", [0, -1])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_less_than_one_draw_is_refused(draws, loss):
    images, labels = torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64)
    for defense in (Smoothed(Conv().eval(), noise="uniform:0.1", shape=SHAPE), Randomised(Dropped().eval(), shape=SHAPE)):
        with pytest.raises(BadInput, match=f"at least 1 draw, not {draws}"):
            defense.gradient(images, labels, loss, draws, STREAM)


class Dropped(Conv):
    def forward(self, x):
        return super().forward(x * (torch.rand_like(x) < 0.9))


class Of211(nn.Sequential):
    """Written as torch 2.11 does, without the bias of normalisations."""

    def __repr__(self):
        return re.sub(r"(affine=\w+), bias=\w+", r"\1", super().__repr__())

    def _get_name(self):
        return "Sequential"


def test_a_network_has_the_same_digest_under_every_version_of_torch():
    parts = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.InstanceNorm2d(2, affine=True)]
    parts += [nn.GroupNorm(1, 2), nn.Flatten(), nn.LayerNorm(18), nn.LayerNorm(18, elementwise_affine=False), nn.RMSNorm(18)]
    network = nn.Sequential(*parts, nn.Linear(18, 3))
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.arange(weight.numel()).view_as(weight) / 8)
    assert weights_digest(network) == "091a2438c00366007f3a7cf2c4841b523da50cff52168572fbaa108cd38890e7"  # by 2.11 and by 2.14
    old = Of211(*network)
    assert "affine=True, bias" not in repr(old) and structure(old) == structure(network)
