"""SLF, ALF and AFF: what moves, what is attacked, which route each image takes; and learning from a share of labels."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.networks import build, route, routed
from rush_bench.networks.routes import CARRIED
from rush_bench.recipes.acl import ACLSettings
from rush_bench.training import losses, protocols
from rush_bench.training.aff import AFF, AFFSettings
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.protocols import LinearSettings, PretrainedSettings
from rush_bench.training.semi_supervised import TeacherSettings, TeacherStage, splits_from_share
from rush_bench.training.stage import Batch, Context

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "classes": 4}
PLAIN = {"augment": "none", "head_init": "default"}


def images(count: int = 32, split: str = "train"):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    return as_images(pixels, torch.arange(count) % 4, name="random", split=split)


def context(carried: dict | None = None, **spec) -> Context:
    splits = {"train": images(), "val": images(12, "val")}
    network = build(SPEC | spec, seed=1)
    for k in range(3):  # statistics away from their start
        network(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(k)))
    return Context(network, PretrainedSettings(), splits, 0, carried if carried is not None else {})


def batch_of(stage, step: int = 0, split: str = "train") -> Batch:
    return Batch(stage.splits[split], torch.arange(16), torch.Generator().manual_seed(step), 0, step)


def run_steps(stage, settings, count: int = 2, split: str = "train") -> set[str]:
    """Take steps; names of the network's tensors that moved."""
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    stage.prepare(fresh=True)
    stage.begin_epoch(0)
    optimiser = make_optimiser(settings, stage.parameter_groups())
    for step in range(count):
        train_step(stage, optimiser, batch_of(stage, step, split))
    return {key for key, value in stage.network.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("protocol", ["SLF", "ALF"])
@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_linear_protocols_move_the_head_alone(protocol, loss):
    settings = LinearSettings(protocol=protocol, alf_loss=loss, attack=InnerSettings(eps=0.1, step=0.05, steps=2))
    stage = Finetune(context(), settings)
    assert run_steps(stage, settings) == {"head.weight", "head.bias"}
    assert stage.selection_metric == "robust" and set(stage.validate()) == {"clean", "robust"}
    assert 0 <= stage.validate()["robust"] <= stage.validate()["clean"]


def caught_attack(monkeypatch) -> list:
    """What each inner attack was given and gave back."""
    seen, real = [], InnerSettings.run

    def run(self, module, objective, x, generator):
        statistics = {key: value.clone() for key, value in module.state_dict().items() if "running" in key}
        attacked = real(self, module, objective, x, generator)
        moved = {key for key, value in statistics.items() if not torch.equal(module.state_dict()[key], value)}
        with attack_mode(module, self.mode), torch.no_grad():
            assert float((attacked - x).abs().max()) <= self.eps + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
            assert all(weight.grad is None for weight in module.parameters())
            seen.append((x, attacked, float(objective(x)), float(objective(attacked)), moved))
        return attacked

    monkeypatch.setattr(InnerSettings, "run", run)
    return seen


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_alf_is_cross_entropy_at_the_attacked_image(loss, monkeypatch):
    attack = InnerSettings(eps=0.1, step=0.03, steps=5, start="gaussian" if loss == "trades" else "uniform")
    stage = Finetune(context(), LinearSettings(protocol="ALF", alf_loss=loss, attack=attack, **PLAIN))
    stage.begin_epoch(0)
    seen = caught_attack(monkeypatch)
    batch = batch_of(stage)
    got = stage.loss(batch)
    ((x, attacked, before, after, moved),) = seen
    assert torch.equal(x, batch.images) and not moved
    assert after > before + 0.01 and float((attacked - x).abs().max()) <= 0.1 + 1e-6
    clean, robust = stage.network.eval()(x), stage.network(attacked)
    if loss == "ce":
        expected = nn.functional.cross_entropy(robust, batch.labels)
    else:
        expected = losses.trades(clean, robust, batch.labels, 6.0)
    torch.testing.assert_close(got, expected)
    assert not stage.features  # nothing is cached where images change


@pytest.mark.parametrize("routes", [1, 2])
@pytest.mark.parametrize("objective", ["trades", "pgd_at"])
def test_aff_against_the_formula(routes, objective, monkeypatch):
    """A clean pass (route 0 of two) and an attacked pass (route 1), each a BatchNorm batch of its own, in train()."""
    place = context()
    settings = AFFSettings(objective=objective, routes=routes, attack=InnerSettings(0.1, 0.03, 5, "gaussian"), **PLAIN)
    if routes == 2:
        both = routed(copy.deepcopy(place.network.encoder), 2, place=1)
        for key, value in both.state_dict().items():
            if ".sets.0." in key and value.is_floating_point():
                value.mul_(1.3)
        place.carried[CARRIED] = both.state_dict()
    stage = AFF(place, settings)
    stage.prepare(fresh=True)
    stage.begin_epoch(0)
    reference = copy.deepcopy(stage)
    seen, batch = caught_attack(monkeypatch), batch_of(stage)
    got = stage.loss(batch)
    ((x, attacked, before, after, moved),) = seen
    assert not moved and after > before + 0.01

    def through(images, number):
        if routes == 1:
            return reference.network(images)
        with route(reference.encoder, number):
            return reference.network.head(reference.encoder(images))

    if objective == "trades":
        clean, robust = (through(v, k).double().detach() for k, v in enumerate((x, attacked)))
        total = 0.0
        for c, r, y in zip(clean, robust, batch.labels.tolist(), strict=True):
            p, q = c.softmax(0), r.softmax(0)
            total += -float(p[y].log()) + 6 * sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    else:
        robust = through(attacked, 1).double().detach()
        total = sum(-float(r.log_softmax(0)[y]) for r, y in zip(robust, batch.labels, strict=True))
    assert float(got.detach()) == pytest.approx(total / 16, rel=1e-4)


@pytest.mark.parametrize(
    ("trained", "still"),
    [("all", ()), ("last_stage", ("encoder.conv1", "encoder.bn1", "encoder.layer1")), ("head", ("encoder.",))],
)
def test_freeze_modes(trained, still):
    settings = AFFSettings(trained=trained, attack=InnerSettings(0.1, 0.05, 2, "gaussian"))
    moved = run_steps(stage := AFF(context(), settings), settings, 3)
    every = set(stage.network.state_dict())
    assert moved == {key for key in every if not (still and key.startswith(still))}


def test_last_stage_has_the_batchnorm_after_it():
    """Pre-activation networks normalise once more after the last stage: that is part of it."""
    spec = {"name": "preact-resnet", "blocks": [1, 1], "width": 4, "stem_width": 4, "final_norm": True}
    settings = AFFSettings(trained="last_stage", attack=InnerSettings(0.1, 0.05, 2, "gaussian"))
    moved = run_steps(stage := AFF(context(**spec), settings), settings, 3)
    kept = {key for key in stage.network.state_dict() if key.startswith(("encoder.conv1", "encoder.bn1", "encoder.layer1"))}
    assert kept and moved == set(stage.network.state_dict()) - kept
    assert {"encoder.bn.weight", "encoder.bn.running_mean"} <= moved


def test_two_routes_move_both_and_the_network_is_the_attacked_one():
    place = context()
    place.carried[CARRIED] = routed(copy.deepcopy(place.network.encoder), 2, place=1).state_dict()
    settings = AFFSettings(routes=2, attack=InnerSettings(0.1, 0.05, 2, "zero"))
    stage = AFF(place, settings)
    before = {key: value.clone() for key, value in stage.encoder.state_dict().items()}
    run_steps(stage, settings)
    after = stage.encoder.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in after)
    assert torch.equal(after["bn1.sets.1.weight"], stage.network.state_dict()["encoder.bn1.weight"])
    assert not torch.equal(after["bn1.sets.0.running_mean"], after["bn1.sets.1.running_mean"])


@pytest.mark.parametrize(("protocol", "stage"), [("SLF", "finetune"), ("ALF", "finetune"), ("AFF", "aff")])
def test_the_setting_chooses_the_stage_and_the_card(protocol, stage):
    settings = PretrainedSettings(finetune=LinearSettings(protocol=protocol))
    plan = protocols.finetuning_plan(settings)
    assert plan.name == stage and plan.labelled and plan.settings == getattr(settings, stage)
    assert protocols.card(settings) == {"protocol": protocol, "extra_data": None, "votes": [0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FinetuneSettings(protocol="AFF"), "no full fine-tuning"),
        (FinetuneSettings(protocol="ALF", bn_adapt="stats"), "ALF is for a frozen encoder"),
    ],
)
def test_protocols_that_are_not_there(settings, message):
    with pytest.raises(BadInput, match=message):
        Finetune(context(), settings)


@pytest.mark.parametrize(("share", "count"), [(0.125, 4), (0.5, 16)])
def test_a_share_of_the_labels(share, count):
    data = images()
    parts = splits_from_share(data, share)
    assert len(parts["labelled"]) == count and len(parts["unlabelled"]) == 32 - count
    both = torch.cat([parts["labelled"].index, parts["unlabelled"].index])
    assert torch.equal(both.sort().values, data.index)
    assert torch.bincount(parts["labelled"].labels).tolist() == [count // 4] * 4
    more = splits_from_share(data, 0.5)["labelled"].index  # nested
    assert set(parts["labelled"].index.tolist()) <= set(more.tolist())


def test_a_share_below_one_image_a_class():
    with pytest.raises(BadInput, match=r"leaves class '\d' without a label; give at least 0.12"):
        splits_from_share(images(), 0.06)


def semi_context() -> Context:
    place = context()
    place.splits.update(splits_from_share(place.splits["train"], 0.25))
    place.carried[CARRIED] = routed(copy.deepcopy(place.network.encoder), 2, place=1).state_dict()
    for key, value in place.carried[CARRIED].items():
        if ".sets.0." in key and value.is_floating_point():
            value.mul_(1.3)
    return place


def test_the_teacher_starts_from_the_clean_route_and_leaves_the_network_alone():
    place = semi_context()
    settings = TeacherSettings(batch_size=8, augment="none")
    stage = TeacherStage(place, settings)
    stage.prepare(fresh=True)
    with route(both := routed(build(SPEC).encoder, 2, place=1), 0):
        both.load_state_dict(place.carried[CARRIED])
        x = place.splits["train"].floats()
        torch.testing.assert_close(stage.teacher.eval().encoder(x), both.eval()(x))
    start = stage.teacher.encoder.conv1.weight.clone()
    stage.train()
    optimiser = make_optimiser(settings, stage.parameter_groups())
    before = copy.deepcopy(stage.network.state_dict())
    train_step(stage, optimiser, Batch(place.splits["labelled"], torch.arange(8), torch.Generator(), 0, 0))
    train_step(stage, optimiser, Batch(place.splits["labelled"], torch.arange(8), torch.Generator(), 0, 1))
    assert not torch.equal(start, stage.teacher.encoder.conv1.weight)
    assert all(torch.equal(value, before[key]) for key, value in stage.network.state_dict().items())
    stage.best = stage.weights()
    stage.finish()
    assert torch.equal(place.carried["teacher"]["head.weight"], stage.teacher.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_share": 0.1, "pretrain": replace(ACLSettings().pretrain, variant="A2A")}, "needs two BatchNorm routes"),
        (
            {"aff": replace(ACLSettings().aff, routes=2), "pretrain": replace(ACLSettings().pretrain, variant="S2S")},
            "aff.routes=2",
        ),
    ],
)
def test_acl_settings_that_cannot_be(change, message):
    from rush_bench.recipes.acl import plans

    with pytest.raises(BadInput, match=message):
        plans(replace(ACLSettings(), **change))


@pytest.mark.parametrize("objective", ["trades", "pgd_at"])
def test_passes_of_fine_tuning_the_head_go_back_to_no_weights(objective):
    """Of one image: attack steps forward and back, TRADES' clean look, and what learns from the clean and the attacked one."""
    attack, learns = InnerSettings(steps=7), 2 if objective == "trades" else 1
    looks = 1 if objective == "trades" else 0
    asked = {"objective": objective, "attack": attack}
    passes = {part: protocols.aff_passes(AFFSettings(**asked, trained=part)) for part in ("all", "last_stage", "head")}
    assert passes["head"] == looks + 7 * 2 + learns * 1
    assert passes["all"] == looks + 7 * 2 + learns * 3 == passes["last_stage"]
