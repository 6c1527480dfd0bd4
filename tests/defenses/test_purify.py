"""Purifiers: the gradient through a chain against plain autograd and differences, its memory, surrogates, the DDPM's steps."""

import itertools
import weakref

import pytest
import torch
from torch import nn

from rush_bench.attacks.purifier import PurifierPGD
from rush_bench.defenses import Randomised, Smoothed
from rush_bench.defenses.chain import Chain
from rush_bench.defenses.purify import Purifier
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.networks.ddpm import UNet, linear_schedule
from rush_bench.noise import Gaussian, Stream, Uniform
from rush_bench.threats import Threat

SHAPE = (1, 8, 8)
STREAM = Stream(3, "test", torch.tensor([10, 3, 99]))


@pytest.fixture(scope="module")
def unet():
    """A small network with random weights in its silent layers too, so that it depends on its input."""
    torch.manual_seed(0)
    network = UNet(1, 4, (1, 2))
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else nn.init.normal_(weight, std=0.1)
    return network


@pytest.fixture
def images():
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def classifier():
    return build({"name": "resnet", "blocks": [1], "width": 8, "classes": 5, "channels": 1, "size": 8}, seed=1).eval()


@pytest.fixture(scope="module")
def two_steps(unet, classifier):
    return Randomised(classifier, transform=purifier(unet, 2), shape=SHAPE)


@pytest.fixture
def defense(two_steps):
    """A purifier of two steps before the classifier; a test may limit its rows."""
    yield two_steps
    two_steps.body.limit(two_steps.body.memory)


def purifier(unet, steps=4, **more):
    return Purifier(unet, linear_schedule(100), start=20, steps=steps, **more)


def step_by_step(chain, images, stream, draws):
    """All states of the chain by plain autograd: nothing is checkpointed. Each (B * draws, C, H, W)."""

    def noise(k):
        own = Stream(stream.seed, f"{stream.purpose}/step{k}", stream.images, stream.first_draw)
        return own.noise(Gaussian(1.0), len(images), draws, SHAPE, "cpu").flatten(0, 1).to(images.dtype)

    states = [chain.start(images.repeat_interleave(draws, 0), noise(0))]
    for k in range(1, chain.length + 1):
        states.append(chain.step(states[-1], k, noise(k)))
    return states


def weighed(outcome):
    """A scalar that no symmetry of the outcome leaves alone."""
    return (outcome.flatten(0, 1).cumsum(0) * torch.linspace(-1, 1, 64).view(SHAPE).to(outcome)).sin().sum()


def gradient(call, images):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(call(x), x)[0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_checkpointed_gradient_is_that_of_plain_autograd(unet, images, eta):
    chain, images = purifier(unet, eta=eta).double(), images.double()
    found = gradient(lambda x: weighed(chain(x, STREAM, 2)), images)
    expected = gradient(lambda x: weighed(chain.finish(step_by_step(chain, x, STREAM, 2)[-1]).unflatten(0, (3, 2))), images)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12) and found.abs().max() > 1e-3


def test_the_gradient_is_that_of_differences_with_the_draws_held(unet, images):
    chain, images, step = purifier(unet).double(), images.double(), 1e-5
    found = gradient(lambda x: weighed(chain(x, STREAM, 2)), images)
    for seed in range(3):
        direction = torch.randn(images.shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        up, down = (weighed(chain(images + sign * step * direction, STREAM, 2)) for sign in (1, -1))
        assert float((found * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-6)


class Held:
    """Counts the bytes that autograd holds for backward passes, at present and at most."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        box, size = Box([tensor]), tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(box, self.free, size)
        return box

    def free(self, size):
        self.now -= size


class Box(list):
    """A list that takes weak references."""


def peak(call, images):
    with Held() as held:
        gradient(call, images)
    assert held.now == 0
    return held.most


def test_memory_is_that_of_one_step_and_a_state_a_step(unet, images):
    state = 2 * images.numel() * 4  # bytes, of 3 images and 2 draws
    plain = {
        n: peak(lambda x, n=n: weighed(step_by_step(purifier(unet, n), x, STREAM, 2)[-1][None]), images) for n in (1, 2, 20)
    }
    step = plain[2] - plain[1]
    assert plain[20] > 18 * step > 18 * 20 * state  # what a step's activations take, and what checkpoints save
    for kind in ("exact", "adjoint", "bpda"):
        two, twenty = (
            peak(lambda x, n=n, kind=kind: weighed(purifier(unet, n, gradient=kind)(x, STREAM, 2)), images) for n in (2, 20)
        )
        assert twenty <= plain[1] + 22 * state, kind
        assert kind == "exact" or twenty == two, kind


def test_draws_depend_on_image_and_draw_alone(unet, images):
    chain = purifier(unet)
    whole = chain(images, STREAM, 5)
    assert torch.allclose(chain(images[[2, 0]], STREAM.at(STREAM.images[[2, 0]]), 5), whole[[2, 0]], atol=1e-6)
    assert torch.allclose(chain(images, STREAM.skip(3), 2), whole[:, 3:], atol=1e-6)
    assert len(whole.round(decimals=3).unique(dim=1)[0]) == 5  # five different draws
    assert not torch.allclose(chain(images, Stream(4, "test", STREAM.images), 5), whole, atol=1e-2)


class Pulled(Chain):
    """x' = -x^3 / 4 for a unit of time in `length` explicit Euler steps, with noise of the size that Brownian motion has."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def start(self, images, noise):
        return images

    def step(self, state, k, noise):
        return state - state**3 / (4 * self.length) + 0.3 * noise / self.length**0.5

    def finish(self, state):
        return state


def test_the_adjoint_tends_to_the_exact_gradient_as_steps_become_small(images):
    """Its error falls as the steps' size, and is plain where they are few."""
    errors = []
    for length in (4, 16, 64, 256):
        chain, x = Pulled(length), 4 * images.double() - 2
        other = chain.with_gradient("adjoint")
        exact, adjoint = (gradient(lambda x, c=c: c(x, STREAM, 2).sum(), x) for c in (chain, other))
        errors.append(float((exact - adjoint).norm() / exact.norm()))
    assert errors[0] > 0.05 and errors[-1] < 0.01
    assert all(later < earlier / 1.7 for earlier, later in itertools.pairwise(errors)), errors


def test_the_adjoint_of_one_step_is_taken_where_the_step_ends(images):
    chain, x = Pulled(1), images.double()
    outcome = chain(x, STREAM, 1)
    found = gradient(lambda x: chain.with_gradient("adjoint")(x, STREAM, 1).sum(), x)
    assert torch.allclose(found, 1 - 0.75 * outcome[:, 0] ** 2)


@pytest.mark.parametrize("kind", ["exact", "adjoint", "bpda"])
def test_surrogates_go_forward_alike(unet, images, kind):
    chain = purifier(unet)
    x = images.clone().requires_grad_()
    assert torch.equal(chain.with_gradient(kind)(x, STREAM, 2), chain(images, STREAM, 2))


def test_bpda_is_the_gradient_at_the_purified_image(unet, images):
    chain = purifier(unet)
    purified = chain(images, STREAM, 2).requires_grad_()
    expected = torch.autograd.grad(weighed(purified), purified)[0].sum(1)
    assert torch.allclose(gradient(lambda x: weighed(chain.with_gradient("bpda")(x, STREAM, 2)), images), expected, atol=1e-6)


def test_a_loss_of_the_states_joins_that_of_the_outcome(unet, images):
    chain, images = purifier(unet).double(), images.double()

    def whole(x):
        seen = {}
        outcome = chain(x, STREAM, 2, watch=lambda k, state: seen.setdefault(k, state.square().sum() * (k + 1)))
        assert list(seen) == [0, 1, 2, 3, 4]
        return weighed(outcome) + sum(seen.values())

    def expected(x):
        states = step_by_step(chain, x, STREAM, 2)
        own = sum(state.square().sum() * (k + 1) for k, state in enumerate(states))
        return weighed(chain.finish(states[-1]).unflatten(0, (3, 2))) + own

    assert torch.allclose(gradient(whole, images), gradient(expected, images), rtol=1e-10, atol=1e-12)
    with pytest.raises(BadInput, match="needs gradient='exact'"):
        chain.with_gradient("bpda")(images, STREAM, 2, watch=lambda k, state: None)


def test_full_steps_are_ancestral_sampling(unet, images):
    """Ho et al. algorithm 2, with the posterior's variance (eq. 7), written from its betas."""
    a = linear_schedule(100)
    beta = 1 - a / torch.cat([torch.ones(1).double(), a[:-1]])
    chain, state = purifier(unet, steps=20), 2 * images - 1
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4))
    for k, t in ((1, 19), (7, 13), (20, 0)):  # step k leaves time t + 1 for t
        before = float(a[t - 1]) if t else 1.0
        predicted = chain.network(state, torch.full((3,), t))
        mean = (state - beta[t] / (1 - a[t]).sqrt() * predicted) / (1 - beta[t]).sqrt()
        expected = mean + ((1 - before) / (1 - a[t]) * beta[t]).sqrt() * noise
        assert torch.allclose(chain.step(state, k, noise), expected.float(), atol=1e-5)


class OfGaussian(nn.Module):
    """The best predictor of the noise in N(0, s^2): sqrt(1 - a) x / (a s^2 + 1 - a)."""

    def __init__(self, alpha_bars, scale):
        super().__init__()
        self.alpha_bars, self.scale = alpha_bars, scale

    def forward(self, x, t):
        a = self.alpha_bars[t][:, None, None, None]
        return (1 - a).sqrt() * x / (a * self.scale**2 + 1 - a)


def test_known_data_come_back_with_their_own_law():
    """Grey images with pixels N(1/2, (s/2)^2): the probability flow (eta=0) scales, ancestral steps (eta=1) draw anew."""
    s, a = 0.5, linear_schedule(1000)
    x = 0.5 + 0.5 * s * torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    stream = Stream(0, "law")
    flow = Purifier(OfGaussian(a, s), a, start=600, steps=600, eta=0.0)
    first = flow.start(x, stream.named("step0").noise(Gaussian(1.0), 20, 1, (1, 16, 16), "cpu")[:, 0].double())
    expected = first * s / (float(a[599]) * s**2 + 1 - float(a[599])) ** 0.5
    assert torch.allclose(2 * flow(x, stream, 1)[:, 0] - 1, expected, atol=0.01)
    drawn = 2 * Purifier(OfGaussian(a, s), a, start=600, steps=600)(x, stream, 1)[:, 0] - 1
    assert float(drawn.std()) == pytest.approx(s, rel=0.03)
    together = float(torch.corrcoef(torch.stack([drawn.flatten(), (2 * x - 1).flatten()]))[0, 1])
    assert together == pytest.approx(float(a[599]) * s**2 / (float(a[599]) * s**2 + 1 - float(a[599])), abs=0.04)


def test_the_schedule_is_ho_et_als():
    assert float(linear_schedule(1000)[-1]) == pytest.approx(4.0e-5, rel=0.02)  # their section 4: KL of about 1e-5 bits
    assert float(linear_schedule(100)[19]) == pytest.approx(float(linear_schedule(1000)[199]), rel=0.02)
    with pytest.raises(BadInput, match="21 or more"):
        linear_schedule(20)


@pytest.mark.parametrize("kind", ["exact", "adjoint"])
def test_a_defences_gradient_is_the_same_in_blocks(unet, classifier, images, kind):
    defense = Randomised(classifier, transform=purifier(unet, 2, gradient=kind), shape=SHAPE)
    labels, all_rows = torch.tensor([0, 1, 2]), defense.body.rows
    for loss in ("ce", "margin"):
        whole, *cut = (_in_blocks(defense, images, labels, loss, rows) for rows in (all_rows, 5, 2))
        for found in cut:
            assert torch.allclose(found, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def _in_blocks(defense, images, labels, loss, rows):
    defense.body.rows = rows
    return defense.gradient(images, labels, loss, 4, STREAM).gradient


ATTACKS = [
    {"surrogate": "blind"},
    {"surrogate": "bpda", "draws": 3},
    {},
    {"surrogate": "exact", "draws": 3},
    {"surrogate": "exact", "draws": 3, "keep": "best", "loss": "margin", "restarts": 2, "stop": False},
    {"surrogate": "exact", "draws": 2, "states": 0.5},
]


@pytest.mark.parametrize("rows", [10**6, 2])
@pytest.mark.parametrize("settings", ATTACKS, ids=str)
def test_an_attack_says_what_it_will_cost_in_rows_of_both_networks(defense, images, settings, rows):
    """A row through the denoiser counts as one, its repetitions on the way back included."""
    defense.body.rows = rows
    attack, labels = PurifierPGD(**{"steps": 2, "select_draws": 2, **settings}), torch.tensor([0, 1, 2])
    before = defense.passes.forwards, defense.passes.backwards
    attacked, extra = attack.recorded(defense, images, labels, Threat("linf", 0.1), STREAM)
    counted = (defense.passes.forwards - before[0]) / 3, (defense.passes.backwards - before[1]) / 3
    assert counted == attack.passes(defense)
    assert (attacked - images).abs().max() <= 0.1 + 1e-6
    assert set(extra) == (set() if "keep" in settings else {"official_correct", "official_repeats"})


def test_a_prediction_counts_its_steps(unet, classifier, images):
    defense = Randomised(classifier, transform=purifier(unet), votes=3, shape=SHAPE)
    before = defense.passes.forwards
    defense.predict(images, STREAM)
    assert defense.passes.forwards - before == 3 * 3 * (4 + 1)


def test_blind_is_the_gradient_without_the_purifier(defense, images):
    labels = torch.tensor([0, 1, 2])
    guided = PurifierPGD(surrogate="blind")._guided(defense)
    found = guided.gradient(images, labels, "ce", 5, STREAM)
    assert torch.allclose(found.gradient, defense.base().gradient(images, labels, "ce", 1, STREAM).gradient, atol=1e-6)
    assert torch.equal(guided.predict(images, STREAM).probabilities, defense.predict(images, STREAM).probabilities)


@pytest.mark.parametrize("rows", [10**6, 2])
def test_a_loss_of_the_states_is_added_for_every_draw(defense, images, rows):
    defense.body.rows = defense.body.brisk = rows
    labels, chain = torch.tensor([0, 1, 2]), defense.transform
    plain = PurifierPGD(surrogate="exact")._guided(defense).gradient(images, labels, "ce", 3, STREAM)
    found = PurifierPGD(surrogate="exact", states=7.0)._guided(defense).gradient(images, labels, "ce", 3, STREAM)

    def apart(x):
        states = step_by_step(chain, x, STREAM, 3)
        means = [chain.signals[k] ** 0.5 * (2 * x - 1).repeat_interleave(3, 0) for k in range(3)]
        return sum((state - mean).square().sum() for state, mean in zip(states, means, strict=True)) / (3 * 3 * 64)

    assert torch.allclose(found.gradient, plain.gradient + 7 * gradient(apart, images), rtol=1e-3, atol=1e-5)


class Share(nn.Module):
    """The noise is so much of the image."""

    def __init__(self, share):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x, t):
        return self.share * x


def test_identity_follows_what_decides_the_answers(classifier):
    def key(chain):
        return Randomised(classifier, transform=chain, shape=SHAPE).identity()

    denoiser = Share(0.5)
    own = key(purifier(denoiser, 1))
    assert own == key(purifier(denoiser, 1)) == key(purifier(Share(0.5), 1))
    different = [purifier(denoiser, 2), purifier(denoiser, 1, eta=0.5), purifier(Share(0.505), 1)]
    different += [Purifier(denoiser, linear_schedule(90), start=20, steps=1), purifier(denoiser, 1, gradient="bpda")]
    assert all(key(chain) != own for chain in different)


def test_the_callers_network_is_not_touched(unet):
    before = {key: (value.clone(), value.stride()) for key, value in unet.state_dict().items()}
    purifier(unet)
    assert unet.training and all(weight.requires_grad for weight in unet.parameters())
    assert all(
        torch.equal(value, before[key][0]) and value.stride() == before[key][1] for key, value in unet.state_dict().items()
    )


def test_rows_of_a_denoiser_are_independent(unet, images):
    t = torch.tensor([0, 5, 50])
    whole = unet(images, t)
    assert whole.shape == images.shape
    assert torch.allclose(torch.cat([unet(images[i : i + 1], t[i : i + 1]) for i in range(3)]), whole, atol=1e-5)
    assert not torch.allclose(unet(images, t + 20), whole, atol=1e-3)
    assert torch.equal(UNet(1, 4)(images, t), torch.zeros_like(images))  # a fresh one says 0


def test_refusals_name_the_fix(unet, classifier, defense, images):
    for wrong in ({"start": 3, "steps": 4}, {"start": 101, "steps": 4}, {"start": 3, "steps": 0}):
        with pytest.raises(BadInput, match="1 <= steps <= start <= 100"):
            Purifier(unet, linear_schedule(100), **wrong)
    with pytest.raises(BadInput, match="eta"):
        purifier(unet, eta=1.5)
    with pytest.raises(BadInput, match="adjoint"):
        purifier(unet).with_gradient("adjiont")
    for attack, attacked, text in (
        (PurifierPGD(), Smoothed(classifier, noise=Uniform(0.1), shape=SHAPE), "purifier in front of a network"),
        (PurifierPGD(states=1.0), defense, "surrogate=exact"),
        (PurifierPGD(surrogate="exact", states=1.0), Randomised(classifier, transform=Pulled(3), shape=SHAPE), "forward_mean"),
    ):
        with pytest.raises(BadInput, match=text):
            attack.run(attacked, images, torch.tensor([0, 1, 2]), Threat("linf", 0.1), STREAM)
