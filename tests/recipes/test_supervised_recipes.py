"""Supervised systems: each loss against a loop, each inner attack in its ball, BatchNorm statistics as the recipe says."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.recipes import dataaug, free, noise_sup, pgd_at, smoothadv, ssp, standard, trades
from rush_bench.settings import override
from rush_bench.threats import Threat
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import learning_rate, make_optimiser
from rush_bench.training.stage import Batch, Context

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "classes": 4}
STEPS = {"attack.eps": 0.1, "attack.step": 0.05, "attack.steps": 3}


def pictures(count: int = 24, split: str = "train"):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    return as_images(pixels, torch.arange(count) % 4, name="random", split=split)


def a_stage(module, members: int = 1, **changes):
    """The (last) stage of a recipe on random images, and its settings."""
    recipe = module.make(module.__name__.rpartition(".")[2])
    small = {"train.batch_size": 16, "train.padding": 1} if hasattr(recipe.settings, "train") else {}
    settings = override(recipe.settings, small, {key.replace("__", "."): value for key, value in changes.items()})
    splits = {"train": pictures(), "val": pictures(12, "val")}
    plan = recipe.plans(settings)[-1]
    return plan.make(Context(build({**SPEC, "members": members}), settings, splits, seed=0)), plan.settings


def a_batch(stage, count: int = 16, epoch: int = 0, step: int = 0, replay: int = 0):
    return Batch(stage.splits["train"], torch.arange(count), seeded(step), epoch, step, replay)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def attacks(monkeypatch):
    """Every attack that runs through InnerSettings: images, x', and the objective at x, at random noise and at x'."""
    seen, real = [], InnerSettings.run

    def spy(own, module, objective, images, generator):
        attacked = real(own, module, objective, images, generator)
        noise = own.eps * (2 * torch.rand(images.shape, generator=seeded(99)) - 1)
        with attack_mode(module, own.mode), torch.no_grad():
            losses = [float(objective(v)) for v in (images, (images + noise).clamp(0, 1), attacked)]
        seen.append((images, attacked, losses))
        return attacked

    monkeypatch.setattr(InnerSettings, "run", spy)
    return seen


# Forward passes of one step, and those of them that move BatchNorm's running statistics.
PASSES = {
    "pgd_at": (pgd_at, STEPS, 3 + 1, 1),
    "pgd_at in train mode": (pgd_at, STEPS | {"attack.mode": "train"}, 3 + 1, 4),
    "trades": (trades, STEPS, 1 + 3 + 3, 3),
    "trades in train mode": (trades, STEPS | {"attack.mode": "train"}, 1 + 3 + 3, 7),
    "standard": (standard, {}, 1, 1),
    "noise_sup": (noise_sup, {}, 1, 1),
    "free": (free, {}, 1, 1),
    "smoothadv": (smoothadv, {"network.mean": (), "network.std": (), "attack.steps": 3}, 3 + 1, 1),
    "smoothadv, DDN": (smoothadv, {"attack.steps": 3, "attack.method": "ddn"}, 3 + 1, 1),
    "dataaug": (dataaug, STEPS, 3 + 2, 1),
    "dataaug without CutMix": (dataaug, STEPS | {"train.cutmix": False}, 1 + 3 + 2, 1),
    "dataaug with signs": (dataaug, STEPS | {"attack.method": "sign"}, 3 + 2, 1),
    "ssp": (ssp, {"finetune_attack.steps": 3, "finetune.batch_size": 16}, 3 + 1, 3 + 1),
}


@pytest.mark.parametrize("case", PASSES)
def test_passes_and_statistics_of_a_step(case):
    module, changes, forwards, moving = PASSES[case]
    members = 3 if module is ssp else 1
    stage, _ = a_stage(module, members, **changes)
    encoder = stage.network.encoder.members[0] if members > 1 else stage.network.encoder
    count = []
    encoder.conv1.register_forward_hook(lambda *_: count.append(1))
    stage.begin_epoch(0)
    batch = a_batch(stage)
    if module is free:
        stage.backward(batch)
    else:
        loss = stage.loss(batch)
        assert all(weight.grad is None for weight in stage.parameters())  # the attack left none
        loss.backward()
    assert len(count) == forwards and int(encoder.bn1.num_batches_tracked) == moving
    assert all(weight.grad is not None for weight in stage.network.parameters())
    assert all(part.training for part in stage.network.modules())


@pytest.mark.parametrize("module", [pgd_at, trades, ssp])
def test_the_attack_raises_its_objective_inside_ball_and_box(module, attacks):
    changes = STEPS if module is not ssp else {"finetune_attack.eps": 0.1, "finetune_attack.step": 0.05, "finetune.padding": 1}
    stage, _ = a_stage(module, 3 if module is ssp else 1, **changes)
    stage.begin_epoch(0)
    stage.loss(a_batch(stage))
    x, attacked, (clean, random, worst) = attacks[0]
    assert float((attacked - x).abs().max()) <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert worst > 1.01 * max(clean, random)


def softmax(row) -> list[float]:
    powers = [math.exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


def test_pgd_at_is_cross_entropy_on_the_attacked(attacks):
    stage, _ = a_stage(pgd_at, **STEPS)
    stage.begin_epoch(0)
    loss, labels = float(stage.loss(a_batch(stage)).detach()), stage.splits["train"].labels[:16].tolist()
    with torch.no_grad():
        rows = [softmax(row) for row in stage.network(attacks[0][1]).double().tolist()]
    assert loss == pytest.approx(-sum(math.log(p[y]) for p, y in zip(rows, labels, strict=True)) / 16, abs=1e-5)


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence(attacks):
    stage, _ = a_stage(trades, **STEPS)
    stage.begin_epoch(0)
    loss, labels = float(stage.loss(a_batch(stage)).detach()), stage.splits["train"].labels[:16].tolist()
    x, attacked, _ = attacks[0]
    with torch.no_grad():
        clean, moved = ([softmax(row) for row in stage.network(v).double().tolist()] for v in (x, attacked))
    expected = 0.0
    for p, q, y in zip(clean, moved, labels, strict=True):
        expected += -math.log(p[y]) + 6 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert loss == pytest.approx(expected / 16, abs=1e-4)


def test_noise_sup_adds_noise_last_once_and_does_not_clip(monkeypatch):
    stage, _ = a_stage(noise_sup, train__augment="none")
    seen = []
    monkeypatch.setattr(stage.network, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 4, requires_grad=True))
    loss = stage.loss(a_batch(stage)).detach()
    added = seen[0] - stage.splits["train"].floats(slice(16))
    assert float(loss) == pytest.approx(math.log(4)) and len(seen) == 1
    assert 0.29 < float(added.abs().max()) <= 0.3001 and seen[0].min() < 0 and seen[0].max() > 1


@pytest.mark.parametrize("module", [noise_sup, smoothadv])
def test_smoothed_systems_need_a_law(module):
    recipe = module.make(module.__name__.rpartition(".")[2])
    with pytest.raises(BadInput, match="noise=gaussian"):
        recipe.plans(override(recipe.settings, {"noise": "none"}))
    with pytest.raises(BadInput, match="noise=gaussian"):
        recipe.plans(override(recipe.settings, {"noise": "uniform:0"}))


def test_free_replays_a_mini_batch_and_carries_its_perturbation():
    stage, settings = a_stage(free, train__replays=3, attack__eps=0.1)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    twin = build(SPEC)
    twin.load_state_dict(stage.network.state_dict())
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    delta, views = torch.zeros(16, 1, 8, 8), []
    stage.begin_epoch(0)
    for step in range(6):
        batch = a_batch(stage, step=step, replay=step % 3)
        views.append(stage.inputs(batch))
        moved = views[-1] + delta
        x = moved.clamp(0, 1).requires_grad_()
        other.zero_grad()
        F.cross_entropy(twin(x), batch.labels).backward()
        other.step()
        stays = (moved < 0) | (moved > 1)  # the gradient goes through the clip (ImageNet code: clamp_; TF code: clip_by_value)
        delta = torch.where(stays, delta, (delta + 0.1 * x.grad.sign()).clamp(-0.1, 0.1))
        assert stays.any() or step == 0
        train_step(stage, optimiser, batch)
    torch.testing.assert_close(stage.network.state_dict(), twin.state_dict(), atol=1e-5, rtol=1e-4)
    assert float((stage.delta - delta).abs().gt(1e-6).float().mean()) < 0.01  # a sign may differ where a gradient is 0
    assert torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])
    assert "delta" in stage.state_dict()  # a checkpoint has it


def test_free_takes_both_gradients_from_one_backward_pass(monkeypatch):
    """S2.6: a replay costs one forward and one backward pass, and no gradient by itself."""
    stage, _ = a_stage(free, attack__eps=0.1)
    passes, real = [], torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **keys: passes.append("backward") or real(*args, **keys))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **keys: passes.append("grad"))
    stage.network.encoder.conv1.register_forward_hook(lambda *_: passes.append("forward"))
    stage.begin_epoch(0)
    stage.backward(a_batch(stage))
    assert passes == ["forward", "backward"]
    assert all(weight.grad is not None for weight in stage.network.parameters())
    assert float(stage.delta.abs().max()) == pytest.approx(0.1) and float((stage.delta != 0).float().mean()) > 0.5


def test_smoothed_loss_equals_the_loop():
    logits = torch.randn(5, 7, 4, generator=seeded(), dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, 3, 0])
    expected = [-math.log(sum(softmax(draw)[y] for draw in rows) / 7) for rows, y in zip(logits.tolist(), labels, strict=True)]
    assert smoothadv.smoothed_loss(logits, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_ddn_finds_the_nearest_boundary_of_a_plane():
    w = torch.randn(64, generator=seeded(1))
    x = 0.5 + 0.02 * torch.randn(12, 1, 8, 8, generator=seeded(2))
    score = (x.flatten(1) - 0.5) @ w
    labels = (score > 0).long()

    def logits(v):
        s = (v.flatten(1) - 0.5) @ w
        return torch.stack([-s, s], 1)[:, None].expand(-1, 3, -1)

    attacked = smoothadv.ddn(logits, x, labels, eps=0.3, steps=200)
    distance = (attacked - x).flatten(1).norm(dim=1)
    exact = score.abs() / w.norm()
    assert torch.all(logits(attacked)[:, 0].argmax(1) != labels) and torch.all(distance >= exact - 1e-5)
    assert float((distance - exact).max()) < 0.02
    assert float((attacked - x).flatten(1).norm(dim=1).max()) <= 0.3 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(smoothadv.ddn(logits, x, labels, eps=1e-4, steps=2), x)  # nothing found: the clean image


@pytest.mark.parametrize("method", ["pgd", "ddn"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_smoothadv_fixes_its_draws_trains_on_them_and_ramps_eps(method, epoch):
    stage, _ = a_stage(smoothadv, attack__method=method, attack__eps=1.0, attack__ramp=2, attack__steps=4, attack__draws=4)
    seen = []
    real = stage.scores
    stage.scores = lambda x, noise: seen.append((x.detach().clone(), noise)) or real(x, noise)
    stage.begin_epoch(epoch)
    batch = a_batch(stage, epoch=epoch, replay=1)
    loss = stage.loss(batch)
    assert len(seen) == 4 + 1 and all(noise is seen[0][1] for _, noise in seen)
    (x, noise), (attacked, _) = seen[0], seen[-1]
    assert noise.shape == (4, 4, 1, 8, 8) and float(noise.std()) == pytest.approx(0.12, rel=0.1)
    assert float((attacked - x).flatten(1).norm(dim=1).max()) <= min(1, (epoch + 1) / 2) + 1e-5
    assert attacked.min() >= 0 and attacked.max() <= 1 and (method == "ddn" or (attacked - x).abs().max() > 0)
    with torch.no_grad():
        rows = [softmax(row) for row in real(attacked, noise).flatten(0, 1).double().tolist()]
    labels = batch.labels[4:8].repeat_interleave(4).tolist()  # the second of four mini-batches, each image four times
    expected = -sum(math.log(p[y]) for p, y in zip(rows, labels, strict=True)) / 16
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)


def test_smoothadv_attacks_raise_the_smoothed_loss():
    stage, _ = a_stage(smoothadv, attack__eps=1.0, attack__ramp=0)
    x, y = stage.splits["train"].floats(slice(8)), stage.splits["train"].labels[:8]
    noise = 0.12 * torch.randn(8, 2, 1, 8, 8, generator=seeded())
    attacked = stage.attacked(x, y, noise, a_batch(stage))
    stage.eval()
    with torch.no_grad():
        clean, moved = (smoothadv.smoothed_loss(stage.scores(v, noise), y).mean() for v in (x, attacked))
    assert float(moved) > 1.02 * float(clean)


def test_an_epoch_of_smoothadv_sees_every_image_once():
    stage, _ = a_stage(smoothadv, attack__draws=3)
    rows = torch.arange(16)
    assert stage.replays == 3 and sorted(int(r) for k in range(3) for r in rows.tensor_split(3)[k]) == list(range(16))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("method", ["adam", "sign"])
def test_data_augmentation_attacks_and_loss(method, mixed, monkeypatch):
    """S2.9: away from the mixed labels, or else from the clean prediction; then TRADES, its targets soft, by a loop."""
    stage, _ = a_stage(dataaug, **STEPS, attack__method=method, train__cutmix=mixed, train__augment="none")
    stage.begin_epoch(0)
    tracked = stage.network.encoder.bn1.num_batches_tracked
    seen, real = [], stage.attacked

    def spy(x, targets, generator):
        attacked = real(x, targets, generator)
        assert int(tracked) == 0 and all(weight.grad is None for weight in stage.parameters())
        seen.append((x, targets, attacked))
        return attacked

    monkeypatch.setattr(stage, "attacked", spy)
    loss = float(stage.loss(a_batch(stage)).detach())
    ((x, targets, attacked),) = seen
    assert float((attacked - x).abs().max()) <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1

    noise = (x + 0.1 * (2 * torch.rand(x.shape, generator=seeded(99)) - 1)).clamp(0, 1)
    with attack_mode(stage.network, "batch"), torch.no_grad():
        clean, shaken, moved = ([softmax(row) for row in stage.network(v).double().tolist()] for v in (x, noise, attacked))
    goals = targets.tolist() if mixed else clean

    def gap(rows) -> float:
        """The mean cross-entropy to the goal of the attack: the divergence up to a constant."""
        return -sum(t * math.log(q) for goal, row in zip(goals, rows, strict=True) for t, q in zip(goal, row, strict=True)) / 16

    assert gap(moved) > 1.01 * max(gap(clean), gap(shaken))
    expected = 0.0
    for p, q, goal in zip(clean, moved, targets.tolist(), strict=True):
        expected -= sum(t * math.log(a) for t, a in zip(goal, p, strict=True))
        expected += 6 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert loss == pytest.approx(expected / 16, rel=1e-4)


def test_adam_ascent_equals_torchs_adam_with_projections():
    target, x = torch.randn(4, 1, 8, 8, generator=seeded(1)), torch.rand(4, 1, 8, 8, generator=seeded(2))
    own = dataaug.AdamAttackSettings(eps=0.3, step=0.02, late_step=0.002, steps=10, start="zero")
    ours = dataaug.adam_ascent(lambda v: (target * v).square().sum(), x, own, seeded())
    theirs = x.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.02, maximize=True)
    for step in range(10):
        adam.param_groups[0]["lr"] = 0.02 if step < 5 else 0.002
        adam.zero_grad()
        (target * theirs).square().sum().backward()
        adam.step()
        theirs.data = Threat("linf", 0.3).project(theirs.data, x)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_is_one_box_and_labels_by_its_area(seed):
    x = torch.arange(5.0)[:, None, None, None].expand(5, 2, 6, 8) / 5
    mixed, targets = dataaug.cutmix(x, torch.eye(5), seeded(seed))
    inside = (mixed != x).any(1).any(0)  # where another image shows, in any of the five
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    if len(rows):
        assert inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    share = float(inside.float().mean())
    for i in range(5):
        found = torch.tensor([float((mixed[i, 0] == k / 5).float().mean()) for k in range(5)])
        torch.testing.assert_close(targets[i], found, atol=1e-6, rtol=0)
        assert float(targets[i].sum()) == pytest.approx(1) and float(targets[i, i]) >= 1 - share - 1e-6


def test_cutmix_boxes_cover_what_lambda_says_on_average():
    x = torch.zeros(2, 1, 32, 32)
    kept = [float(dataaug.cutmix(x, torch.eye(2), seeded(s))[1].max()) for s in range(300)]
    assert 0.6 < sum(kept) / 300 < 0.9 and min(kept) < 0.55  # lambda is uniform; boxes lose what lies outside


def test_the_average_of_weights_is_what_is_judged_and_kept():
    stage, settings = a_stage(dataaug, **STEPS)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    expected = {key: value.clone() for key, value in stage.network.named_parameters()}
    stage.begin_epoch(0)
    for step in range(3):
        train_step(stage, optimiser, a_batch(stage, step=step))
        keep = (1 + step) / (10 + step)
        expected = {k: keep * expected[k] + (1 - keep) * v.detach() for k, v in stage.network.named_parameters()}
    torch.testing.assert_close(dict(stage.average.named_parameters()), expected, atol=1e-6, rtol=1e-5, check_stride=False)
    assert torch.equal(stage.average.encoder.bn1.running_mean, stage.network.encoder.bn1.running_mean)
    assert not any(weight.requires_grad for weight in stage.average.parameters())
    kept = {key: value.clone() for key, value in stage.weights().items()}
    stage.finish()
    stage.finish()
    assert all(torch.equal(value, kept[key]) for key, value in stage.network.state_dict().items())


def test_the_average_forgets_at_its_rate_in_the_long_run():
    stage, _ = a_stage(dataaug)
    before = stage.average.head.weight.clone()
    stage.after_step(a_batch(stage, step=10_000))
    assert torch.equal(stage.average.head.weight, before)  # equal weights stay
    stage.network.head.weight.data.add_(1)
    stage.after_step(a_batch(stage, step=10_000))
    torch.testing.assert_close(stage.average.head.weight, before + 0.005)


def test_decay_leaves_batchnorm_alone():
    stage, settings = a_stage(dataaug)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    decays = {id(w): group["weight_decay"] for group in optimiser.param_groups for w in group["params"]}
    assert set(decays) == {id(weight) for weight in stage.network.parameters()}
    norm, convolution = stage.network.encoder.bn1, stage.network.encoder.conv1
    assert decays[id(norm.weight)] == decays[id(norm.bias)] == 0 and decays[id(convolution.weight)] == 5e-4
    assert decays[id(stage.network.head.bias)] == 5e-4


def generated_file(path, count=40, labels=None, side=8, keys=("image", "label")):
    values = (np.full((count, side, side, 1), 255, np.uint8), np.arange(count) % 4 if labels is None else labels)
    np.savez(path, **dict(zip(keys, values, strict=True)))
    return str(path)


@pytest.mark.parametrize("keys", [("image", "label"), ("images", "labels")])
def test_generated_images_are_their_share_with_smoothed_labels(tmp_path, keys):
    path = generated_file(tmp_path / "made.npz", keys=keys)
    stage, _ = a_stage(dataaug, train__generated=path, train__cutmix=False, train__augment="none")
    x, targets = stage.augmented_batch(a_batch(stage))
    made = (x == 1).flatten(1).all(1)
    assert made.tolist() == [False] * 5 + [True] * 11  # 30 % of 16 are real
    assert torch.equal(targets[:5].argmax(1), stage.splits["train"].labels[:5]) and torch.all(targets[:5].max(1).values == 1)
    torch.testing.assert_close(targets[5:].max(1).values, torch.full((11,), 0.9 + 0.1 / 4))
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    recipe = dataaug.make("dataaug")
    assert "made.npz" in recipe.card(override(recipe.settings, {"train.generated": path}))["extra_data"]
    assert str(tmp_path) not in recipe.card(override(recipe.settings, {"train.generated": path}))["extra_data"]


def bad_file(tmp_path, kind: str) -> str:
    path = tmp_path / f"{kind}.npz"
    if kind == "damaged":
        path.write_bytes(b"PK no zip")
    elif kind == "keys":
        np.savez(path, pictures=np.zeros(3))
    elif kind == "length":
        generated_file(path, labels=np.zeros(7, int))
    elif kind == "label":
        generated_file(path, labels=np.full(40, 4))
    elif kind == "shape":
        generated_file(path, side=16)
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "damaged", "keys", "length", "label", "shape"])
def test_bad_files_of_generated_images(tmp_path, kind):
    with pytest.raises(BadInput, match=kind):
        a_stage(dataaug, train__generated=bad_file(tmp_path, kind))


def test_partial_fine_tuning_moves_the_last_stage_and_the_head_only():
    stage, settings = a_stage(ssp, 3, finetune__mode="partial", finetune__padding=1, finetune_attack__steps=2)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    stage.begin_epoch(0)
    train_step(stage, optimiser, a_batch(stage))
    moved = {key for key, value in stage.network.state_dict().items() if not torch.equal(value, before[key])}
    last = {key for key in before if ".layer2." in key or key.startswith("head.")}
    assert moved == last and {key.split(".")[2] for key in moved if key.startswith("encoder")} == {"0", "1", "2"}


def test_the_number_of_members_is_checked():
    recipe = ssp.make("ssp")
    assert recipe.settings.network.members == 3 and len(recipe.plans(recipe.settings)) == 4
    with pytest.raises(BadInput, match=r"network\.members must be 3"):
        recipe.plans(override(recipe.settings, {"network.members": 1}))
    single = ssp.make("ssp_jigsaw")
    assert [plan.name for plan in single.plans(single.settings)] == ["jigsaw", "finetune"]
    assert single.card(single.settings)["protocol"] == "AFF"


@pytest.mark.parametrize("module", [standard, pgd_at, trades, free, dataaug])
def test_noise_that_nothing_is_trained_under_is_refused(module):
    recipe = module.make(module.__name__.rpartition(".")[2])
    with pytest.raises(BadInput, match=rf"{recipe.name} trains without noise; leave noise=gaussian:0.25 out"):
        recipe.plans(override(recipe.settings, {"noise": "gaussian:0.25"}))
    assert recipe.card(recipe.settings)["votes"] == [0] and recipe.plans(recipe.settings)


@pytest.mark.parametrize(("replays", "steps_per_epoch"), [(1, 8), (4, 10)])
def test_free_warms_up_over_its_share_of_the_updates(replays: int, steps_per_epoch: int):
    """4 of 16 epochs: a quarter of the updates, whatever the number of replays, each of which is a step."""
    recipe = free.make("free")
    sets = {"train.epochs": 16, "train.milestones": (), "train.warmup_epochs": 4, "train.replays": replays}
    (plan,) = recipe.plans(override(recipe.settings, sets))
    steps = steps_per_epoch * replays  # of a pass over the images
    rates = [learning_rate(plan.settings, step, steps) for step in range(plan.settings.epochs * steps)]
    below = sum(rate < plan.settings.lr * (1 - 1e-9) for rate in rates)
    assert len(rates) == 16 * steps_per_epoch and below == len(rates) / 4 - 1
