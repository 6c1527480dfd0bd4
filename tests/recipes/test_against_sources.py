"""Objectives and attacks against the formulas of the papers' own code, written as loops in float64 (docs/sources.md)."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rush_bench import registry
from rush_bench.datasets import Images, as_images
from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.networks import build, routes, single_route
from rush_bench.networks.routes import RoutedBatchNorm
from rush_bench.recipes import smoothadv
from rush_bench.settings import override
from rush_bench.training.inner import InnerSettings
from rush_bench.training.optimisers import LARS, make_optimiser
from rush_bench.training.prepare import load_splits, resolve_settings
from rush_bench.training.semi_supervised import label_splits
from rush_bench.training.stage import Batch, Context

ROWS, COUNT = 10, 32
SMALL = {"name": "resnet", "blocks": [1, 1], "width": 4, "size": 8, "classes": 4}
ONE_STEP = {"attack.steps": 1, "attack.start": "zero", "attack.eps": 0.1, "attack.step": 0.05}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Networks, images and whatever the code takes to float32: all in float64."""
    real = Images.floats
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(Images, "floats", lambda images, positions=slice(None): real(images, positions).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pictures(split: str = "train", count: int = COUNT, first: int = 0):
    """Images away from 0 and 1, where a box would hide what an attack does."""
    pixels = torch.randint(40, 210, (count, 3, 8, 8), generator=seeded(first), dtype=torch.uint8)
    images = as_images(pixels, torch.arange(count) % 4, name="random", split=split)
    images.index.add_(first)
    return images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stage_of(recipe: str, number: int = 0, carried=None, splits=None, **layer):
    """A stage in train mode, BatchNorm away from where it starts; and its settings."""
    system = registry.recipes.load(recipe)
    settings = override(system.settings, layer)
    splits = splits or {name: pictures(name) for name in ("pretrain", "train", "val")}
    plan = system.plans(settings)[number]
    stage = plan.make(
        Context(build(SMALL | {"members": max(1, settings.network.members)}, seed=1), settings, splits, 0, carried or {})
    )
    generator = seeded(1)
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return stage.train(), plan.settings


def batch_of(stage, rows: int = ROWS, split: str = "pretrain", step: int = 0) -> Batch:
    return Batch(stage.splits[split], torch.arange(rows), seeded(step), 0, step)


def number(loss: torch.Tensor) -> float:
    return loss.detach().item()


@pytest.fixture
def attacks(monkeypatch):
    """What each inner attack was given and gave back."""
    seen, real = [], InnerSettings.run

    def spy(own, module, objective, images, generator):
        attacked = real(own, module, objective, images, generator)
        seen.append((images, attacked))
        return attacked

    monkeypatch.setattr(InnerSettings, "run", spy)
    return seen


def cosines(z: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (z / z.norm(dim=1, keepdim=True)) @ (keys / keys.norm(dim=1, keepdim=True)).T


def nt(u, v, temperature: float = 0.5, detached: bool = False):
    """The mean over 2B anchors of -log(exp(s_ip / t) / sum over k != i of exp(s_ik / t)), anchor by anchor."""
    z = torch.cat([u, v])
    similar = cosines(z, z.detach() if detached else z)
    total, count = 0.0, len(u)
    for i in range(2 * count):
        others = sum(torch.exp(similar[i, k] / temperature) for k in range(2 * count) if k != i)
        total = total - torch.log(torch.exp(similar[i, (i + count) % (2 * count)] / temperature) / others)
    return total / (2 * count)


def divergence(p_logits, q_logits):
    """KL(p || q), summed over rows and classes."""
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for i in range(len(p)) for k in range(p.shape[1]))


def agree(x, attacked, gradient, step: float) -> None:
    """One step from x: step times the sign of the gradient, wherever that is not rounding and the box is not near."""
    clear = (gradient.abs() > 1e-12) & (x > step) & (x < 1 - step)
    assert clear.float().mean() > 0.5
    torch.testing.assert_close((attacked - x)[clear], (step * gradient.sign())[clear], atol=1e-12, rtol=0)


# DynACL ---------------------------------------------------------------------------------------------------------------------


def test_dynacl_moves_key_views_by_the_gradient_through_the_key_network(attacks):
    """train_DynACL.py's PGD_contrastive: even rows through the query network, odd ones through the key network, eval()."""
    stage, _ = stage_of("dynacl", **ONE_STEP)
    for weight in stage.query.parameters():  # or both networks were the same
        weight.data.mul_(1.05)
    reference = copy.deepcopy(stage)
    loss = stage.loss(batch_of(stage))
    ((x, attacked),) = attacks
    a, b = x.clone().requires_grad_().chunk(2)
    query, query_head = (single_route(part, 1).eval() for part in reference.query)
    key, key_head = (single_route(part, 1).eval() for part in reference.key)
    grads = torch.autograd.grad(nt(query_head(query(a)), key_head(key(b))), [a, b])
    agree(x, attacked, torch.cat(grads), 0.05)
    assert all(weight.grad is None for weight in stage.key.parameters())
    parts = []
    for images, place in ((x, 0), (attacked, 1)):
        query, query_head = (single_route(part, place).train() for part in reference.query)
        key, key_head = (single_route(part, place).train() for part in reference.key)
        parts.append(nt(query_head(query(images[:ROWS])), key_head(key(images[ROWS:]))))
    assert number(loss) == pytest.approx(number(sum(parts)) / 2, abs=1e-10)  # w = 1 in the first epoch


def plus_stage(**layer):
    """DynACL++'s TRADES stage after its pre-training, whose routes differ; that network."""
    first, _ = stage_of("dynacl_pp", **{"probe.clusters": 3})
    first.finish()
    head = {"weight": 0.3 * torch.randn(3, 8, generator=seeded()), "bias": torch.zeros(3)}
    carried = {"routes": first.carried["routes"], "probe": head, "pseudo": {"3": torch.arange(COUNT) % 3}}
    stage, settings = stage_of("dynacl_pp", 2, carried, **{"probe.clusters": 3, **layer})
    stage.network.load_state_dict(first.network.state_dict())
    stage.prepare(fresh=True)
    return stage, settings, first


def test_dynacl_pp_takes_the_attacked_route_for_both_images_and_leaves_the_other(attacks):
    """LPAFT.py and LPAFT_AFF.py: trades_loss_dual with natural_mode='pgd', x' from x itself."""
    stage, settings, first = plus_stage(**{"trades.attack.eps": 0.1})
    reference = copy.deepcopy(stage.network.encoder)
    assert all(torch.equal(v, single_route(first.encoder, 1).state_dict()[k]) for k, v in reference.state_dict().items())
    loss = stage.loss(batch_of(stage))
    ((x, attacked),) = attacks
    labels = torch.arange(ROWS) % 3
    clean, robust = (stage.head(reference.train()(v)) for v in (x, attacked))
    expected = sum(-torch.log(clean.softmax(1)[i, labels[i]]) for i in range(ROWS)) / ROWS
    expected = expected + 6 * divergence(clean, robust) / ROWS
    assert number(loss) == pytest.approx(number(expected), abs=1e-10)
    assert settings.attack.start == "zero"
    loss.backward()
    make_optimiser(settings, stage.parameter_groups()).step()
    stage.finish()
    before, after = first.encoder.state_dict(), stage.carried["routes"]
    assert before.keys() == after.keys()
    for key, value in after.items():
        if ".sets.0." in key:
            assert torch.equal(value, before[key])
        elif value.is_floating_point() and "running" not in key:
            assert not torch.equal(value, before[key])


def test_dynacl_pp_hands_both_routes_to_aff():
    stage, _, _ = plus_stage()
    stage.finish()
    aff, _ = stage_of("dynacl_pp", -1, stage.carried, **{"finetune.protocol": "AFF"})
    aff.network.encoder.load_state_dict(stage.network.encoder.state_dict())
    aff.prepare(fresh=True)
    assert routes(aff.encoder) == 2
    assert all(torch.equal(value, stage.carried["routes"][key]) for key, value in aff.encoder.state_dict().items())


# DeACL ----------------------------------------------------------------------------------------------------------------------


def test_deacl_student_starts_as_its_teacher_and_is_driven_from_it(attacks):
    """mocov2_distillation_AT.py: the released scripts load the teacher's weights into the student (no --student_scratch)."""
    first, _ = stage_of("deacl")
    first.finish()
    stage, _ = stage_of("deacl", 1, first.carried, **ONE_STEP)
    stage.network.load_state_dict(first.network.state_dict())
    stage.prepare(fresh=True)
    teacher = copy.deepcopy(stage.network.encoder).eval()
    assert all(torch.equal(value, stage.teacher.state_dict()[key]) for key, value in teacher.state_dict().items())
    student = copy.deepcopy(stage.network.encoder)
    stage.begin_epoch(0)
    loss = stage.loss(batch_of(stage))
    ((x, attacked),) = attacks
    clean, robust = student.train()(torch.cat([x, attacked])).chunk(2)
    target = teacher(x)
    expected = -sum(cosines(clean, target)[i, i] + 2 * cosines(robust, clean)[i, i] for i in range(ROWS)) / ROWS
    assert number(loss) == pytest.approx(number(expected), abs=1e-10)


# RoCL -----------------------------------------------------------------------------------------------------------------------


def test_rocl_attack_with_detached_keys_and_a_pair_in_a_batch_of_its_own(attacks):
    """attack_lib.py's RepresentationAdv and loss.py: similarities to detached keys, in the attack as in the loss."""
    stage, _ = stage_of("rocl", **ONE_STEP, **{"pretrain.projector_hidden": 8})
    reference = copy.deepcopy(stage)
    loss = stage.loss(batch_of(stage))
    ((x, attacked),) = attacks
    generator, images = seeded(0), batch_of(reference).images
    t1, t2 = (reference.views(images, generator) for _ in range(2))
    assert torch.equal(x, t1)
    plain = nn.Sequential(reference.network.encoder, reference.projector)
    plain.eval()
    free = x.clone().requires_grad_()
    both = plain(torch.cat([free, t2])).chunk(2)
    (gradient,) = torch.autograd.grad(nt(*both, detached=True), free)
    agree(x, attacked, gradient, 0.05)
    u, v = (torch.randn(ROWS, 8, generator=seeded(k)).requires_grad_() for k in (4, 5))  # a tiny network's are all alike
    slopes = [torch.autograd.grad(value, u)[0] for value in (stage.pairs(u, v).sum(), nt(u, v, detached=True), nt(u, v))]
    torch.testing.assert_close(slopes[0], slopes[1])
    assert (slopes[1].sign() != slopes[2].sign()).float().mean() > 0.01

    plain.train()
    pair = nt(*plain(torch.cat([attacked, t2])).chunk(2), detached=True)
    z = plain(torch.cat([t1, t2, attacked]))
    similar, count, three = cosines(z, z.detach()), 3 * ROWS, 0.0
    for i in range(count):
        others = sum(torch.exp(similar[i, k] / 0.5) for k in range(count) if k != i)
        for shift in (ROWS, 2 * ROWS):
            three = three - torch.log(torch.exp(similar[i, (i + shift) % count] / 0.5) / others)
    expected = three / count + pair / 256
    assert number(loss) == pytest.approx(number(expected), abs=1e-10)
    for ours, theirs in zip(stage.network.encoder.buffers(), reference.network.encoder.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)  # two batches moved the statistics, in this order
    loss.backward()
    expected.backward()
    for ours, theirs in zip(stage.parameter_groups(), reference.parameter_groups(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_rocl_scales_every_tensor():
    """torchlars: trust .001 |w| / (|g| + wd |w|) on BatchNorm and biases too."""
    stage, settings = stage_of("rocl", **{"pretrain.projector_hidden": 8})
    optimiser = make_optimiser(settings, stage.parameter_groups())
    assert isinstance(optimiser, LARS)
    weight = stage.network.encoder.bn1.weight
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    optimiser.step()
    norm, size = float(before.norm()), math.sqrt(len(before))
    rate = 0.001 * norm / (size + 1e-6 * norm)
    torch.testing.assert_close(weight.detach(), before - 1.5 * rate * (1 + 1e-6 * before))


# AdvCL ----------------------------------------------------------------------------------------------------------------------


def test_advcl_contrast_through_one_projector(attacks):
    """losses.py's SupConLoss over f_proj, f1, f2, f_high, whose head_proj has a single BatchNorm."""
    sizes = {"pretrain.clusters": (2, 3), "pretrain.ce_weight": 0.0, "attack.eps": 0.1}
    stage, _ = stage_of("advcl", 1, {"pseudo": {"2": torch.arange(COUNT) % 2, "3": torch.arange(COUNT) % 3}}, **sizes)
    assert sum(isinstance(part, nn.BatchNorm1d) for part in stage.projector.modules()) == 1
    assert not any(isinstance(part, RoutedBatchNorm) for part in stage.projector.modules())
    reference = copy.deepcopy(stage)
    loss = number(stage.loss(batch_of(stage)))
    generator, images = seeded(0), batch_of(reference).images
    a, b = (reference.views(images, generator) for _ in range(2))
    o, attacked = attacks[0]
    spectrum = torch.fft.fftshift(torch.fft.fft2(o), dim=(-2, -1))
    away = torch.tensor([[math.hypot(r - 4, c - 4) >= 2 for c in range(8)] for r in range(8)])  # 8 of 32 pixels are 2 of 8
    q = torch.fft.ifft2(torch.fft.ifftshift(spectrum * away, dim=(-2, -1))).real
    views = [(1, attacked), (0, a), (0, b), (0, q)]
    z = torch.cat([reference.projector.train()(single_route(reference.encoder, n).train()(v)) for n, v in views]).detach()
    similar, total = cosines(z, z), 0.0
    for i in range(4 * ROWS):
        log_sum = math.log(sum(math.exp(float(similar[i, k]) / 0.5) for k in range(4 * ROWS) if k != i))
        positives = [(i + shift * ROWS) % (4 * ROWS) for shift in (1, 2, 3)]
        total -= 0.5 / 0.07 * sum(float(similar[i, k]) / 0.5 - log_sum for k in positives) / 3
    assert loss == pytest.approx(total / (4 * ROWS), rel=1e-9)


# Semi-supervised ACL --------------------------------------------------------------------------------------------------------


def semi_splits(labelled: int = 4):
    train = pictures()
    return {
        "pretrain": train,
        "train": train,
        "val": pictures("val", 8, COUNT),
        "labelled": train.take(slice(labelled)),
        "unlabelled": train.take(slice(labelled, None)),
    }


def test_semi_supervised_acl_divides_every_sum_by_the_whole_batch(attacks):
    """train_trades_cifar10_semisupervised.py's trade_loss_soft; the teacher's labels of un-augmented images."""
    splits = semi_splits()
    teacher = build(SMALL, seed=3).eval()
    layer = {"label_share": 0.1, "distil.batch_size": 14, "distil.attack.eps": 0.1, "distil.temperature": 2.0}
    layer |= {"distil.alpha": 0.3}
    stage, _ = stage_of("acl", 2, {"teacher": teacher.state_dict()}, splits, **layer)
    stage.prepare(fresh=False)
    stage.begin_epoch(0)
    batch = batch_of(stage, 14, "unlabelled", step=1)
    reference = copy.deepcopy(stage.network)
    loss = stage.loss(batch)
    ((x, attacked),) = attacks
    count = len(x) - 14
    assert count == 2  # n_l / (n_u / 14)
    rows = stage.order[count : 2 * count]  # the second step of two
    labels = splits["labelled"].labels[rows]
    seen = torch.cat([splits["labelled"].floats(rows), splits["unlabelled"].floats(slice(14))])
    soft = teacher(seen).detach() / 2.0
    clean, robust = (reference.train()(v) for v in (x, attacked))
    n, expected = len(x), 0.0
    for i in range(n):
        distilled = -sum(soft.softmax(1)[i, k] * (robust[i] / 2.0).log_softmax(0)[k] for k in range(4)) * 4.0
        if i < count:
            expected = expected + 0.7 * -robust[i].log_softmax(0)[labels[i]] / n + 0.3 * distilled / n
        else:
            expected = expected + distilled / n
    expected = expected + 6 * divergence(clean, robust) / n
    assert number(loss) == pytest.approx(number(expected), abs=1e-10)


def test_the_teacher_is_its_best_clean_epoch():
    splits = semi_splits()
    stage, _ = stage_of("acl", 1, {}, splits, label_share=0.1)
    assert stage.selection_metric == "clean"
    stage.best = {key: torch.full_like(value, 7) for key, value in stage.teacher.state_dict().items()}
    stage.finish()
    assert all(bool((value == 7).all()) for value in stage.carried["teacher"].values())


def test_the_authors_index_files_say_which_images_have_labels(tmp_path):
    train, val = pictures(), pictures("val", 8, COUNT)
    chosen = np.array([COUNT + 3, 5, 0])  # one of them is among our validation images
    np.save(tmp_path / "index.npy", chosen)
    found = label_splits({"train": train, "val": val}, 3 / COUNT, str(tmp_path / "index.npy"))
    assert sorted(found["labelled"].index.tolist()) == sorted(chosen.tolist())
    assert COUNT + 3 not in found["val"].index.tolist() and len(found["val"]) == 7
    assert sorted([*found["labelled"].index.tolist(), *found["unlabelled"].index.tolist()]) == [*range(COUNT), COUNT + 3]
    at = found["labelled"].index.tolist().index(COUNT + 3)
    assert torch.equal(found["labelled"].pixels[at], val.pixels[3])


@pytest.mark.parametrize(
    ("content", "share", "message"),
    [
        (np.arange(3), 0.5, r"has 3 positions.*--set label_share=0\.09375"),
        (np.array([0, 0, 1]), 3 / COUNT, "distinct positions"),
        (np.array([0.0, 1.0, 2.0]), 3 / COUNT, "distinct positions"),
        (np.array([0, 1, 10_000]), 3 / COUNT, "not among"),
        (np.array([{}]), 1 / COUNT, "cannot be read"),
    ],
)
def test_index_files_that_cannot_be(tmp_path, content, share, message):
    np.save(tmp_path / "index.npy", content, allow_pickle=True)
    with pytest.raises(BadInput, match=message):
        label_splits({"train": pictures(), "val": pictures("val", 8, COUNT)}, share, str(tmp_path / "index.npy"))


# Chen et al. 2020b ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [2, 4])
def test_selfie_sums_over_its_hidden_places(hidden):
    """train_adv_selfie.py: patch_loss += loss_ for each of the hidden places; half clean, half attacked."""
    sizes = {"selfie.dim": 16, "selfie.layers": 1, "selfie.heads": 2, "selfie.feedforward": 16, "selfie.dropout": 0.0}
    stage, _ = stage_of(
        "ssp_selfie", **sizes, **{"selfie.hidden": hidden, "attack.steps": 1, "attack.eps": 1e-12, "attack.start": "zero"}
    )
    reference = copy.deepcopy(stage)
    loss = number(stage.loss(batch_of(stage)))
    generator = seeded(0)
    x, scores, answers = reference.problem(pad_crop(batch_of(reference).images, generator, 2, 0.0), generator)
    each = F.cross_entropy(scores(x), answers, reduction="none").unflatten(0, (ROWS, hidden))
    assert loss == pytest.approx(number(each.mean(0).sum()), rel=1e-9)


# TRADES, Free-m, SmoothAdv, Rebuffi -----------------------------------------------------------------------------------------


def test_trades_passes_clean_images_twice(attacks):
    """trades.py: model(x), model(x'), model(x) again; the statistics of clean images weigh in twice."""
    stage, _ = stage_of("trades")
    reference = copy.deepcopy(stage.network)
    loss = stage.loss(batch_of(stage, split="train"))
    ((x, attacked),) = attacks
    labels = stage.splits["train"].labels[:ROWS]
    logits = reference(x)
    expected = F.cross_entropy(logits, labels)
    robust = reference(attacked)
    again = reference(x)
    expected = expected + 6 * divergence(again, robust) / ROWS
    assert number(loss) == pytest.approx(number(expected), abs=1e-10)
    for ours, theirs in zip(stage.network.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(stage.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_free_freezes_what_the_clip_cuts_off():
    """free_model.py's clip_by_value and main_free.py's clamp_: no gradient reaches a perturbation that leads out of the box."""
    stage, _ = stage_of("free", **{"train.batch_size": 4, "train.augment": "none", "attack.eps": 0.5})
    batch = batch_of(stage, 4, "train")
    stage.delta[:2] = torch.where(batch.images[:2] < 0.5, -0.5, 0.5)  # out of [0,1] for half of the pixels or so
    before, outside = stage.delta.clone(), ((batch.images + stage.delta) < 0) | ((batch.images + stage.delta) > 1)
    stage.backward(batch)
    assert outside[:2].float().mean() > 0.3 and not outside[2:].any()
    assert torch.equal(stage.delta[outside], before[outside])
    assert float((stage.delta != before)[~outside].float().mean()) > 0.4


@pytest.mark.parametrize(("draws", "steps"), [(1, 2), (3, 6)])
def test_ddn_as_the_released_loop_has_it(draws, steps):
    """attacks.py's DDN, image by image on a linear softmax classifier whose gradient is written out (without rounding)."""
    eps, gamma, classes = 0.4, 0.05, 3
    w = torch.randn(classes, 48, generator=seeded(1), dtype=torch.float64)
    x = 0.3 + 0.4 * torch.rand(8, 3, 4, 4, generator=seeded(2), dtype=torch.float64)
    noise = 0.1 * torch.randn(8, draws, 3, 4, 4, generator=seeded(3), dtype=torch.float64)
    labels = (x.flatten(1) @ w.T).argmax(1)
    got = smoothadv.ddn(lambda v: (v[:, None] + noise).flatten(2) @ w.T, x, labels, eps=eps, steps=steps, gamma=gamma)
    found = 0
    for i in range(8):
        image, y, delta, radius = x[i].flatten().numpy(), int(labels[i]), np.zeros(48), eps
        worst = np.linalg.norm(np.maximum(image, 1 - image))
        best, best_delta = worst, np.zeros(48)
        for step in range(steps):
            scores = np.stack([(image + delta + n.flatten().numpy()) @ w.T.numpy() for n in noise[i]])
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            slope = sum(p[d, y] * (w[y].numpy() - p[d] @ w.numpy()) for d in range(draws)) / p[:, y].sum()  # of log mean p_y
            adversarial = np.bincount(scores.argmax(1), minlength=classes).argmax() != y
            if adversarial and np.linalg.norm(delta) < best:
                best, best_delta = np.linalg.norm(delta), delta
            rate = 0.01 + 0.99 * (1 + math.cos(math.pi * (step + 1) / steps)) / 2
            delta = delta - rate * slope / np.linalg.norm(slope)
            radius = min(radius * (1 - gamma if adversarial else 1 + gamma), worst)
            delta = np.clip(image + delta * radius / np.linalg.norm(delta), 0, 1) - image
        found += best < worst
        best_delta = best_delta * min(1, eps / max(np.linalg.norm(best_delta), 1e-12))
        np.testing.assert_allclose(got[i].flatten().numpy(), image + best_delta, atol=1e-9)
    assert 0 < found < 8 or steps > 2  # two steps do not find all: those keep the clean image


def test_rebuffi_statistics_start_as_the_first_batch_and_move_by_a_hundredth():
    """watrain.py: momentum 1 at the first step, .01 from then on; attacked images alone."""
    stage, _ = stage_of("dataaug", **{"attack.steps": 2, "train.cutmix": False, "train.augment": "none"})
    norm, means = stage.network.encoder.bn1, []
    norm.register_forward_pre_hook(lambda module, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    stage.begin_epoch(0)
    expected = None
    for step in range(3):
        stage.loss(batch_of(stage, split="train", step=step))
        expected = means[-1] if step == 0 else 0.99 * expected + 0.01 * means[-1]
        torch.testing.assert_close(norm.running_mean, expected)


@pytest.mark.parametrize(
    ("generated", "asked", "mixes"), [("", None, True), ("x", None, False), ("x", True, True), ("", False, False)]
)
def test_cutmix_is_off_beside_generated_images_unless_asked_for(generated, asked, mixes):
    settings = override(registry.recipes.load("dataaug").settings, {"train.generated": generated, "train.cutmix": asked})
    assert settings.train.mixes is mixes


# Transfers and the second control -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "whole"), [("digits", False), ("other", True)])
def test_a_transfer_pretrains_on_the_whole_training_set(source, whole, tmp_path):
    """RUSH 5.2: nothing is validated on the other data set, so nothing of it is held out."""
    if source == "other":
        source = str(tmp_path / "other.npz")
        pixels = np.random.RandomState(0).randint(0, 256, (40, 16, 16), np.uint8)
        labels = np.arange(40) % 10
        classes = [str(k) for k in range(10)]
        np.savez(source, train_images=pixels, train_labels=labels, classes=classes)
    system = registry.recipes.load("simclr")
    settings = resolve_settings(system, "smoke", (1, 16, 16), [{"n_train": "none"}])
    splits = load_splits(system, settings, "digits", source, None, False)
    assert len(splits["pretrain"]) == (40 if whole else len(splits["train"]))


@pytest.mark.parametrize(("name", "adapt"), [("random_probe", "beta_stats"), ("random_probe_frozen", "none")])
def test_random_probe_with_and_without_moving_batchnorm(name, adapt):
    stage, _ = stage_of(name)
    before = {key: value.clone() for key, value in stage.network.encoder.state_dict().items()}
    stage.begin_epoch(0)
    stage.loss(batch_of(stage, split="train")).backward()
    moved = any(not torch.equal(value, before[key]) for key, value in stage.network.encoder.state_dict().items())
    learns = any(weight.requires_grad for weight in stage.network.encoder.parameters())
    assert (moved, learns) == ((adapt != "none",) * 2)
    system = registry.recipes.load(name)
    other = "none" if adapt != "none" else "beta_stats"
    with pytest.raises(BadInput, match=r"use random_probe"):
        system.plans(override(system.settings, {"finetune.bn_adapt": other}))
