"""The indicators of attack failure: sound defences pass all six, each way to fail raises its own, figures by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from rush_bench.audit import indicators as module
from rush_bench.audit.indicators import Path, indicators
from rush_bench.defenses import Defense, Deterministic, Smoothed
from rush_bench.noise import Stream, Uniform
from rush_bench.threats import Threat

SHAPE, STREAM, THREAT = (1, 4, 4), Stream(0, "indicators"), Threat("linf", 0.025)
NAMES = {
    "unavailable-gradients",
    "unstable-predictions",
    "silent-success",
    "incomplete-optimisation",
    "transfer-failure",
    "unconstrained-attack-failure",
}


class Wrapped(nn.Module):
    """A network between a function of the images and one of the logits."""

    def __init__(self, network, before=lambda x: x, after=lambda x, z: z):
        super().__init__()
        self.network, self.before, self.after = network, before, after
        self.eval()

    def forward(self, x):
        return self.after(x, self.network(self.before(x)))


@pytest.fixture
def parts(linear, grey):
    return linear, grey.floats(), grey.labels


def run(network, images, labels, threat=THREAT, **settings):
    defense = network if isinstance(network, Defense) else Deterministic(network, shape=SHAPE)
    return {f.check: f for f in indicators(defense, images, labels, threat, STREAM, **settings)}


def flagged(found):
    return {name for name, finding in found.items() if finding.status == "flag"}


def made(right, margin, seen_wrong=None, kept=None, size=None):
    """A path from rows of points, (T+1, n)."""
    right, margin = torch.tensor(right), torch.tensor(margin)
    ones = torch.ones_like(margin)
    kept = torch.tensor(kept) if kept is not None else torch.full((right.shape[1],), len(right) - 1)
    seen = torch.tensor(seen_wrong) if seen_wrong is not None else None
    size = ones if size is None else torch.tensor(size)
    return Path(right, margin, ones, size, seen, kept, torch.full((right.shape[1], 1, 2, 2), 0.5))


@pytest.mark.parametrize("threat", [THREAT, Threat("l2", 0.06)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "smoothed", "mlp"])
def test_sound_defences_pass_all_six(parts, kind, threat):
    network, images, labels = parts
    if kind == "mlp":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
        optimiser = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(200):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(8 * (images - 0.5)), labels).backward()
            optimiser.step()
        network = Wrapped(network, before=lambda x: 8 * (x - 0.5))
        assert (network(images).argmax(1) == labels).all()
    if kind == "smoothed":
        network = Smoothed(network, noise=Uniform(0.05), votes=8, shape=SHAPE)
    found = run(network, images, labels, threat)
    assert set(found) == NAMES and {f.status for f in found.values()} == {"pass"}
    assert found["unconstrained-attack-failure"].figure == 0


def test_killed_gradients(parts):
    network, images, labels = parts
    found = run(Wrapped(network, before=lambda x: (x * 255).round() / 255), images, labels)
    assert found["unavailable-gradients"].figure == 1
    # the attack does not leave its random start: what the start with the whole box leaves right stays right
    start = Threat("linf", 1.0).start(images, STREAM.named("boundless").named("start"))
    left = (network((start * 255).round() / 255).argmax(1) == labels).float().mean()
    assert found["unconstrained-attack-failure"].figure == pytest.approx(float(left)) and left > 0.2
    assert {"unavailable-gradients", "unconstrained-attack-failure"} <= flagged(found)


def test_a_defence_without_any_gradient_fails_the_first_and_runs_no_other(parts):
    network, images, labels = parts

    class Closed(Deterministic):
        def gradient(self, *args):
            raise NotImplementedError("a black box")

    found = run(Closed(network, shape=SHAPE), images, labels)
    assert set(found) == NAMES and found.pop("unavailable-gradients").status == "flag"
    assert {f.status for f in found.values()} == {"not run"} and all("a black box" in f.note for f in found.values())

    class Broken(Deterministic):
        def gradient(self, *args):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(Broken(network, shape=SHAPE), images, labels)


def test_variability_of_a_linear_margin_is_its_slope_times_the_way(parts):
    """Two classes: the margin is v.x + c, so that it changes by |v.delta| whatever the image."""
    network, images, _ = parts
    two = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        two[1].weight.copy_(network.linear.weight[:2] / 8), two[1].bias.copy_(network.linear.bias[:2] / 8)
    labels = two(images).argmax(1)
    half = Threat("linf", THREAT.eps / 2)
    found = module.unstable_predictions(Deterministic(two, shape=SHAPE), images, labels, THREAT, STREAM, 3, 1)
    slope = (two[1].weight[0] - two[1].weight[1]).detach()
    margin = (images.flatten(1) @ slope + (two[1].bias[0] - two[1].bias[1]).detach()).abs()
    ways = torch.stack([(half.start(images, STREAM.named(f"near{k}")) - images).flatten(1) for k in range(3)])
    expected = ((ways @ slope).abs().mean(0) / margin).clamp_max(1).mean()
    assert found.figure == pytest.approx(float(expected), rel=1e-3) and 0.01 < expected < 0.5


def test_a_jagged_loss_is_unstable(parts):
    """A bonus of 40 on the label's logit or against it, by the last digits of the pixels' sum."""
    network, images, labels = parts

    def jagged(x, z):
        sign = torch.sin(2000 * x.flatten(1).sum(1)).sign()[:, None]
        return z + 40 * sign * torch.nn.functional.one_hot(network(x).argmax(1), 5)

    assert "unstable-predictions" in flagged(run(Wrapped(network, after=jagged), images, labels))
    assert "unstable-predictions" not in flagged(run(network, images, labels))


def test_silent_success_by_hand():
    """Four images: broken; never broken; broken on the way and lost; broken at the point kept, right at the last."""
    right = [[True, True, False, False], [False, True, True, True]]
    path = made(right, [[0.0] * 4] * 2, kept=[1, 1, 1, 0])
    found = module.silent_success(path)
    assert found.figure == 0.25 and found.status == "flag"
    assert module.silent_success(made(right, [[0.0] * 4] * 2, kept=[1, 1, 0, 0])).figure == 0


def test_incomplete_optimisation_by_hand():
    """Thirty points: still climbing; climbing but broken; at rest; climbing by less than 5 % of the rise in the last ten."""
    climb = torch.arange(1.0, 31)
    rest = climb.clamp_max(15)
    nearly = torch.where(climb <= 20, climb * 5, 100 + 0.4 * (climb - 20))
    margin = torch.stack([climb, climb, rest, nearly], 1).tolist()
    path = made([[True, False, True, True]] * 30, margin)
    found = module.incomplete_optimisation(path, torch.zeros(4))
    assert found.figure == 0.25 and found.status == "flag" and "last 10 steps" in found.what
    falling = made([[True] * 4] * 30, (-torch.stack([climb] * 4, 1)).tolist())
    assert module.incomplete_optimisation(falling, torch.zeros(4)).figure == 0  # worse than the clean image throughout


def test_too_few_steps_are_incomplete(parts, worst_margin):
    """Steps too short to reach the edge of the ball, on images that cannot be broken."""
    network, images, labels = parts
    safe = worst_margin(network, images, labels, "linf", THREAT.eps) > 0
    found = run(network, images[safe], labels[safe], steps=12, step=0.02)
    assert flagged(found) == {"incomplete-optimisation"}
    assert found["incomplete-optimisation"].figure > 0.9
    assert not flagged(run(network, images[safe], labels[safe]))


def test_transfer_failure_of_a_surrogate(parts):
    """Gradients of another network: what breaks that one does not break the one that predicts."""
    network, images, labels = parts
    other = Wrapped(network, after=lambda x, z: z.flip(1))  # it calls nearly every image another class at once
    surrogate, defense = Deterministic(other, shape=SHAPE), Deterministic(network, shape=SHAPE)
    defense.gradient = surrogate.gradient
    path = module.walk(defense, images, labels, THREAT, STREAM, 5, 0.25, 1, "ce", 1)
    found = module.transfer_failure(defense, path, labels, STREAM, 1)
    wrong, right = (net(path.attacked).argmax(1) != labels for net in (other, network))
    assert found.figure == pytest.approx(float((wrong & ~right).double().mean())) and found.figure > 0.3
    assert found.status == "flag"
    defense = Deterministic(network, shape=SHAPE)
    assert run(defense, images, labels)["transfer-failure"].figure == 0
    honest = defense.gradient
    defense.gradient = lambda *args: dataclasses.replace(honest(*args), scores=None)
    assert run(defense, images, labels)["transfer-failure"].status == "not run"


def test_unconstrained_by_hand():
    """Five classes: 1 image in 5 left is chance, 2 in 5 are not. An image broken anywhere on the path is broken."""
    defense = type("Five", (Defense,), {"classes": 5})()
    rows = [[True, True, True, True, True], [True, False, False, False, True], [False, True, True, True, True]]
    assert module.unconstrained_failure(defense, made(rows, [[0.0] * 5] * 3)).figure == pytest.approx(0.2)
    assert module.unconstrained_failure(defense, made(rows, [[0.0] * 5] * 3)).status == "pass"
    rows[1][1] = True
    found = module.unconstrained_failure(defense, made(rows, [[0.0] * 5] * 3))
    assert found.figure == pytest.approx(0.4) and found.status == "flag"
