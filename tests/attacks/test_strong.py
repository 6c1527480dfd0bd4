"""Our own attacks on randomised defences: against the reference implementations, and what each promises."""

import warnings

import pytest
import torch
from torch import nn

from rush_bench.attacks.apgd import EOTAPGD, TargetedEOTAPGD, _checkpoints
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.control import RandomNoise
from rush_bench.attacks.square import Square
from rush_bench.attacks.suites import parse_suite
from rush_bench.attacks.transfer import Transfer
from rush_bench.defenses import Defense, Deterministic, Gradient, Passes, Prediction, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation.score import score
from rush_bench.noise import Gaussian, Stream, Uniform
from rush_bench.registry import attacks
from rush_bench.settings import override
from rush_bench.store import save_model
from rush_bench.threats import Threat

SMALL, DIGIT = (1, 4, 4), (1, 8, 8)
STREAM = Stream(0, "attack")
OURS = {
    "eot-apgd": EOTAPGD(steps=12, draws=6, select_draws=12),
    "eot-apgd-t": TargetedEOTAPGD(steps=12, draws=6, select_draws=12, targets=3),
    "square": Square(queries=60, draws=4, redraw=20, select_draws=12),
    "transfer": Transfer(steps=12),
    "random-noise": RandomNoise(points=4, select_draws=12),
}


def _right(network, images, labels):
    with torch.no_grad():
        return network(images).argmax(1) == labels


class _Apart:
    """A network with each image's logits multiplied so that they are at least 20 apart at the image itself."""

    def __init__(self, network, images):
        spread = torch.stack([z.max() - z.min() for z in network(images).detach()])
        self.network, self.by = network, (20 / spread).clamp_min(1)[:, None]

    def __call__(self, x):
        assert len(x) == len(self.by)
        return self.by * self.network(x)


@pytest.mark.parametrize(
    ("norm", "eps", "loss", "steps"),
    [("linf", 0.12, "ce", 20), ("linf", 0.12, "dlr", 20), ("linf", 0.1, "ce", 50), ("l2", 0.6, "ce", 20)],
)
def test_without_noise_it_is_the_reference_apgd_image_by_image(digits, norm, eps, loss, steps):
    from pyautoattack.autopgd_base import APGDAttack

    network, images, labels = digits
    threat = Threat(norm, eps)
    attack = EOTAPGD(steps=steps, losses=(loss,))
    defense = Deterministic(network, shape=DIGIT)
    mine = _right(network, attack.run(defense, images, labels, threat, STREAM), labels)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of gradients that are zero
        same = {"n_iter": steps, "norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "loss": loss, "device": "cpu"}
        reference = APGDAttack(_Apart(network, images) if loss == "ce" else network, **same)
        reference.init_hyperparam(images)
        start = threat.start(images, STREAM.named(f"start/{loss}/0"))
        _, theirs, _, _ = reference.attack_single_run(images, labels, x_init=start)
    assert (mine == theirs.bool()).float().mean() >= 0.99
    assert 0.1 < mine.float().mean() < 0.9  # or agreement would say nothing


def test_the_reference_halves_its_step_where_few_steps_call_for_it(digits, monkeypatch):
    """`apgd` has 20 steps: the package's checkpoints are made for 100 unless they are told."""
    from pyautoattack.autopgd_base import APGDAttack

    network, images, labels = digits
    defense, threat, halved = Deterministic(network, shape=DIGIT), Threat("linf", 0.12), {}
    own = APGDAttack.check_oscillation

    def spy(self, losses, step, since, *rest, **more):
        found = own(self, losses, step, since, *rest, **more)
        halved[step + 1] = int(found.sum())
        return found

    monkeypatch.setattr(APGDAttack, "check_oscillation", spy)
    attack = override(attacks.load("apgd")(), {"steeper": "no"})  # the package itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _right(network, attack.run(defense, images, labels, threat, STREAM), labels)
    assert sorted(halved) == sorted(_checkpoints(20))
    assert sum(halved.values()) > 50
    mine = _right(
        network, EOTAPGD(steps=20, losses=("ce",), steeper=False).run(defense, images, labels, threat, STREAM), labels
    )
    assert (mine == theirs).float().mean() >= 0.99
    assert 0.1 < mine.float().mean() < 0.9


def test_only_the_keys_of_few_steps_changed_with_the_checkpoints():
    assert attacks.load("apgd")().settings()["schedule"] == "scaled"
    assert "schedule" not in attacks.load("aa")().settings()


@pytest.mark.parametrize("kind", [EOTAPGD, TargetedEOTAPGD])
def test_under_noise_the_search_goes_back_only_where_asked(linear, kind):
    """Older records, all of which did, are those that do."""
    for defense, back in (
        (Deterministic(linear, shape=SMALL), True),
        (Smoothed(linear, noise=Uniform(0.1), shape=SMALL).bank(4, 0), True),
        (Smoothed(linear, noise=Uniform(0.1), shape=SMALL), False),
    ):
        assert kind().on(defense).back == kind(losses=("ce",)).on(defense).back == back
        assert ("back" in kind().on(defense).settings()) == (not back)
        assert "back" not in kind(back=True).on(defense).settings()


def test_under_noise_the_way_back_to_the_luckiest_point_costs_strength(digits):
    network, images, labels = digits
    threat, defense = Threat("linf", 0.12), Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    right = []
    for back in (True, False):
        attacked = EOTAPGD(steps=12, losses=("ce",), draws=8, select_draws=32, back=back).run(
            defense, images, labels, threat, STREAM
        )
        right.append(score(defense, attacked, labels, torch.arange(100), Stream(1, "score"), 100)["correct"].mean() / 100)
    assert right[1] < right[0] - 0.005


def test_checkpoints_are_those_of_the_paper():
    """p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), in steps."""
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(_checkpoints(3)) == [1, 2, 3]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_is_as_strong_as_the_reference_at_as_many_queries(digits, norm):
    from pyautoattack.square import SquareAttack

    network, images, labels = digits
    eps, queries = {"linf": 0.12, "l2": 0.8}[norm], 100
    attacked = Square(queries=queries).run(Deterministic(network, shape=DIGIT), images, labels, Threat(norm, eps), STREAM)
    with torch.random.fork_rng():
        reference = SquareAttack(network, norm={"linf": "Linf", "l2": "L2"}[norm], n_queries=queries, eps=eps, device="cpu")
        with torch.no_grad():
            theirs = reference.perturb(images, labels)
    ours, other = (_right(network, x, labels).float().mean() for x in (attacked, theirs))
    clean = _right(network, images, labels).float().mean()
    assert abs(ours - other) <= 0.08
    assert other < clean - 0.15


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_goes_on_from_what_others_found(digits, norm):
    """From the x' of a strong attack few queries cannot lose: no image that it broke stands, and most of the loss is kept."""
    network, images, labels = digits
    defense, threat = Deterministic(network, shape=DIGIT), Threat(norm, {"linf": 0.08, "l2": 0.5}[norm])
    found = attacks.load("pgd")().run(defense, images, labels, threat, STREAM)
    few = Square(queries=3)
    further = few.go_on(defense, images, labels, threat, STREAM, found)
    alone, there, after = (
        _right(network, x, labels) for x in (few.run(defense, images, labels, threat, STREAM), found, further)
    )
    assert not (after & ~there).any() and not (after & ~alone).any()
    assert after.sum() <= there.sum() < alone.sum()


def test_square_needs_no_gradient_and_beats_random_noise(digits):
    class Opaque(Smoothed):
        def gradient(self, *_):
            raise AssertionError("a gradient was asked for")

    network, images, labels = digits
    images, labels, index = images[:30], labels[:30], torch.arange(30)
    defense, threat = Opaque(network, noise=Uniform(0.3), votes=4, shape=DIGIT), Threat("linf", 0.15)
    rates = []
    for attack in (RandomNoise(points=10, select_draws=16), Square(queries=100, draws=8, redraw=25, select_draws=16)):
        attacked = attack.run(defense, images, labels, threat, STREAM)
        rates.append(score(defense, attacked, labels, index, Stream(1, "score"), 20)["correct"].mean() / 20)
    assert rates[1] < rates[0] - 0.1


def test_gradients_beat_square_beats_nothing_and_the_control_is_weak(digits):
    """The order that a sound white-box attack obeys, on a randomised defence and fresh draws."""
    network, images, labels = digits
    images, labels, index = images[:40], labels[:40], torch.arange(40)
    defense, threat = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT), Threat("linf", 0.12)
    rates = {}
    for name, attack in {
        "clean": attacks.load("clean")(),
        "control": RandomNoise(points=20, select_draws=8),
        "pgd": attacks.load("pgd")(),
        "ours": EOTAPGD(steps=12, draws=16),
        "transfer": Transfer(steps=12),
    }.items():
        attacked = attack.run(defense, images, labels, threat, STREAM)
        rates[name] = score(defense, attacked, labels, index, Stream(1, "score"), 50)["correct"].mean() / 50
    assert rates["clean"] - rates["control"] < 0.4 * (rates["clean"] - rates["ours"])
    assert rates["ours"] <= min(rates["pgd"], rates["transfer"]) + 0.01


def test_leaving_the_search_early_costs_nothing_that_shows(digits):
    network, images, labels = digits
    images, labels, index = images[:40], labels[:40], torch.arange(40)
    found = []
    for stop in (True, False):
        defense = Smoothed(network, noise=Uniform(0.3), votes=4, shape=DIGIT)
        attack = EOTAPGD(steps=20, losses=("ce",), draws=8, stop=stop)
        attacked = attack.run(defense, images, labels, Threat("linf", 0.25), STREAM)
        rate = score(defense, attacked, labels, index, Stream(1, "score"), 50)["correct"].mean() / 50
        found.append((rate, defense.passes.backwards))
    assert found[0][0] <= found[1][0] + 0.02
    assert found[0][1] < 0.7 * found[1][1]
    alone = Deterministic(network, shape=DIGIT)
    EOTAPGD(steps=20, losses=("ce",)).run(alone, images, labels, Threat("linf", 0.25), STREAM)
    assert alone.passes.backwards < 0.5 * 21 * 40


@pytest.mark.parametrize("votes", [0, 1, 8])
def test_what_is_kept_is_the_best_candidate_by_a_count_of_its_own(digits, votes):
    network, images, labels = digits
    images, labels = images[:20], labels[:20]
    defense = Deterministic(network, shape=DIGIT)
    if votes:
        defense = Smoothed(network, noise=Uniform(0.3), votes=votes, shape=DIGIT)
    threat, draws = Threat("linf", 0.2), 1 if votes == 0 else 32
    kept = BestSoFar(defense, images, labels, STREAM, 32)
    candidates, worths = [threat.start(images, STREAM.named(f"candidate{k}")) for k in range(6)], []
    # each draw goes through the network by itself here
    noise = STREAM.named("select").noise(Uniform(0.3 if votes else 0.0), 20, draws, DIGIT, "cpu")
    for candidate in candidates:
        before = kept.value.clone()
        kept.offer(candidate)
        assert (kept.value >= before).all()
        p = torch.stack([network(candidate + noise[:, j]).softmax(1) for j in range(draws)]).detach()
        shares = (nn.functional.one_hot(p.argmax(2), 10).float().mean(0) + p.mean(0)) / 2
        true = shares.gather(1, labels[:, None])[:, 0]
        others = shares.scatter(1, labels[:, None], -1).max(1).values
        worths.append(-true if votes == 1 else others - true)
    best = torch.stack(worths).max(0).values
    chosen = (torch.stack(candidates) == kept.points).flatten(2).all(2)
    assert (chosen.sum(0) == 1).all()
    worth = torch.stack(worths)[chosen.float().argmax(0), torch.arange(20)]
    assert (worth >= best - 2e-2).all()  # vote and probability margins may name different rivals: a near tie
    assert (kept.broken == (kept.broken & (worth > -0.1))).all()


class TwoHills(nn.Module):
    """Brighter images are of the other class, darker ones nearly: a climb ends on the side on which it starts."""

    def forward(self, x):
        along = (x - 0.5).flatten(1).mean(1)
        return torch.stack([torch.full_like(along, 0.1), along.abs() + 0.3 * along], 1)


@pytest.mark.parametrize("votes", [0, 2])
def test_restarts_and_losses_only_help(digits, votes):
    network, images, labels = digits
    images, labels, threat = images[:8], labels[:8], Threat("linf", 0.12)
    if votes:
        defense = Smoothed(network, noise=Uniform(0.3), votes=votes, shape=DIGIT)
    else:  # on a trained network this small every start ends at one point, up to rounding
        images, labels = torch.full_like(images, 0.5), torch.zeros_like(labels)
        defense = Deterministic(TwoHills().eval(), shape=DIGIT)
    values = []
    for settings in ({"losses": ("ce",)}, {"losses": ("ce",), "restarts": 3}, {"losses": ("ce", "margin-to"), "restarts": 3}):
        attack = EOTAPGD(steps=10, draws=4, targets=2, select_draws=32, rows=90, **settings)
        attacked = attack.run(defense, images, labels, threat, STREAM)
        judge = BestSoFar(defense, images, labels, STREAM, 32)
        judge.offer(attacked)
        values.append(judge.value)
    assert (values[1] >= values[0] - 1e-6).all() and (values[2] >= values[1] - 1e-6).all()
    assert values[1].mean() > values[0].mean() + 1e-3


@pytest.mark.parametrize("name", OURS)
def test_other_images_in_the_batch_change_nothing(linear, grey, name):
    """The result for an image is that of its position in the data set, whatever the batch and its order (A5)."""
    images, labels, rows = grey.floats(), grey.labels, torch.tensor([31, 2, 17])
    defense, threat = Smoothed(linear, noise=Uniform(0.1), votes=2, shape=SMALL), Threat("linf", 0.02)
    whole = OURS[name].run(defense, images, labels, threat, STREAM.at(torch.arange(40)))
    part = OURS[name].run(defense, images[rows], labels[rows], threat, STREAM.at(rows))
    assert torch.allclose(whole[rows], part, atol=1e-6)


class Coin(Defense):
    """Right nine times in ten whatever the input; its gradient is noise, and it offers no scores."""

    name, classes, shape, draws = "coin", 5, SMALL, 1

    def __init__(self, labels):
        self.truth, self.passes = labels, Passes()

    def predict(self, images, stream):
        right = stream.uniform(len(images), 1, (1,))[:, 0, 0] < 0.9
        truth = self.truth[stream.images]
        labels = torch.where(right, truth, (truth + 1) % 5)
        votes = nn.functional.one_hot(labels, 5)
        return Prediction(labels, votes, votes.float())

    def gradient(self, images, labels, loss, draws, stream):
        right = (stream.uniform(len(images), draws, (1,))[:, :, 0] < 0.9).float().mean(1)
        noise = stream.named("gradient").uniform(len(images), 1, SMALL)[:, 0] - 0.5
        return Gradient(noise, -right.clamp_min(0.01).log())

    def base(self):
        return self


@pytest.mark.parametrize("name", OURS)
def test_the_coin_that_cannot_be_attacked_is_not_broken(name):
    labels, index = torch.arange(200) % 5, torch.arange(200)
    coin, images = Coin(labels), torch.full((200, *SMALL), 0.5)
    attack = OURS[name]
    attacked = attack.run(coin, images, labels, Threat("linf", 0.1), STREAM.at(index))
    assert (attacked != images).flatten(1).any(1).all()
    rate = score(coin, attacked, labels, index, Stream(3, "score"), 50)["correct"].mean() / 50
    assert abs(rate - 0.9) < 4.5 * (0.9 * 0.1 / 10_000) ** 0.5


def test_memory_is_bounded_whatever_restarts_targets_and_draws_are(digits):
    network, images, labels = digits
    images, labels = images[:2], labels[:2]
    defense = Smoothed(network, noise=Uniform(0.3), votes=1, shape=DIGIT)
    defense.body.rows, seen, asked = 50, [], []
    inner, gradient = defense.body.log_probabilities, defense.gradient

    def count(rows, exact):
        seen.append((len(rows), torch.is_grad_enabled()))
        return inner(rows, exact=exact)

    defense.body.log_probabilities = count
    defense.gradient = lambda x, *rest: (asked.append(len(x)), gradient(x, *rest))[1]
    attack = TargetedEOTAPGD(steps=1, losses=("margin-to",), restarts=2, draws=64, select_draws=64, rows=20)
    attack.run(defense, images, labels, Threat("linf", 0.01), STREAM)
    assert max(rows for rows, saved in seen if saved) <= 50
    assert max(rows for rows, saved in seen if not saved) <= 4 * 64
    assert max(asked) <= 20 and sum(asked) > 3 * len(images)


def test_a_probit_network_falls_to_its_closed_form():
    """Class 0 by the sign of w.x + b under Gaussian noise: the worst l-inf point is known, the m-vote too."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(4))
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        network[1].weight.zero_(), network[1].bias.copy_(torch.tensor([0.0, 0.0, -50.0, -50.0]))
        network[1].weight[0].copy_(3 * weight), network[1].weight[1].copy_(-3 * weight)
    images = 0.5 + 0.1 * (torch.rand(12, *SMALL, generator=torch.Generator().manual_seed(5)) - 0.5)
    images += 0.02 * weight.sign().view(SMALL)
    with torch.no_grad():
        network[1].bias[:2] = torch.tensor([-1.5, 1.5]) * weight.sum()
    defense, eps = Smoothed(network, noise=Gaussian(0.2), votes=1, shape=SMALL), 0.03
    labels = torch.zeros(12, dtype=torch.int64)
    for attack in (EOTAPGD(steps=20), TargetedEOTAPGD(steps=20), Square(queries=400)):
        attacked = attack.run(defense, images, labels, Threat("linf", eps), STREAM)
        lost = ((images - attacked).flatten(1) @ weight) / (eps * weight.abs().sum())
        assert lost.min() > 0.97, type(attack).__name__


def test_transfer_is_our_apgd_on_the_source(digits, tmp_path):
    network, images, labels = digits
    images, labels, threat = images[:10], labels[:10], Threat("linf", 0.1)
    target = Smoothed(network, noise=Uniform(0.3), votes=2, shape=DIGIT)
    alone = Deterministic(network, shape=DIGIT, name="source")
    expected = EOTAPGD(steps=8, losses=("ce", "margin")).run(alone, images, labels, threat, STREAM)
    card = {
        "name": "mine",
        "recipe": "rush",
        "dataset": "digits",
        "network": network.spec,
        "noise": None,
        "votes": [0],
    }
    save_model(tmp_path / "mine", card, network.state_dict())
    for source in ("base", alone, "mine"):
        attack = Transfer(source=source, store=str(tmp_path), steps=8, losses=("ce", "margin"))
        before = target.passes.backwards
        assert torch.equal(attack.run(target, images, labels, threat, STREAM), expected)
        assert target.passes.backwards > before
        assert str(tmp_path) not in str(attack.settings())
    keys = [str(Transfer(source=s, store=str(tmp_path)).settings()) for s in ("base", alone, "mine")]
    assert len(set(keys)) == 3 and "source_sha256" in keys[2] and alone.weights in keys[1]


def test_a_source_that_the_store_has_not_is_named(linear, grey, tmp_path):
    defense = Smoothed(linear, noise=Uniform(0.1), votes=2, shape=SMALL)
    with pytest.raises(BadInput, match="no models in"):
        attack = Transfer(source="rush", store=str(tmp_path))
        attack.run(defense, grey.floats(), grey.labels, Threat("linf", 0.1), STREAM)


@pytest.mark.parametrize(("kind", "three"), [(EOTAPGD, ("ce", "margin")), (TargetedEOTAPGD, ("margin-to",))])
def test_losses_go_by_the_kind_of_defence(linear, kind, three):
    """CE of the sharpened vote is for draws; DLR towards a target needs four classes. A record's key says what was run."""
    few = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    five = ("ce", "margin") if kind is EOTAPGD else ("margin-to", "dlr-to")
    many = ("ce@vote:3", "margin") if kind is EOTAPGD else five
    for defense, losses in (
        (Deterministic(few, shape=SMALL), three),
        (Deterministic(linear, shape=SMALL), five),
        (Smoothed(linear, noise=Uniform(0.1), shape=SMALL).bank(4, 0), five),
        (Smoothed(linear, noise=Uniform(0.1), shape=SMALL), many),
    ):
        assert kind().on(defense).settings()["losses"] == losses
        assert kind(losses=("ce",)).on(defense).losses == ("ce",)
    assert kind().passes(defense) == kind(losses=many).passes(defense)


def test_a_source_of_another_shape_is_refused(linear, grey, digits):
    other = Deterministic(digits[0], shape=DIGIT)
    with pytest.raises(BadInput, match="same data set"):
        Transfer(source=other).run(Deterministic(linear, shape=SMALL), grey.floats(), grey.labels, Threat("linf", 0.1), STREAM)


def test_a_randomised_defence_of_ones_own_without_base_is_told(grey):
    class Bare(Coin):
        def base(self):
            return Defense.base(self)

    with pytest.raises(BadInput, match=r"has no base\(\)"):
        Transfer().run(Bare(grey.labels), grey.floats(), grey.labels, Threat("linf", 0.1), STREAM)


@pytest.mark.parametrize("name", OURS)
def test_a_suite_reaches_them(name):
    assert list(parse_suite("linf8", only=("clean", name)).columns) == ["clean", name]
