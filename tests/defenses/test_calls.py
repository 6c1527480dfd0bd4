"""Networks and plain transforms that draw from torch's global generators: one draw a row, or one for all rows of a call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from rush_bench.defenses import Deterministic, Randomised, as_module
from rush_bench.errors import BadInput
from rush_bench.noise import Stream

SHAPE = (1, 8, 8)
STREAM = Stream(0, "test")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 4)
        with torch.no_grad():
            self.fc.weight *= 6

    def forward(self, x):
        return self.fc(self.before(x).flatten(1))

    def before(self, x):
        return x


def resize_pad(x):
    """Random resizing and padding as commonly written: three numbers a call."""
    new = int(torch.randint(5, 9, ()))
    top, left = int(torch.randint(0, 9 - new, ())), int(torch.randint(0, 9 - new, ()))
    return F.pad(F.interpolate(x, (new, new), mode="bilinear"), (left, 8 - new - left, top, 8 - new - top))


def mask(x):
    """One dropout mask a call."""
    return x * (torch.rand(x.shape[1:]) < 0.7) / 0.7


def quantised(x):
    """One quality per call, as JPEG has it; the identity in the backward pass."""
    levels = int(torch.randint(2, 9, ()))
    return x + ((x * levels).round() / levels - x).detach()


def mixed(x):
    """A number per call that brightens, and noise of each row's own."""
    return x * (0.7 + 0.6 * torch.rand(())) + 0.1 * torch.randn_like(x)


def row_noise(x):
    return x + 0.2 * torch.randn_like(x)


def row_mask(x):
    return F.dropout(x, 0.3, training=True)


def row_bright(x):
    return x * (0.5 + torch.rand(len(x), 1, 1, 1))


SHARED = [resize_pad, mask, quantised, mixed]
APART = [row_noise, row_mask, row_bright]


def inside(f):
    net = Net()
    net.before = f
    return net.eval()


def made(f, how, **options):
    """The same defence twice over: drawing inside its network, and in a plain transform before it."""
    if how == "inside":
        return Randomised(inside(f), shape=SHAPE, **options)
    return Randomised(Net().eval(), transform=f, shape=SHAPE, **options)


@pytest.fixture
def images():
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("how", ["inside", "transform"])
@pytest.mark.parametrize("f", SHARED + APART, ids=lambda f: f.__name__)
def test_it_is_found_out_whether_rows_share_a_draw(f, how):
    defense = made(f, how)
    assert defense.sampler.one_call_per_draw == (f in SHARED)
    assert ("calls" in defense.identity()) == defense.sampler.one_call_per_draw


@pytest.mark.parametrize("f", [resize_pad, mixed, row_noise], ids=lambda f: f.__name__)
def test_votes_are_those_of_separate_calls(f, images):
    """The law of one image's votes, and of two images together, against calls made one by one from the plain network."""
    draws, images = 600, images[:3]
    defense = made(f, "inside", votes=draws)
    found = defense.predict(images, STREAM).votes / draws
    torch.manual_seed(1)
    with torch.no_grad():
        net = inside(f)
        single = torch.stack([torch.cat([net(row) for row in images.split(1)]).argmax(1) for _ in range(draws)])
    expected = F.one_hot(single, 4).double().mean(0)
    assert ((found - expected).abs() < 4.5 * (2 * 0.25 / draws) ** 0.5).all()
    one = made(f, "inside", votes=1)
    labels = torch.stack([one.predict(images[:1].expand(6, -1, -1, -1), STREAM.skip(k)).labels for k in range(100)])
    agree = (labels[:, :1] == labels[:, 1:]).double().mean()
    chance = expected[0].square().sum()  # that two separate draws of the image agree
    assert abs(agree - chance) < 0.12


@pytest.mark.parametrize(("f", "loss"), [(resize_pad, "ce"), (mixed, "margin")])
def test_a_gradient_averages_separate_draws(f, loss, images):
    """Its variance falls as the number of draws, which folded copies of one draw would not let it."""
    defense, labels = made(f, "inside", votes=2), torch.zeros(2, dtype=torch.int64)

    def spread(draws):
        return (
            torch.stack([defense.gradient(images[:2], labels, loss, draws, STREAM.skip(draws * k)).gradient for k in range(40)])
            .var(0)
            .sum()
        )

    assert spread(16) < 0.2 * spread(1)
    bodies = [defense.body.rows, 3]
    whole, cut = [], []
    for rows, kept in zip(bodies, (whole, cut), strict=True):
        defense.body.rows = rows
        kept += [defense.gradient(images, torch.zeros(6, dtype=torch.int64), loss, 7, STREAM).gradient]
    assert torch.allclose(whole[0], cut[0], atol=1e-5)  # what an image and draw get depends on no block


@pytest.mark.parametrize("f", [resize_pad, row_noise], ids=lambda f: f.__name__)
def test_cost_bank_and_module(f, images):
    defense = made(f, "inside", votes=5)
    assert defense.passes.forwards == 0
    defense.predict(images, STREAM)
    assert (defense.passes.forwards, defense.passes.backwards) == (30, 0)
    defense.gradient(images, torch.zeros(6, dtype=torch.int64), "ce", 4, STREAM)
    assert (defense.passes.forwards, defense.passes.backwards) == (54, 24)
    bank = defense.bank(9, seed=3)
    whole = bank.predict(images, STREAM)
    assert torch.allclose(bank.predict(images[4:5], STREAM).probabilities, whole.probabilities[4:5], atol=1e-6)
    assert torch.allclose(as_module(bank)(images).exp(), whole.probabilities, atol=1e-5)
    assert (whole.votes.max(1).values < 9).any()  # its draws are not one and the same


@pytest.mark.parametrize("f", [resize_pad, row_noise], ids=lambda f: f.__name__)
def test_a_plain_transform_is_the_network_that_has_it_inside(f, images):
    outside, within = made(f, "transform", votes=7), made(f, "inside", votes=7)
    assert torch.equal(outside.predict(images, STREAM).votes, within.predict(images, STREAM).votes)
    assert outside.identity() != within.identity()
    alone = Deterministic(Net().eval(), shape=SHAPE)
    assert outside.base().identity() == alone.identity()


@pytest.mark.parametrize(
    ("transform", "shared"),
    [
        (v2.RandomAffine(20), True),
        (v2.Compose([v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip()]), True),
        (v2.GaussianNoise(0.0, 0.2), False),
    ],
)
def test_transforms_of_torchvision(transform, shared, images):
    defense = Randomised(Net().eval(), transform=transform, votes=5, shape=SHAPE)
    assert defense.sampler.one_call_per_draw == shared
    assert torch.equal(defense.predict(images, STREAM).votes, defense.predict(images, STREAM).votes)


class LessMean(Net):
    def forward(self, x):
        z = super().forward(x)
        return z - 0.1 * z.mean(0) + 0.1 * torch.randn_like(z)


class Modes(Net):
    def forward(self, x):
        return super().forward(row_noise(x)) * (2 if torch.is_grad_enabled() else 1)


class SlowMean(Net):
    mean = 0.5

    def forward(self, x):
        self.mean += 1e-6 * (float(x.detach().mean()) - self.mean)
        return super().forward(row_noise(x) - self.mean)


class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(row_noise(x)) * (1 if self.calls < 20 else -1)


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda: Randomised(LessMean().eval(), shape=SHAPE), "other images of its batch"),
        (lambda: Randomised(Modes().eval(), shape=SHAPE), "while gradients are recorded"),
        (lambda: Randomised(Counts().eval(), shape=SHAPE), "from call to call"),
        (lambda: Randomised(SlowMean().eval(), shape=SHAPE), "from call to call"),
        (lambda: Randomised(Net().eval(), transform=lambda x: x[:1], shape=SHAPE), "must return images"),
        (lambda: Randomised(Net().eval(), transform=lambda x: x.numpy() * 1, shape=SHAPE), "must return images"),
        (lambda: Randomised(Net().eval(), transform=v2.JPEG((5, 50)), shape=SHAPE), "transform fails on float32 images"),
        (lambda: Randomised(Net().eval(), transform=lambda x: 0.5 * x, shape=SHAPE), "draws nothing"),
        (
            lambda: Randomised(
                Net().eval(), transform=lambda x, s, k: x[:, None].expand(-1, k, -1, -1, -1) - x.mean(), shape=SHAPE
            ),
            "depends on its batch",
        ),
    ],
)
def test_what_is_refused(wrap, says):
    with pytest.raises(BadInput, match=says):
        wrap()


@pytest.mark.parametrize(
    "transform",
    [lambda x: x.view(len(x), *SHAPE), lambda x, stream, draws: x.view(len(x), 1, *SHAPE).expand(-1, draws, -1, -1, -1)],
)
def test_a_transform_that_fails_on_the_default_shape_is_told_to_name_its_own(transform):
    says = r"transform fails on .*\(\d, 3, 32, 32\).*; name the shape of your images: shape=images.shape"
    with pytest.raises(BadInput, match=says):
        Randomised(Net().eval(), transform=transform)
