"""Every attack against closed forms, one table."""

import warnings

import pytest
import torch

from rush_bench.attacks.suites import is_quick, of_draws, parse_suite
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.noise import Stream, Uniform
from rush_bench.registry import attacks
from rush_bench.settings import override
from rush_bench.threats import Threat

SHAPE = (1, 4, 4)
STREAM = Stream(0, "attack")
THREATS = [Threat("linf", 0.025), Threat("l2", 0.06)]
SETTINGS = {
    "clean": {},
    "pgd": {},
    "eot": {"steps": 30, "step": 0.1, "draws": 8},
    "aa": {"steps": 25},
    "apgd": {},
    "aa-rand": {"steps": 20, "eot_iter": 2},
    "pgd-ablation": {"of": "eot", "steps": 20, "draws": 8, "redraw": 10, "clamp": "straight-through"},
    "pgd-published": {},
    "aa-published": {"steps": 10, "queries": 50},
    "torchattacks-pgdrs": {},
    "torchattacks-aa": {"queries": 50},
    "eot-apgd": {"steps": 20, "draws": 8},
    "eot-apgd-t": {"steps": 20, "draws": 8, "targets": 3, "rows": 60},
    "square": {"queries": 400, "draws": 4, "redraw": 50},
    "transfer": {"steps": 20},
    "random-noise": {"points": 5},
}
NO_SEARCH = {"clean", "random-noise"}
HANDS_BACK = {"clean", "aa-published", "torchattacks-aa"}  # clean images: what these replays are there to show (A9)
LINF_ONLY = {"torchattacks-pgdrs"}


def _skip_where_it_cannot(name, threat):
    if name.startswith("torchattacks-"):
        pytest.importorskip("torchattacks")
    if name in LINF_ONLY and threat.norm != "linf":
        pytest.skip("for l-inf alone, as it says")
    if name in HANDS_BACK - {"clean"} and threat.norm == "l2":
        pytest.skip("Square's l2 form needs 5 pixels")


@pytest.fixture
def parts(linear, grey):
    return linear, grey.floats(), grey.labels


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in SETTINGS for key in attacks.load(name)().drawn], ids=lambda value: str(value)
)
def test_settings_of_draws_change_nothing_without_noise(parts, name, key):
    network, images, labels = parts
    _skip_where_it_cannot(name, THREATS[0])
    usual = override(attacks.load(name)(), SETTINGS[name])
    value = getattr(usual, key)
    other = override(usual, {key: not value if isinstance(value, bool) else value + 3})
    defense = Deterministic(network, shape=SHAPE)
    found = [attack.run(defense, images, labels, THREATS[0], STREAM) for attack in (usual, other)]
    assert torch.equal(*found)
    assert of_draws(f"{name}.{key}")


def test_the_table_has_every_attack():
    elsewhere = {"pgd-purifier"}  # it needs a purifier: tests/defenses/test_purify.py
    assert set(SETTINGS) | elsewhere == set(attacks.entries)


@pytest.mark.usefixtures("short_square")
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - NO_SEARCH))
def test_linear_network_falls_exactly_where_its_worst_case_says(parts, worst_margin, name, threat):
    network, images, labels = parts
    _skip_where_it_cannot(name, threat)
    if name == "aa" and threat != THREATS[0]:
        pytest.skip("one threat is enough for the slow one")
    attack = attacks.load(name)(**SETTINGS[name])
    attacked = attack.run(Deterministic(network, shape=SHAPE), images, labels, threat, STREAM)
    margin = worst_margin(network, images, labels, threat.norm, threat.eps)
    right = network(attacked).argmax(1) == labels
    certain = margin.abs() > 0.02 * margin.abs().max()  # CE ascent may stop short of the worst class by a hair
    if (name, threat.norm) != ("square", "l2"):  # its windows of 3 pixels and more cannot draw the worst l2 point of 16
        assert (right == (margin > 0))[certain].float().mean() >= (0.999 if name == "aa" else 0.95)
    assert 0.05 < (margin > 0).float().mean() < 0.95
    assert (right[margin > 0]).all()  # nothing falls that cannot


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_two_class_linear_worst_case_is_reached_exactly(linear, threat):
    """With two classes the loss is monotone in one margin, so the distance to the closed form is rounding."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
    with torch.no_grad():
        network[1].weight.copy_(linear.linear.weight[:2]), network[1].bias.copy_(linear.linear.bias[:2])
    images = torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    labels = network(images).argmax(1)
    attacked = attacks.load("pgd")().run(Deterministic(network, shape=SHAPE), images, labels, threat, STREAM)
    gap = network[1].weight[0] - network[1].weight[1]
    before, after = (network(x).gather(1, labels[:, None])[:, 0] * 2 - network(x).sum(1) for x in (images, attacked))
    dual = gap.abs().sum() if threat.norm == "linf" else gap.norm()
    assert (before - after).detach() == pytest.approx((threat.eps * dual).detach().expand(10).tolist(), rel=1e-3)


@pytest.mark.usefixtures("short_square")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("randomised", [False, True])
def test_contract(parts, name, threat, randomised):
    """Inside ball and box, float32, reproducible, the global generator and the weights untouched, no gradient left."""
    network, images, labels = parts
    _skip_where_it_cannot(name, threat)
    network = network.requires_grad_(True)
    images, labels = images[:8], labels[:8]
    images[0] = 0.0  # a corner of the box
    build_defense = {False: Deterministic, True: Smoothed}[randomised]
    defense = build_defense(network, shape=SHAPE, **({"noise": Uniform(0.3), "votes": 2} if randomised else {}))
    if name == "aa":
        square = ("square",) if threat.norm == "linf" else ()  # its l2 form needs 5 pixels
        settings = {"parts": ("apgd-ce", "apgd-t", *square), "steps": 5, "bank": 4}
    else:
        short = {"steps": 5, "queries": 40, "redraw": 20}
        settings = SETTINGS[name] | {key: short[key] for key in short.keys() & attacks.load(name)().settings().keys()}
    attack = attacks.load(name)(**settings)
    before, weights = torch.get_rng_state(), network.linear.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacked = attack.run(defense, images.clone(), labels, threat, STREAM)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights, network.linear.weight)
    assert attacked.shape == images.shape and attacked.dtype == torch.float32 and not attacked.requires_grad
    assert (attacked >= 0).all() and (attacked <= 1).all()
    assert (threat.size(attacked.double() - images.double()) <= threat.eps + 1e-6).all()
    assert torch.equal(attacked, attack.run(defense, images.clone(), labels, threat, STREAM))
    if name not in HANDS_BACK:
        assert ((attacked != images).flatten(1).any(1)).all() or not randomised  # A4: never the clean image


def test_autoattack_may_break_every_image_of_a_randomised_defence(parts):
    network, images, labels = parts
    defense = Smoothed(network, noise=Uniform(0.01), votes=1, shape=SHAPE)
    certain = defense.bank(16, 0).predict(images, STREAM).votes.gather(1, labels[:, None])[:, 0] == 16
    images, labels = images[certain], labels[certain]
    attacked = attacks.load("aa")(parts=("apgd-ce",), steps=10).run(defense, images, labels, Threat("linf", 0.3), STREAM)
    assert len(images) > 10 and (defense.predict(attacked, STREAM).labels != labels).all()


def sharp():
    """A network of large logits on 8x8, and four images."""
    network = build({"name": "tiny", "classes": 5, "channels": 1, "size": 8}, seed=3).eval()
    with torch.no_grad():
        network.head.weight.mul_(20)
    return network, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["pgd", "eot"])
def test_the_kept_iterate_is_the_best_on_held_apart_draws(name):
    """A step far too long makes the last iterate poor; what is returned must be at least as good as the start."""
    network, images = sharp()
    for defense in (
        Deterministic(network, shape=(1, 8, 8)),
        Smoothed(network, noise=Uniform(0.1), votes=4, shape=(1, 8, 8)),
    ):
        labels = defense.predict(images, STREAM).labels
        attack = attacks.load(name)(steps=7, step=1.0, draws=4, select_every=2, select_draws=64)
        threat = Threat("linf", 0.05)
        attacked = attack.run(defense, images, labels, threat, STREAM)
        fresh = Stream(5, "fresh")
        start = threat.start(images, STREAM.named("start0"))
        losses = [
            torch.stack([defense.gradient(x, labels, "ce", 64, fresh.skip(64 * k)).loss for k in range(2)]).mean(0)
            for x in (start, attacked)
        ]
        assert (losses[1] > losses[0] - 0.05).all()
        assert losses[1].mean() > losses[0].mean() + 0.05


@pytest.mark.parametrize("name", ["pgd", "eot"])
def test_the_last_iterate_is_not_handed_back_where_an_earlier_one_is_better(name):
    network, images = sharp()
    defense, threat = Deterministic(network, shape=(1, 8, 8)), Threat("linf", 0.3)
    settings = {"steps": 7, "step": 1.0, "draws": 4}
    labels = defense.predict(images, STREAM).labels
    kept, last = (
        defense.gradient(attack.run(defense, images, labels, threat, STREAM), labels, "ce", 1, STREAM).loss
        for attack in (attacks.load(name)(**settings), attacks.load("pgd-ablation")(of=name, keep="last", **settings))
    )
    assert (kept >= last - 1e-4).all() and kept.mean() > last.mean() + 0.05


def test_random_starts_fill_the_ball():
    images = torch.full((4000, *SHAPE), 0.5)
    for threat in (Threat("linf", 0.1), Threat("l2", 0.1)):
        start = threat.start(images, STREAM)
        sizes = threat.size(start - images)
        assert (sizes <= threat.eps + 1e-6).all() and sizes.max() > 0.95 * threat.eps
        assert (start - images).mean().abs() < 2e-3
        assert not torch.equal(start[0], start[1])


def test_projection_onto_the_l2_ball_is_the_nearest_point():
    threat, images = Threat("l2", 0.2), torch.full((3, *SHAPE), 0.5)
    far = images + torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    projected = threat.project(far, images)
    delta = (far - images) / (far - images).flatten(1).norm(dim=1)[:, None, None, None] * 0.2
    assert torch.allclose(projected, images + delta, atol=1e-6)
    assert torch.equal(threat.project(images + 0.01, images), images + 0.01)


@pytest.mark.parametrize("names", [("linf8-quick", "linf08-quick", "linf8.0-quick"), ("l2-0.5", "l2-.5", "l2-0.50")])
def test_a_threat_has_one_name(names):
    assert {parse_suite(name).shown for name in names} == {names[0]}


@pytest.mark.parametrize(
    ("name", "norm", "eps", "quick"),
    [
        ("linf8", "linf", 8 / 255, False),
        ("linf25.5", "linf", 0.1, False),
        ("l2-0.5-quick", "l2", 0.5, True),
        ("l2-1/2", "l2", 0.5, False),
    ],
)
def test_suite_names(name, norm, eps, quick):
    suite = parse_suite(name)
    assert (suite.norm, suite.quick) == (norm, quick) and suite.eps == pytest.approx(eps)
    assert ("aa" in suite.columns) != quick and ("apgd" in suite.columns) == quick


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("linf8/255", "linf8 for 8/255"),
        ("linf4/255-quick", "linf4-quick for 4/255"),
        ("linf0.031", "linf8 for"),
        ("linf0.0157", "linf4 for"),
        ("linf.1", "linf26 for"),
        ("linf0", "linf8 for"),
        ("linf0.0001", "linf8 for"),
        ("linf256", "at most 255"),
        ("l2-8", "linf8 for 8/255 in l-inf"),
        ("l2-0", "l2-0.5"),
        ("l2-128", "linf128"),
        ("l2-1/0", "not a number"),
        ("linf1.2.3", "not a number"),
        ("linf-8", "linf8"),
    ],
)
def test_a_radius_that_was_meant_otherwise_is_refused(name, meant):
    with pytest.raises(BadInput, match=meant):
        parse_suite(name)


@pytest.mark.parametrize(
    ("only", "shown"),
    [
        ((), "linf8-quick"),
        (("clean", "pgd"), "linf8-quick without eot, apgd, square"),
        (("clean", "pgd", "eot", "apgd", "square", "aa"), "linf8-quick with aa"),
    ],
)
def test_the_name_of_a_suite_says_what_is_run(only, shown):
    suite = parse_suite("linf8-quick", only)
    assert suite.shown == shown and is_quick(suite.shown) and not is_quick("linf8 with linf8-quick")


@pytest.mark.parametrize(
    ("column", "setting", "value"),
    [
        ("eot", "draws", "-1"),
        ("pgd", "step", "-1"),
        ("pgd", "step", "0"),
        ("pgd", "steps", "inf"),
        ("eot", "select_draws", "0"),
        ("eot-apgd-t", "targets", "0"),
        ("pgd-published", "draws", "-1"),
        ("pgd", "loss", "margin-to"),
        ("apgd", "parts", "apgd"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name(column, setting, value):
    with pytest.raises(BadInput, match=rf"{column}\.{setting}=.*{value}|named '{value}'"):
        parse_suite("linf8-quick", only=("clean", column), overrides={f"{column}.{setting}": value})


def test_suite_overrides_and_errors():
    assert parse_suite("linf8", overrides={"pgd.steps": "40"}).columns["pgd"] == {"steps": "40"}
    assert list(parse_suite("linf8", only=("clean", "pgd")).columns) == ["clean", "pgd"]
    for call, says in (
        (lambda: parse_suite("linf"), "linf8"),
        (lambda: parse_suite("linf8", only=("pdg",)), "did you mean 'pgd'"),
        (lambda: parse_suite("linf8", overrides={"steps": 1}), "attack.setting"),
    ):
        with pytest.raises(BadInput, match=says):
            call()


def test_published_defaults():
    """PGD-20 with 2/255 at 8/255; EOT-PGD-100 with 64 fresh draws and 2.5 eps / T."""
    pgd, eot = attacks.load("pgd")(), attacks.load("eot")()
    assert (pgd.steps, pgd.step * 8 / 255, pgd.random_start, pgd.draws) == (20, pytest.approx(2 / 255), True, 0)
    assert (eot.steps, eot.step, eot.draws) == (100, pytest.approx(2.5 / 100), 64)
