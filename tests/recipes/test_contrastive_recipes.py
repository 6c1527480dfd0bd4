"""ACL, DynACL, RoCL, AdvCL, BYORL and DeACL: who is attacked, through which route, with what loss and which statistics."""

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from rush_bench import registry
from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.files import read_json
from rush_bench.networks import build, route, routes, single_route
from rush_bench.networks.routes import RoutedBatchNorm
from rush_bench.recipes import acl, advcl, dynacl
from rush_bench.settings import override
from rush_bench.training import train
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.loop import train_step
from rush_bench.training.losses import cosine, multi_view, nt_xent
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.prepare import load_splits, resolve_settings
from rush_bench.training.stage import Batch, Context

COUNT, ROWS = 32, 12
FEW = {"attack.eps": 0.1, "attack.step": 0.03}


def data(split: str = "train"):
    pixels = torch.randint(0, 256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return as_images(pixels, torch.arange(COUNT) % 4, name="random", split=split)


def stage_of(recipe: str, number: int = 0, **layer):
    """A stage of a recipe with the paper's settings but a small network, a larger attack and BatchNorm that has run."""
    system = registry.recipes.load(recipe)
    settings = override(system.settings, FEW if hasattr(system.settings, "attack") else {}, layer)
    splits = {name: data(name) for name in ("pretrain", "train", "val")}
    carried = {"pseudo": {str(k): torch.arange(COUNT) % k for k in (2, 3, 10)}}
    network = build({"name": "resnet", "blocks": [1, 1], "width": 4, "size": 8, "classes": 4}, seed=1)
    plan = system.plans(settings)[number]
    stage = plan.make(Context(network, settings, splits, 0, carried))
    warm(stage)
    return stage.train(), plan.settings


def warm(stage) -> None:
    """Running statistics away from their start, for every route."""
    generator = torch.Generator().manual_seed(1)
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


def batch_of(stage, epoch: int = 0, step: int = 0) -> Batch:
    rows = torch.arange(ROWS)
    return Batch(stage.splits["pretrain"], rows, torch.Generator().manual_seed(step), epoch, step)


def running(module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if "running_mean" in key}


def watch(monkeypatch) -> list[dict]:
    """What each inner attack was given and gave back, its objective before and after, and which statistics it moved."""
    seen: list[dict] = []
    real = InnerSettings.run

    def run(self, module, objective, x, generator):
        with attack_mode(copy_of := module, "batch" if self.mode == "train" else "eval"), torch.no_grad():
            before = float(objective(x))
        asked = [weight.requires_grad for weight in module.parameters()]
        old = running(module)
        attacked = real(self, module, objective, x, generator)
        moved = {key for key, value in running(module).items() if not torch.equal(old[key], value)}
        with attack_mode(copy_of, "batch" if self.mode == "train" else "eval"), torch.no_grad():
            after = float(objective(attacked))
        assert asked == [weight.requires_grad for weight in module.parameters()]
        assert all(weight.grad is None for weight in module.parameters()) and module.training
        seen.append({"x": x, "attacked": attacked, "gain": after - before, "moved": moved, "mode": self.mode})
        return attacked

    monkeypatch.setattr(InnerSettings, "run", run)
    return seen


SMALLER = {"pretrain.clusters": (2, 3, 10)}
ATTACKERS = {  # recipe, stage, settings: how many attacks a step
    "acl": ("acl", 0, {}, 1),
    "acl-a2a": ("acl", 0, {"pretrain.variant": "A2A"}, 1),
    "acl-a2s": ("acl", 0, {"pretrain.variant": "A2S"}, 1),
    "acl-s2s": ("acl", 0, {"pretrain.variant": "S2S"}, 0),
    "dynacl": ("dynacl", 0, {}, 1),
    "rocl": ("rocl", 0, {"pretrain.projector_hidden": 8}, 1),
    "byorl": ("byorl_reimpl", 0, {"pretrain.projector_hidden": 16, "pretrain.projector_out": 8}, 1),
    "byorl-both": ("byorl_reimpl", 0, {"pretrain.projector_hidden": 16, "pretrain.symmetric": True}, 2),
    "advcl": ("advcl", 1, SMALLER, 2),
}


@pytest.mark.parametrize("name", ATTACKERS)
def test_inner_attacks(name, monkeypatch):
    recipe, number, layer, attacks = ATTACKERS[name]
    stage, _ = stage_of(recipe, number, **layer)
    seen = watch(monkeypatch)
    stage.loss(batch_of(stage)).backward()
    assert len(seen) == attacks
    for one in seen:
        assert one["gain"] > 1e-3
        assert float((one["attacked"] - one["x"]).abs().max()) <= 0.1 + 1e-6
        assert float(one["attacked"].min()) >= 0 and float(one["attacked"].max()) <= 1
        if recipe != "advcl":
            assert one["mode"] == "eval" and not one["moved"]
    if recipe == "advcl":  # the net stays in train(): statistics of the attacked route move, and of no other
        for one, number in zip(seen, (1, 2), strict=True):
            keys = {key for key in one["moved"] if key.startswith("encoder.")}
            assert one["mode"] == "train" and keys and all(f".sets.{number}." in key for key in keys)


def count_passes(stage) -> list[tuple]:
    """(route, training, rows) of each pass through the encoder."""
    passes: list[tuple] = []
    first = next(part for part in stage.encoder.modules() if isinstance(part, RoutedBatchNorm))
    first.register_forward_pre_hook(lambda part, args: passes.append((part.current, part.training, len(args[0]))))
    return passes


@pytest.mark.parametrize(
    ("name", "outer"),
    [
        ("acl", [(0, True, 2 * ROWS), (1, True, 2 * ROWS)]),  # DS: clean pair, attacked pair
        ("acl-a2a", [(0, True, 2 * ROWS)]),
        ("acl-a2s", [(0, True, ROWS), (1, True, ROWS)]),
        ("acl-s2s", [(0, True, 2 * ROWS)]),
    ],
)
def test_acl_routes_and_cost(name, outer):
    recipe, number, layer, attacks = ATTACKERS[name]
    stage, _ = stage_of(recipe, number, **layer)
    passes = count_passes(stage)
    stage.loss(batch_of(stage))
    trained = [one for one in passes if one[1]]
    crafted = [one for one in passes if not one[1]]
    assert sorted(trained) == outer
    attacked = {"acl": (1, False, 2 * ROWS), "acl-a2a": (0, False, 2 * ROWS), "acl-a2s": (1, False, ROWS)}
    if attacks:
        assert Counter(crafted)[attacked[name]] == 5  # PGD-5
        assert len(crafted) == 5 + (name == "acl-a2s")  # and the fixed clean view


def two_views(stage) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch_of(stage)
    return stage.views(batch.images, batch.generator), stage.views(batch.images, batch.generator)


def through(stage, number: int, x: torch.Tensor) -> torch.Tensor:
    """Projections of a batch in train mode through one route, computed by plain networks."""
    encoder, projector = single_route(stage.encoder, number), copy.deepcopy(stage.projector)
    if routes(projector) > 1:
        projector = single_route(projector, number)
    return projector.train()(encoder.train()(x)).detach().double()


def nt(u, v) -> float:
    """S1.1's NT in float64; its own loop is in test_losses."""
    return float(nt_xent(u, v, 0.5))


@pytest.mark.parametrize("name", ["acl", "acl-a2a", "acl-a2s", "acl-s2s"])
def test_acl_losses(name, monkeypatch):
    recipe, number, layer, _ = ATTACKERS[name]
    stage, _ = stage_of(recipe, number, **layer)
    reference, seen = copy.deepcopy(stage), watch(monkeypatch)
    got = float(stage.loss(batch_of(stage)).detach())
    views = torch.cat(two_views(reference))
    attacked = seen[0]["attacked"] if seen else views
    pair = lambda number, x: through(reference, number, x).chunk(2)  # noqa: E731
    if name == "acl":
        expected = (nt(*pair(0, views)) + nt(*pair(1, attacked))) / 2
    elif name == "acl-a2s":
        assert torch.equal(seen[0]["x"], views[:ROWS])
        expected = nt(through(reference, 1, attacked), through(reference, 0, views[ROWS:]))
    else:
        expected = nt(*pair(0, attacked))
    assert got == pytest.approx(expected, rel=1e-4)


def test_the_acl_projector():
    shapes = [tuple(weight.shape) for weight in acl.acl_projector(8, 8, 3).state_dict().values() if weight.ndim == 2]
    assert shapes == [(8, 8)] * 3
    whole = acl.acl_projector(512, 512, 3)
    dual = 2 * sum(weight.numel() for name, weight in whole.named_parameters() if name.split(".")[0] in "147")
    linear = sum(weight.numel() for name, weight in whole.named_parameters() if name.split(".")[0] in "036")
    encoder = build({"name": "resnet18", "routes": 2}).encoder
    assert sum(weight.numel() for weight in encoder.parameters()) + dual + linear == 11_971_520  # S4.2, shape facts
    assert len(acl.acl_projector(8, 8, 2)) == 5


@pytest.mark.parametrize(("variant", "route_", "place", "count"), [("DS", 1, 1, 2), ("DS", 0, 0, 2), ("A2A", 1, 0, 1)])
def test_the_network_is_the_route_asked_for(variant, route_, place, count):
    stage, _ = stage_of("acl", **{"pretrain.variant": variant, "pretrain.route": route_})
    assert routes(stage.encoder) == count
    stage.eval()
    x = data().floats(slice(4))
    with route(stage.encoder, place):
        assert torch.equal(stage.encoder(x), stage.network.encoder(x))
    stage.finish()
    assert set(stage.carried["routes"]) == set(stage.encoder.state_dict())


@pytest.mark.parametrize(
    ("epoch", "s", "w"), [(0, 1.0, 1.0), (49, 1.0, 1.0), (50, 0.95, 1 + 0.05 * 2 / 3), (999, 0.05, 1 + 0.95 * 2 / 3)]
)
def test_dynacl_anneals(epoch, s, w):
    stage, _ = stage_of("dynacl")
    stage.begin_epoch(epoch)
    assert stage.weight == pytest.approx(w)
    assert stage.views.crop_floor == pytest.approx(1 - 0.9 * s) and stage.views.gray_p == pytest.approx(0.2 * s)
    assert stage.views.jitter == pytest.approx((0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s)) and stage.views.flip == 0.5


def test_dynacl_loss_and_momentum(monkeypatch):
    stage, settings = stage_of("dynacl")
    stage.begin_epoch(500)
    reference, seen = copy.deepcopy(stage), watch(monkeypatch)
    loss = stage.loss(batch_of(stage))
    views, (one,) = torch.cat(two_views(reference)), seen
    first, second = slice(ROWS), slice(ROWS, None)
    # The key network's weights take no gradient, its images do: both views end in the ball's corners.
    change = (one["attacked"] - one["x"]).abs()
    inside = (one["x"] > 0.1) & (one["x"] < 0.9)
    corner = (change > 0.0999) & inside
    assert all(float(corner[rows].float().sum() / inside[rows].sum()) > 0.3 for rows in (first, second))

    def pair(x, number):
        encoder, projector = (single_route(part, number).train() for part in reference.query)
        return projector(encoder(x[first])).detach(), through(reference, number, x[second]).float()

    w = 1 + 0.5 * 2 / 3
    expected = ((2 - w) * nt(*pair(views, 0)) + w * nt(*pair(one["attacked"], 1))) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    stage.zero_grad()
    for query in stage.query.parameters():  # away from the keys, which begin as they do
        query.data.mul_(1.1)
    old, queries = ([weight.clone() for weight in part.parameters()] for part in (stage.key, stage.query))
    train_step(stage, optimiser, batch_of(stage))
    for before, key, query in zip(old, stage.key.parameters(), queries, strict=True):  # the queries before this step
        torch.testing.assert_close(key, 0.99 * before + 0.01 * query)
    assert not all(torch.equal(a, b) for a, b in zip(queries, stage.query.parameters(), strict=True))
    assert not any(weight.requires_grad for weight in stage.key.parameters())
    stage.finish()
    assert all(weight.requires_grad for weight in stage.network.parameters())


def test_dynacl_pp_leaves_pseudo_labels_of_the_clean_route():
    stage, _ = stage_of("dynacl_pp", **{"probe.clusters": 3})
    stage.finish()
    assert set(stage.carried["pseudo"]) == {"3"} and len(stage.carried["pseudo"]["3"]) == COUNT
    names = [plan.name for plan in dynacl.plans(registry.recipes.load("dynacl_pp").settings)]
    assert names == ["pretrain", "probe", "trades", "finetune"]


@pytest.mark.parametrize("layer", [{"trades.routes": 2}, {"pretrain.route": 0}])
def test_dynacl_pp_trains_the_attacked_route(layer):
    system = registry.recipes.load("dynacl_pp")
    with pytest.raises(BadInput, match="attacked route alone"):
        system.plans(override(system.settings, layer))


def test_rocl_attacks_in_groups_of_a_device():
    """Images of one group are no negatives of another: halves attacked together equal halves attacked alone."""
    whole, _ = stage_of("rocl", **ATTACKERS["rocl"][2], **{"pretrain.attack_group": ROWS // 2, "attack.start": "zero"})
    t1, t2 = two_views(whole)
    together = whole.attacked(t1, t2, batch_of(whole))
    half = slice(ROWS // 2)
    alone = whole.attacked(t1[half], t2[half], batch_of(whole))
    torch.testing.assert_close(together[half], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["byorl", "byorl-both"])
def test_byorl_loss_and_target(name, monkeypatch):
    recipe, _, layer, attacks = ATTACKERS[name]
    stage, settings = stage_of(recipe, **layer, **{"pretrain.batch_size": 8, "pretrain.epochs": 4})
    reference, seen = copy.deepcopy(stage), watch(monkeypatch)
    got = float(stage.loss(batch_of(stage)).detach())
    order = list(zip(two_views(reference), reversed(two_views(reference)), strict=True))[:attacks]
    expected = 0.0
    for one, (online, other) in zip(seen, order, strict=True):
        assert torch.equal(one["x"], online)
        encoder, head = reference.target
        q = reference.predictor(reference.projector(reference.network.encoder(one["attacked"])))
        expected += 2 - 2 * float(cosine(q.detach().double(), head(encoder(other)).detach().double()))
    assert got == pytest.approx(expected, rel=1e-3)
    optimiser, total = make_optimiser(settings, stage.parameter_groups()), 16  # four epochs of four steps
    for step in (0, 8, 12):
        old = [weight.clone() for weight in stage.target.parameters()]
        train_step(stage, optimiser, batch_of(stage, step=step))
        share = 0.004 * (1 + math.cos(math.pi * step / total)) / 2
        for before, target, weight in zip(old, stage.target.parameters(), stage.online.parameters(), strict=True):
            torch.testing.assert_close(target, (1 - share) * before + share * weight)


@pytest.mark.parametrize(("ramp", "epoch", "radius"), [(0, 0, 0.1), (4, 0, 0.025), (4, 1, 0.05), (4, 3, 0.1), (4, 9, 0.1)])
def test_byorl_ramps_its_radius_where_asked(ramp, epoch, radius, monkeypatch):
    stage, _ = stage_of("byorl_reimpl", **ATTACKERS["byorl"][2], **{"pretrain.ramp_epochs": ramp})
    seen = watch(monkeypatch)
    stage.loss(batch_of(stage, epoch))
    assert float((seen[0]["attacked"] - seen[0]["x"]).abs().max()) == pytest.approx(radius, abs=1e-6)


def test_advcl_loss(monkeypatch):
    stage, _ = stage_of("advcl", 1, **SMALLER)
    reference, seen = copy.deepcopy(stage), watch(monkeypatch)
    old = running(stage.encoder)
    got = float(stage.loss(batch_of(stage)).detach())
    a, b = two_views(reference)
    one, two = seen
    o = one["x"]
    assert torch.equal(o, two["x"])
    q = advcl.high_pass(o, 8 * 8 / 32)
    parts = [through(reference, 1, one["attacked"]), *(through(reference, 0, view) for view in (a, b, q))]
    expected = float(multi_view(parts, 0.5)) * 0.5 / 0.07
    features = single_route(reference.encoder, 2).train()(two["attacked"]).detach()
    for head, count in zip(reference.heads, (2, 3, 10), strict=True):
        logits = head(features).detach().double().log_softmax(1)
        labels = torch.arange(ROWS) % count
        expected += 0.2 / 3 * -float(logits[range(ROWS), labels].mean())
    assert got == pytest.approx(expected, rel=1e-4)
    # Five attack steps and the outer pass: six updates of the attacked routes' statistics.
    with route(reference.encoder, 1):
        reference.encoder.train()(one["attacked"])
    single = running(reference.encoder)["bn1.sets.1.running_mean"] - old["bn1.sets.1.running_mean"]
    moved = running(stage.encoder)["bn1.sets.1.running_mean"] - old["bn1.sets.1.running_mean"]
    assert 3 < float((moved / single).median()) < 6


@pytest.mark.parametrize("radius", [2.0, 4.0])
def test_high_pass_is_the_sum_over_high_frequencies(radius):
    """S2.4 by the definition of the Fourier sum, frequency by frequency."""
    x = torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    height, width = 6, 8
    expected = np.zeros((height, width), complex)
    for k in range(height):
        for m in range(width):
            row = k if k < height // 2 else k - height  # where fftshift puts it, from the centre
            column = m if m < width // 2 else m - width
            if math.hypot(row, column) < radius:
                continue
            wave = np.exp(2j * np.pi * (k * np.arange(height)[:, None] / height + m * np.arange(width) / width))
            expected += (x[0, 0].numpy() * wave.conj()).sum() * wave / (height * width)
    got = advcl.high_pass(x, radius)[0, 0].numpy()
    np.testing.assert_allclose(got, expected.real, atol=1e-12)
    assert abs(got.mean()) < 1e-12  # the mean is the lowest frequency of all


@pytest.mark.parametrize("start", ["teacher", "scratch"])
def test_deacl_student(start, monkeypatch):
    stage, settings = stage_of("deacl", 1, **{"distil.start": start})
    stage.carried["teacher"] = {key: value.clone() for key, value in stage.network.encoder.state_dict().items()}
    before = stage.network.encoder.conv1.weight.clone()
    stage.prepare(fresh=True)
    assert torch.equal(stage.teacher.conv1.weight, before)
    assert torch.equal(stage.network.encoder.conv1.weight, before) == (start == "teacher")
    stage.begin_epoch(0)
    reference, seen = copy.deepcopy(stage), watch(monkeypatch)
    got = float(stage.loss(batch_of(stage)).detach())
    ((one),) = seen
    x = one["x"]
    assert one["gain"] > 1e-3 and not one["moved"] and float((one["attacked"] - x).abs().max()) <= 0.1 + 1e-6
    target = reference.teacher.eval()(x)
    clean, robust = reference.network.encoder.train()(torch.cat([x, one["attacked"]])).chunk(2)
    cos = lambda u, v: np.mean([float(a @ b / a.norm() / b.norm()) for a, b in zip(u.double().detach(), v.double().detach())])  # noqa: E731, B905
    assert got == pytest.approx(-cos(clean, target) - 2 * cos(robust, clean), rel=1e-4)
    teacher = copy.deepcopy(stage.teacher.state_dict())
    train_step(stage, make_optimiser(settings, stage.parameter_groups()), batch_of(stage))
    assert all(torch.equal(value, teacher[key]) for key, value in stage.teacher.state_dict().items())
    assert sum(w.numel() for w in stage.parameter_groups()) == sum(w.numel() for w in stage.network.encoder.parameters())


def test_pseudo_labels_from_a_file_are_extra_data(tmp_path):
    path = tmp_path / "labels.npz"
    np.savez(path, **{f"pseudo_train_{k}": np.arange(COUNT) % k for k in (2, 3, 10)})
    layer = {"pseudo_source": "file", "pseudo_file": str(path), **SMALLER}
    system = registry.recipes.load("advcl")
    settings = override(system.settings, layer)
    assert system.card(settings)["extra_data"] == "pseudo-labels (labels.npz)"
    assert system.card(system.settings)["extra_data"] is None
    assert [plan.name for plan in system.plans(settings)] == ["pretrain", "finetune"]
    stage, _ = stage_of("advcl", **layer)
    stage.prepare(fresh=True)
    assert stage.carried["pseudo"]["10"].tolist() == [i % 10 for i in range(COUNT)]
    np.savez(path, **{f"pseudo_train_{k}": np.arange(COUNT - 1) % k for k in (2, 3, 10)})
    with pytest.raises(BadInput, match=f"needs one integer for each of its {COUNT}"):
        stage.prepare(fresh=True)


@pytest.mark.parametrize(
    ("recipe", "layer", "message"),
    [
        ("advcl", {"pseudo_source": "file"}, "needs a file"),
        ("advcl", {"pseudo_source": "file", "pseudo_file": "nowhere.npz"}, "'nowhere.npz'"),
        ("advcl", {"pseudo_file": "x.npz"}, "given but not used"),
        ("dynacl", {"pretrain.variant": "A2A"}, "variant=A2A is not there"),
    ],
)
def test_settings_that_cannot_be(recipe, layer, message):
    system = registry.recipes.load(recipe)
    with pytest.raises(BadInput, match=message):
        system.plans(override(system.settings, layer))


def test_more_clusters_than_images_is_told_before_training():
    with pytest.raises(BadInput, match="500 clusters of 32 images"):
        stage_of("advcl", 0)


@pytest.mark.parametrize(("share", "fine"), [(0.1, True), (0.001, False)])
def test_label_shares_of_digits(share, fine):
    system = registry.recipes.load("acl")
    settings = resolve_settings(system, "smoke", (1, 16, 16), [{"label_share": share}])
    load = lambda: load_splits(system, settings, "digits", "digits", None, False)  # noqa: E731
    if fine:
        splits = load()
        assert len(splits["labelled"]) == 26 and len(splits["labelled"]) + len(splits["unlabelled"]) == len(splits["train"])
        assert [plan.name for plan in system.plans(settings)] == ["pretrain", "teacher", "distil"]
    else:
        with pytest.raises(BadInput, match="without a label"):
            load()


def test_what_a_teacher_of_a_share_of_the_labels_knows_is_distilled(tmp_path):
    """The loss falls, and the network becomes robust: S2.3, stage 3, from a teacher that has learnt.

    From a teacher that knows nothing it cannot fall: the zero head agrees with it, and the loss starts at its least,
    ln(10) / 2 of the labelled images. Two epochs of two steps on 26 labels, as at `smoke`, leave such a teacher.
    """
    sets = ["label_share=0.2", "n_train=600", "pretrain.epochs=1", "teacher.epochs=8", "attack.steps=1"]
    sets += ["distil.batch_size=32", "distil.attack.steps=1"]
    folder = train("acl", dataset="digits", preset="smoke", sets=sets, store=tmp_path)
    history = [one for one in read_json(folder / "card.json")["validation"]["history"] if one["stage"] == "distil"]
    losses = [one["loss"] for one in history]
    assert len(losses) == 2 and losses[1] < 0.8 * losses[0]
    assert history[-1]["robust"] > 0.3


@pytest.mark.parametrize(
    ("n_train", "name", "expected"),
    [
        (None, "random", (COUNT, COUNT)),  # the training and validation images are all that there are
        (COUNT - 2, "random", (COUNT, None)),  # a subset: validation has the last image, but who knows
        (None, "other", (COUNT - 2, None)),  # a transfer: the validation images of what is pre-trained on are not at hand
    ],
)
def test_how_long_a_file_of_pseudo_labels_must_be(n_train, name, expected):
    stage, _ = stage_of("advcl", 1, **SMALLER, n_train=n_train)
    stage.splits["pretrain"] = dataclasses.replace(data().take(range(COUNT - 2)), name=name)
    assert stage.official_size_bounds() == expected


@pytest.mark.parametrize("norm", [True, False])
def test_advcls_projector_has_one_way_for_all_routes(norm):
    stage, settings = stage_of("advcl", 1, **SMALLER, **{"pretrain.projector_norm": norm})
    assert (routes(stage.encoder), routes(stage.projector)) == (3, 1)
    before = running(stage.encoder)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    assert math.isfinite(float(train_step(stage, optimiser, batch_of(stage))))
    assert all(not torch.equal(value, before[key]) for key, value in running(stage.encoder).items())


SSP = ("ssp", "ssp_joint", "ssp_rotation", "ssp_jigsaw", "ssp_selfie")
PRETRAINED = ("simclr", "rush", "acl", "advcl", "rocl", "byorl_reimpl", "dynacl", "dynacl_pp", "deacl", *SSP)
NOISE = {"noise": "uniform:0.3"}
PROTOCOLS = {  # asked for, further settings: the stage, the votes of rush and of the others
    "SLF": ({}, {"finetune.noisy": False, "finetune.bn_adapt": "none"}, "finetune", [0, 1, 64], [0]),
    "ALF": ({}, {"finetune.noisy": False, "finetune.bn_adapt": "none"}, "finetune", [0], [0]),
    "AFF": ({}, {}, "aff", [0], [0]),
    "NSLF": (NOISE, {}, "finetune", [1, 64], [0, 1, 64]),
}


@pytest.mark.parametrize("name", PRETRAINED)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_for_every_pretrained_encoder(name, protocol):
    """S1.5; what a table shows of it is the card's."""
    others, rush, last, votes_of_rush, votes = PROTOCOLS[protocol]
    if name in SSP:  # whose group `finetune` is AFF as Chen et al. have it
        last = "finetune" if protocol == "AFF" else "linear"
    system = registry.recipes.load(name)
    layer = {"finetune.protocol": protocol} | (rush if name == "rush" else others)
    settings = override(system.settings, system.presets["smoke"], layer)
    assert system.plans(settings)[-1].name == last
    card = system.card(settings)
    assert card["protocol"] == protocol + (", re-implementation" if name == "byorl_reimpl" else "")
    assert card["votes"] == (votes_of_rush if name == "rush" else votes)
    stage, _ = stage_of(name, -1, **layer, **({} if name != "advcl" else SMALLER))
    if protocol != "AFF":
        assert (stage.noise is not None) == (protocol == "NSLF")
        assert (stage.selection_metric == "noisy") == (0 not in card["votes"] or len(card["votes"]) > 1)  # as it is shown


@pytest.mark.parametrize(
    ("recipe", "layer", "message"),
    [
        ("acl", {"finetune.protocol": "NSLF"}, r"NSLF learns under noise: --set noise=uniform:0\.3"),
        ("acl", {"finetune.protocol": "NSLF", "finetune.noisy": False} | NOISE, r"leave finetune\.noisy=true"),
        ("acl", {"finetune.protocol": "AFF"} | NOISE, "AFF learns from attacked images without noise; set noise=none"),
        ("simclr", {"finetune.protocol": "ALF"} | NOISE, "ALF learns from attacked images without noise"),
        *((name, {"noise": "uniform:0"}, r"noise=uniform:0\.3") for name in ("rush", "random_probe")),
        ("acl", {"finetune.protocol": "NSLF", "noise": "uniform:0"}, "NSLF learns under noise"),
        ("rush", {"finetune.protocol": "SLF"}, r"SLF of rush: set finetune\.noisy=false and finetune\.bn_adapt=none"),
        ("random_probe", {"finetune.protocol": "SLF"}, "second stage, NSLF"),
        ("ssp", {"finetune.protocol": "NSLF"}, r"NSLF learns under noise: --set noise=uniform:0\.3"),
        ("ssp", NOISE, "AFF learns from attacked images without noise; set noise=none"),
        ("ssp_joint", {"finetune.protocol": "SLF", "finetune.mode": "partial"}, r"finetune\.mode=partial is a way of AFF"),
        ("ssp_rotation", {"linear.protocol": "ALF"}, r"--set finetune\.protocol=ALF"),
    ],
)
def test_protocols_that_do_not_go_with_the_noise(recipe, layer, message):
    system = registry.recipes.load(recipe)
    with pytest.raises(BadInput, match=message):
        system.plans(override(system.settings, layer))


@pytest.mark.parametrize("noisy", [True, False])
def test_slf_under_a_noise_law_is_told_as_what_it_is(noisy):
    """Noise at the probe makes it NSLF; noise at inference alone leaves it SLF. Both are shown with votes and without."""
    system = registry.recipes.load("dynacl")
    card = system.card(override(system.settings, NOISE | {"finetune.noisy": noisy}))
    assert card["protocol"] == ("NSLF" if noisy else "SLF") and card["votes"] == [0, 1, 64]
