"""The inner attack: exact on linear models, in its ball and box, and a guest that leaves the network as it was."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rush_bench.errors import RushBenchError
from rush_bench.networks import build
from rush_bench.threats import Threat
from rush_bench.training.inner import InnerSettings, attack_mode, frozen_running_statistics, pgd

STEPS = {"step": 0.025, "steps": 10}
SIZES = {"eps": 0.1, **STEPS}
LINF = Threat("linf", 0.1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=seeded(1))


def small_network() -> nn.Module:
    return build({"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8}, seed=3)


@pytest.mark.parametrize("start", ["uniform", "zero", "gaussian"])
def test_linf_is_exact_on_a_linear_objective(start):
    x, w = some_images(), torch.randn(6, 1, 8, 8, generator=seeded(2))
    attacked = pgd(lambda v: (w * v).sum(), x, LINF, **STEPS, generator=seeded(), start=start)
    torch.testing.assert_close(attacked, (x + 0.1 * w.sign()).clamp(0, 1))


@pytest.mark.parametrize("start", ["uniform", "zero", "gaussian"])
def test_l2_is_exact_on_a_linear_objective(start):
    x, w = some_images(), torch.randn(6, 1, 8, 8, generator=seeded(2))
    attacked = pgd(
        lambda v: (w * v).sum(), x, Threat("l2", 0.5), step=0.2, steps=60, generator=seeded(), start=start, box=False
    )
    torch.testing.assert_close(attacked, x + 0.5 * w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "zero", "gaussian"])
@pytest.mark.parametrize("steps", [0, 3])
def test_raises_the_loss_inside_ball_and_box(norm, start, steps):
    network, x, y = small_network().eval(), some_images(), torch.arange(6)
    threat = Threat(norm, 0.1 if norm == "linf" else 0.8)

    def objective(v):
        return nn.functional.cross_entropy(network(v), y, reduction="sum")

    before = x.clone()
    attacked = pgd(objective, x, threat, step=threat.eps / 2, steps=steps, generator=seeded(), start=start)
    assert torch.equal(x, before) and not attacked.requires_grad and attacked.dtype == x.dtype
    assert (
        float(threat.size(attacked - x).amax()) <= threat.eps + 1e-6
        and float(attacked.min()) >= 0
        and float(attacked.max()) <= 1
    )
    assert all(weight.grad is None for weight in network.parameters())
    if steps:
        assert float(objective(attacked).detach()) > float(objective(x).detach()) + 0.1
    else:
        assert (start == "zero") == torch.equal(attacked, x)


def test_the_start_fills_the_ball():
    x = torch.full((200, 1, 8, 8), 0.5)
    linf = pgd(lambda v: v.sum(), x, LINF, step=0, steps=0, generator=seeded()) - x
    assert -0.1 <= float(linf.min()) < -0.099 and 0.099 < float(linf.max()) <= 0.1 + 1e-6 and abs(float(linf.mean())) < 1e-3
    ball = Threat("l2", 0.3)
    l2 = ball.size(pgd(lambda v: v.sum(), x, ball, step=0, steps=0, generator=seeded()) - x)
    assert float(l2.max()) <= 0.3 + 1e-6 and float(l2.mean()) == pytest.approx(0.15, abs=0.02)
    jitter = pgd(lambda v: v.sum(), x, LINF, step=0, steps=0, generator=seeded(), start="gaussian") - x
    assert float(jitter.std()) == pytest.approx(1e-3, rel=0.05)


def test_images_do_not_see_each_other_and_the_generator_decides():
    network, x, y = small_network().eval(), some_images(), torch.arange(6)

    def run(x, y, seed=0):
        loss = lambda v: nn.functional.cross_entropy(network(v), y, reduction="sum")  # noqa: E731
        return pgd(loss, x, LINF, **STEPS, generator=seeded(seed), start="zero" if seed == 9 else "uniform")

    assert torch.equal(run(x, y), run(x, y)) and not torch.equal(run(x, y), run(x, y, 1))
    torch.testing.assert_close(run(x, y, 9)[:2], run(x[:2], y[:2], 9))


MODES = {"eval": (False, False), "train": (True, True), "batch": (True, False)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("was_training", [True, False])
def test_attack_mode_uses_and_moves_statistics_as_it_says_and_leaves_no_trace(mode, was_training):
    network, x = small_network().train(was_training), some_images()
    network.encoder.conv1.weight.requires_grad_(False)
    network.encoder.layer1.eval()
    flags = [module.training for module in network.modules()]
    wanted = [weight.requires_grad for weight in network.parameters()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    uses_batch, moves = (value and was_training for value in MODES[mode])
    with attack_mode(network, mode):
        assert not any(weight.requires_grad for weight in network.parameters())
        alone, together = network(x[:2]), network(x)[:2]
    assert torch.allclose(alone, together, atol=1e-5) is not uses_batch
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if ("running" in key or "tracked" in key) and "layer1" not in key}  # layer1 is frozen
    assert moved == (statistics if moves else set())
    assert [module.training for module in network.modules()] == flags
    assert [weight.requires_grad for weight in network.parameters()] == wanted


@pytest.mark.parametrize("mode", MODES)
def test_attack_mode_restores_after_an_error(mode):
    network = small_network()
    with pytest.raises(RuntimeError, match="on purpose"), attack_mode(network, mode):
        raise RuntimeError("on purpose")
    assert all(weight.requires_grad for weight in network.parameters()) and network.training
    assert all(part.track_running_stats for part in network.modules() if isinstance(part, nn.BatchNorm2d))


def test_untracked_gives_train_mode_outputs_and_gradients():
    network, x = small_network().train(), some_images()
    before = network.encoder.bn1.running_mean.clone()
    with frozen_running_statistics(network):
        inside = network(x)
    assert torch.equal(network.encoder.bn1.running_mean, before) and inside.requires_grad
    assert int(network.encoder.bn1.num_batches_tracked) == 0
    torch.testing.assert_close(inside, network(x))
    assert not torch.equal(network.encoder.bn1.running_mean, before)


class Syncs(TorchDispatchMode):
    """Notes operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select", "_unique")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_waits_for_the_device_once(mode):
    """At its end, to learn whether every gradient was finite, however many steps it had."""
    network, x, y = small_network(), some_images(), torch.arange(6)
    with Syncs() as syncs:
        settings = InnerSettings(**SIZES, mode=mode)
        settings.run(network, lambda v: nn.functional.cross_entropy(network(v), y, reduction="sum"), x, seeded())
    assert len(syncs.seen) == 1
    with Syncs() as syncs:
        x.sum().item()
    assert syncs.seen  # the watch works


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_names_the_row(norm, value):
    slope = torch.ones(6, 1, 8, 8)
    slope[4, 0, 3, 3] = value
    with pytest.raises(RushBenchError, match="image 4 of the batch is not finite"):
        pgd(lambda v: (slope * v).sum(), some_images(), Threat(norm, 0.1), **STEPS, generator=seeded())
