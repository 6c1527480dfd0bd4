import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from rush_bench.defenses import LOSSES, TARGETED, Deterministic, Smoothed, as_module
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.noise import Gaussian, Stream, Uniform

SHAPE = (1, 4, 4)
STREAM = Stream(0, "test")


class Probit(nn.Module):
    """P(class 0) = Phi(w.x + b): under Gaussian noise the mean probability is Phi((w.x + b) / sqrt(1 + sigma^2 |w|^2))."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        u = (images.flatten(1) - 0.5) @ self.w
        return torch.stack([torch.special.log_ndtr(u), torch.special.log_ndtr(-u)], 1)


@pytest.fixture(scope="module")
def conv():
    return build({"name": "resnet", "blocks": [1], "width": 8, "classes": 5, "channels": 1, "size": 4}, seed=1).eval()


@pytest.fixture
def images():
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))


def test_smoothed_linear_classifier_has_its_closed_form_probability(linear, images):
    """Two classes: the chance of class 0 under Gaussian noise is Phi(margin / (sigma |w|))."""
    weight, bias = linear.linear.weight[:2].detach(), linear.linear.bias[:2].detach()
    two = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        two[1].weight.copy_(weight), two[1].bias.copy_(bias)
    sigma, votes = 0.5, 20_000
    defense = Smoothed(two, noise=Gaussian(sigma), votes=votes, shape=SHAPE)
    share = defense.predict(images, STREAM).votes[:, 0] / votes
    gap = weight[0] - weight[1]
    margin = images.flatten(1) @ gap + bias[0] - bias[1]
    exact = torch.from_numpy(stats.norm.cdf((margin / (sigma * gap.norm())).numpy())).float()
    error = (exact * (1 - exact) / votes).sqrt()
    assert ((share - exact).abs() < 4.5 * error + 1e-4).all()


def test_smoothed_gradient_has_its_closed_form():
    """eq. 7 on the probit network: -log Phi(z), z = u / s, s = sqrt(1 + sigma^2 |w|^2), gradient -phi(z)/Phi(z) w/s."""
    network, sigma, draws = Probit().eval(), 0.3, 20_000
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(3))
    defense = Smoothed(network, noise=Gaussian(sigma), votes=1, shape=SHAPE)
    found = defense.gradient(images, torch.zeros(4, dtype=torch.int64), "ce", draws, STREAM)
    w = network.w.detach()
    s = math.sqrt(1 + sigma**2 * float(w @ w))
    z = ((images.flatten(1) - 0.5) @ w / s).double().numpy()
    assert found.loss.numpy() == pytest.approx(-stats.norm.logcdf(z), abs=0.02)
    slope = -torch.from_numpy(stats.norm.pdf(z) / stats.norm.cdf(z)).float() / s
    assert torch.allclose(found.gradient.flatten(1), slope[:, None] * w, atol=0.02)


def _average(logits, how):
    """The three averages over draws (k, B, K), each as it is said in words; log-probabilities (B, K)."""
    if how == "@logits":
        return logits.mean(0).log_softmax(1)
    beta = {"": 1, "@vote": 10, "@vote:3": 3}[how]
    return (beta * logits).softmax(2).mean(0).log()


@pytest.mark.parametrize("how", ["", "@logits", "@vote", "@vote:3"])
@pytest.mark.parametrize("loss", [*LOSSES, *TARGETED])
def test_folded_and_chunked_equals_a_loop_over_draws(conv, images, loss, how):
    draws, labels, law = 7, torch.arange(6) % 5, Uniform(0.3)
    if loss in TARGETED:
        labels = torch.stack([labels, (labels + 2) % 5], 1)
    defense = Smoothed(conv, noise=law, votes=draws, shape=SHAPE)
    x = images.clone().requires_grad_()
    noise = STREAM.noise(law, 6, draws, SHAPE, "cpu")
    scores = _average(torch.stack([conv(x + noise[:, j]) for j in range(draws)]), how)
    value = (LOSSES | TARGETED)[loss](scores, labels)
    (expected,) = torch.autograd.grad(value.sum(), x)
    for rows in (10**6, 14, 3):
        defense.body.rows = rows
        before = defense.passes.forwards, defense.passes.backwards
        found = defense.gradient(images, labels, loss + how, draws, STREAM)
        assert torch.allclose(found.scores, scores, rtol=1e-4, atol=1e-4), rows
        assert torch.allclose(found.loss, value, rtol=1e-4, atol=1e-4), rows
        assert torch.allclose(found.gradient, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()) + 1e-7), rows
        # each draw goes forward once and back once; where its slope depends on the other draws, forward twice
        twice = rows < draws and (loss != "ce" or how == "@logits")
        counted = defense.passes.forwards - before[0], defense.passes.backwards - before[1]
        assert counted == (42 * (1 + twice), 42), rows


@pytest.mark.parametrize("votes", [1, 3, 7])
@pytest.mark.parametrize("rows", [10**6, 14, 5, 1])
def test_predictions_in_one_batch_are_those_of_a_loop(conv, images, votes, rows):
    defense = Smoothed(conv, noise=Uniform(0.3), votes=votes, shape=SHAPE)
    defense.body.rows = rows
    blocks, inner = [], defense.body.log_probabilities
    defense.body.log_probabilities = lambda x, exact: (blocks.append(len(x)), inner(x, exact=exact))[1]
    stream = STREAM.at(torch.arange(6) + 3)
    found = defense.predictions(images, stream, 5)
    assert sum(blocks) == 6 * 5 * votes and max(blocks) <= max(4 * rows, 4 * votes) and (rows < 10**6 or len(blocks) == 1)
    alone = [defense.predict(images, stream.skip(k * votes)) for k in range(5)]
    assert torch.equal(found.votes, torch.stack([one.votes for one in alone]))
    assert torch.equal(found.labels, torch.stack([one.labels for one in alone]))
    assert torch.allclose(found.probabilities, torch.stack([one.probabilities for one in alone]), atol=1e-6)
    bank = defense.bank(4, 0)
    assert torch.equal(bank.predictions(images, stream, 3).votes, bank.predict(images, stream).votes.expand(3, -1, -1))


def test_targeted_losses_and_sharp_votes(conv, images):
    """DLR towards the target in its own words; a vote of great sharpness is the share of the draws."""
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(5)).log_softmax(1)
    labels = torch.tensor([[0, 1], [4, 2], [3, 0], [1, 2], [2, 1], [0, 4]])
    for row, (y, t) in enumerate(labels.tolist()):
        z = sorted(scores[row].tolist(), reverse=True)
        said = -(scores[row, y] - scores[row, t]) / (z[0] - (z[2] + z[3]) / 2)
        assert TARGETED["dlr-to"](scores, labels)[row] == pytest.approx(float(said), rel=1e-5)
    defense = Smoothed(conv, noise=Uniform(0.3), votes=64, shape=SHAPE)
    found = defense.gradient(images, torch.zeros(6, dtype=torch.int64), "ce@vote:1e5", 64, STREAM)
    assert torch.allclose(found.scores.exp(), defense.predict(images, STREAM).votes / 64, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "says"),
    [("margin-too", "did you mean 'margin-to'"), ("ce@logit", "did you mean 'logits'"), ("ce@vote:-1", "above 0")],
)
def test_wrong_losses_name_the_fix(linear, images, name, says):
    with pytest.raises(BadInput, match=says):
        Deterministic(linear, shape=SHAPE).gradient(images, torch.zeros(6, dtype=torch.int64), name, 1, STREAM)


def test_the_base_is_the_network_without_noise_and_shares_it(conv, images):
    smooth = Smoothed(conv, noise=Uniform(0.3), votes=9, shape=SHAPE, name="mine@9")
    for defense in (smooth, smooth.bank(5, seed=3)):
        base, alone = defense.base(), Deterministic(conv, shape=SHAPE)
        assert base.deterministic and base.name.endswith("-base") and base.body is defense.body
        assert torch.equal(base.predict(images, STREAM).probabilities, alone.predict(images, STREAM).probabilities)
        assert base.identity() == alone.identity()
    assert smooth.draws == 9 and base.base() is base


@pytest.mark.parametrize("noise", ["uniform:0.3", "gaussian:0.2"])
def test_batch_order_and_shard_change_nothing(conv, images, noise):
    defense = Smoothed(conv, noise=noise, votes=9, shape=SHAPE)
    labels, positions = torch.arange(6) % 5, torch.tensor([10, 3, 99, 7, 0, 5])
    stream = STREAM.at(positions)
    whole, gradient = defense.predict(images, stream), defense.gradient(images, labels, "ce", 9, stream)
    for rows in ([0], [4, 1], [5, 4, 3, 2, 1, 0]):
        part = stream.at(positions[rows])
        prediction = defense.predict(images[rows], part)
        assert torch.equal(prediction.votes, whole.votes[rows])
        assert torch.allclose(prediction.probabilities, whole.probabilities[rows], atol=1e-6)
        again = defense.gradient(images[rows], labels[rows], "ce", 9, part)
        assert torch.allclose(again.gradient, gradient.gradient[rows], rtol=1e-4, atol=1e-6)


def test_vote_is_hard_and_ties_go_to_the_mean_probability():
    class Sign(nn.Module):
        """Class 0 with certainty where the noisy pixel is above 0.5, else class 1 barely."""

        def forward(self, x):
            up = x[:, 0, 0, 0] > 0.5
            return torch.stack([torch.where(up, 4.0, -0.01), torch.zeros(len(x))], 1) + 0 * x.flatten(1).sum(1, keepdim=True)

    images = torch.full((200, *SHAPE), 0.5)
    defense = Smoothed(Sign().eval(), noise=Uniform(0.3), votes=2, shape=SHAPE)
    prediction = defense.predict(images, STREAM)
    split = prediction.votes[:, 0] == 1
    assert 50 < split.sum() < 150
    assert (prediction.labels[split] == 0).all()  # the mean probability of class 0 is (0.98 + 0.5) / 2
    assert (prediction.labels[prediction.votes[:, 1] == 2] == 1).all()


def test_one_vote_is_one_noisy_pass(conv, images):
    defense = Smoothed(conv, noise=Uniform(0.3), votes=1, shape=SHAPE)
    noisy = images + STREAM.noise(Uniform(0.3), 6, 1, SHAPE, "cpu")[:, 0]
    assert noisy.min() < 0  # noisy copies are not clipped
    assert torch.equal(defense.predict(images, STREAM).labels, conv(noisy).argmax(1))


def test_bank_is_deterministic_and_the_same_for_every_image(conv, images):
    bank = Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE).bank(5, seed=3)
    assert bank.deterministic
    first, again = bank.predict(images, STREAM), bank.predict(images.flip(0), Stream(9, "other", torch.arange(50, 56)))
    assert torch.equal(first.votes.flip(0), again.votes)
    assert (first.votes.sum(1) == 5).all()
    assert bank.identity() != Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE).bank(5, seed=4).identity()


@pytest.mark.parametrize("rows", [10**6, 8, 3])
def test_module_of_a_bank_gives_log_mean_probability_and_its_gradient(conv, images, rows):
    bank = Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE).bank(5, seed=3)
    labels = torch.arange(6) % 5
    expected = bank.gradient(images, labels, "ce", 5, STREAM)
    bank.body.rows = rows
    x = images.clone().requires_grad_()
    scores = as_module(bank)(x)
    assert torch.allclose(scores.exp(), bank.predict(images, STREAM).probabilities, atol=1e-5)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(scores, labels, reduction="sum"), x)
    assert torch.allclose(gradient, expected.gradient, rtol=1e-3, atol=1e-6)


def test_module_of_a_randomised_defence_draws_anew(conv, images):
    module = as_module(Smoothed(conv, noise=Uniform(0.3), votes=2, shape=SHAPE))
    assert not torch.equal(module(images), module(images))
    module = as_module(Deterministic(conv, shape=SHAPE))
    assert torch.equal(module(images), module(images))
    assert torch.allclose(module(images), conv(images).log_softmax(1), atol=1e-5)


def test_passes_are_counted(conv, images):
    defense = Smoothed(conv, noise=Uniform(0.3), votes=8, shape=SHAPE)
    defense.predict(images, STREAM)
    assert (defense.passes.forwards, defense.passes.backwards) == (48, 0)
    defense.gradient(images, torch.zeros(6, dtype=torch.int64), "ce", 4, STREAM)
    assert (defense.passes.forwards, defense.passes.backwards) == (72, 24)
    x = images.clone().requires_grad_()
    for rows in (10**6, 3):
        defense.body.rows = rows
        before = defense.passes.backwards
        as_module(defense)(x).sum().backward()
        assert defense.passes.backwards - before == 48


def test_bfloat16_searches_and_float32_judges(images):
    network = build({"name": "tiny", "classes": 5, "channels": 1, "size": 8}, seed=1).eval()
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    options = {"noise": Uniform(0.3), "votes": 4, "shape": (1, 8, 8)}
    exact, fast = (Smoothed(network, precision=precision, **options) for precision in ("float32", "bfloat16"))
    assert torch.equal(exact.predict(images, STREAM).probabilities, fast.predict(images, STREAM).probabilities)
    a, b = (d.gradient(images, torch.zeros(8, dtype=torch.int64), "ce", 16, STREAM).gradient.flatten(1) for d in (exact, fast))
    assert not torch.equal(a, b)
    assert (nn.functional.cosine_similarity(a, b) > 0.97).all()


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)).train(), "train mode"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Softmax(1)).eval(), "probabilities where logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(17, 5)).eval(), "does not take images"),
        (nn.Identity().eval(), "must return logits"),
    ],
)
def test_networks_that_are_refused(network, says):
    with pytest.raises(BadInput, match=says):
        Deterministic(network, shape=SHAPE)


def test_a_network_that_hides_its_gradient_or_returns_nan_is_refused():
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)

    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) * math.nan

    class Masked(nn.Module):
        def forward(self, x):
            return x.flatten(1) + torch.tensor([-math.inf] + [0.0] * 15)

    for network, says in ((Detached(), "no gradient"), (Broken(), "not finite; look"), (Masked(), "not finite; mask .* -1e4")):
        with pytest.raises(BadInput, match=says):
            Deterministic(network.eval(), shape=SHAPE)


def test_probabilities_are_taken_when_said_so(linear, images):
    softened = nn.Sequential(linear, nn.Softmax(1)).eval()
    a = Deterministic(softened, shape=SHAPE, outputs="probabilities").predict(images, STREAM)
    b = Deterministic(linear, shape=SHAPE).predict(images, STREAM)
    assert torch.allclose(a.probabilities, b.probabilities, atol=1e-5)
    with pytest.raises(BadInput, match="do not sum to 1"):
        Deterministic(linear, shape=SHAPE, outputs="probabilities")


def test_images_outside_the_box_are_refused(linear, images):
    images[3, 0, 0, 0] = 1.5
    with pytest.raises(BadInput, match="image 3"):
        Deterministic(linear, shape=SHAPE).predict(images, STREAM)


def test_wrong_loss_and_wrong_votes(linear, images):
    with pytest.raises(BadInput, match="did you mean 'margin'"):
        Deterministic(linear, shape=SHAPE).gradient(images, torch.zeros(6, dtype=torch.int64), "margins", 1, STREAM)
    with pytest.raises(BadInput, match="at least 1 vote"):
        Smoothed(linear, noise=Uniform(0.3), votes=0, shape=SHAPE)


def test_identity_follows_the_weights_and_not_the_name(conv):
    conv = copy.deepcopy(conv)
    one = Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE, name="a").identity()
    assert one == Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE, name="b").identity()
    with torch.no_grad():
        conv.head.bias += 1e-3
    assert one != Smoothed(conv, noise=Uniform(0.3), votes=4, shape=SHAPE, name="a").identity()
