"""The pretext tasks: patches, their questions and answers against loops."""

import pytest
import torch

from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import RunSettings
from rush_bench.training.pretext import Jigsaw, Rotation, Selfie, SelfieSettings, TaskSettings, assemble, patches
from rush_bench.training.stage import Batch, Context
from rush_bench.training.transformer import Transformer

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8}
ATTACK = InnerSettings(eps=0.1, step=0.05, steps=3, mode="train")
SMALL = SelfieSettings(dim=16, layers=2, heads=2, feedforward=32)
TASKS = {"rotation": (Rotation, TaskSettings()), "jigsaw": (Jigsaw, TaskSettings()), "selfie": (Selfie, SMALL)}


def scans(count: int = 20, side: int = 8):
    pixels = torch.randint(0, 256, (count, 1, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return as_images(pixels, torch.arange(count) % 10, classes=[str(k) for k in range(10)])


def task(name: str, members: int = 1, member: int = 0, side: int = 8, settings=None):
    kind, own = TASKS[name]
    data = scans(side=side)
    context = Context(build({**SPEC, "members": members}), RunSettings(), {"pretrain": data, "val": data}, seed=0)
    return kind(context, settings or own, ATTACK, member)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 16, 16), (2, 1, 4, 8)])
def test_patches_are_the_grid_row_by_row_and_whole_puts_them_back(shape):
    x = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    pieces, (high, wide) = patches(x), (shape[2] // 4, shape[3] // 4)
    for k in range(16):
        top, left = k // 4 * high, k % 4 * wide
        assert torch.equal(pieces[:, k], x[:, :, top : top + high, left : left + wide])
    assert torch.equal(assemble(pieces), x)


def test_rotation_asks_for_the_turn():
    images = scans(400).floats()
    x, scores, turns = task("rotation").problem(images, seeded())
    assert all(torch.equal(x[i], images[i].rot90(int(turns[i]), (1, 2))) for i in range(400))
    assert scores(x).shape == (400, 4) and torch.bincount(turns, minlength=4).min() > 70


def test_jigsaw_asks_for_the_order_and_leaves_a_tenth_as_they_are():
    stage, images = task("jigsaw"), scans(2000).floats()
    x, scores, which = stage.problem(images, seeded())
    for i in range(20):
        order = stage.orders[which[i]]
        assert torch.equal(patches(x[i : i + 1])[0], patches(images[i : i + 1])[0][order])
    assert torch.equal(stage.orders[0], torch.arange(16)) and len(set(map(tuple, stage.orders.tolist()))) == 31
    counts = torch.bincount(which, minlength=31) / 2000
    assert float(counts[0]) == pytest.approx(0.1, abs=0.03) and counts[1:].min() > 0.015 and counts[1:].max() < 0.05
    assert scores(x[:3]).shape == (3, 31)


def test_selfie_compares_each_place_with_each_hidden_patch():
    stage, images = task("selfie").eval(), scans(3).floats()
    order = torch.randperm(16, generator=seeded())
    x, scores, answers = stage.problem(images, seeded())
    assert torch.equal(x, images) and answers.tolist() == [0, 1, 2, 3] * 3
    expected = []
    with torch.no_grad():
        for image in images:
            pieces = patches(image[None])[0]
            h = torch.stack([stage.embed(stage.encoder(piece[None], stages=1))[0] for piece in pieces])
            visible = [h[k] + stage.places[k] for k in order[4:]]
            summary = stage.answer(torch.stack([stage.start[0, 0], *visible])[None], seeded())[0, 0]
            for place in order[:4]:
                expected.append([float((summary + stage.places[place]) @ h[other]) / 16**0.5 for other in order[:4]])
        torch.testing.assert_close(scores(x), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_double_softmax_bounds_the_scores():
    stage = task("selfie", settings=SelfieSettings(dim=16, layers=1, heads=2, feedforward=16, double_softmax=True))
    x, scores, _ = stage.problem(scans(3).floats(), seeded())
    torch.testing.assert_close(scores(x).sum(1), torch.ones(12))


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_half_clean_half_attacked_and_the_attack_moves_statistics(name, monkeypatch):
    stage, seen = task(name).train(), []
    real = InnerSettings.run

    def spy(own, module, objective, images, generator):
        attacked = real(own, module, objective, images, generator)
        seen.append((images, attacked))
        return attacked

    monkeypatch.setattr(InnerSettings, "run", spy)
    passes = []
    stage.encoder.conv1.register_forward_hook(lambda *_: passes.append(1))
    loss = stage.loss(Batch(stage.splits["pretrain"], torch.arange(20), seeded(), 0, 0))
    (x, attacked), norm = seen[0], stage.encoder.bn1
    assert len(passes) == ATTACK.steps + 2 == int(norm.num_batches_tracked)  # train() in the attack as well
    assert float((attacked - x).abs().max()) <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert all(weight.grad is None for weight in stage.parameters())
    loss.backward()
    assert all(weight.grad is not None for weight in stage.parameter_groups() if weight is not None) or name == "selfie"
    assert stage.network.head.weight.grad is None


def test_the_attack_raises_the_task_loss():
    stage = task("rotation").eval()
    x, scores, answers = stage.problem(scans(20).floats(), seeded())
    loss = lambda v: torch.nn.functional.cross_entropy(scores(v), answers)  # noqa: E731
    attacked = InnerSettings(eps=0.1, step=0.05, steps=5).run(stage, loss, x, seeded())
    assert float(loss(attacked).detach()) > float(loss(x).detach()) + 0.05


def test_each_task_trains_its_own_member():
    stage = task("jigsaw", members=3, member=1)
    optimiser = torch.optim.SGD(stage.parameter_groups(), 0.1)
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    stage.train()
    stage.loss(Batch(stage.splits["pretrain"], torch.arange(20), seeded(), 0, 0)).backward()
    optimiser.step()
    moved = {key for key, value in stage.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("encoder.members.1.") for key in moved)


@pytest.mark.parametrize("name", TASKS)
def test_validation_asks_the_same_questions_again(name):
    stage = task(name)
    assert stage.validate() == stage.validate() and 0 <= stage.validate()["task"] <= 1


@pytest.mark.parametrize("name", ["jigsaw", "selfie"])
def test_images_that_patches_do_not_fill(name):
    with pytest.raises(BadInput, match="size=32"):
        task(name, side=10)


def test_transformer_equals_torchs():
    ours = Transformer(16, 2, 4, 32, 0.1).eval()
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.1, activation="gelu", batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        other.self_attn.in_proj_weight.data, other.self_attn.in_proj_bias.data = own.queries_keys_values.parameters()
        other.self_attn.out_proj.load_state_dict(own.mix.state_dict())
        other.linear1.load_state_dict(own.widen.state_dict())
        other.linear2.load_state_dict(own.narrow.state_dict())
        own.first.weight.data.uniform_(0.5, 1.5, generator=seeded())
        other.norm1.load_state_dict(own.first.state_dict())
        other.norm2.load_state_dict(own.second.state_dict())
    x = torch.randn(3, 5, 16, generator=seeded())
    torch.testing.assert_close(ours(x, seeded()), theirs(x), atol=1e-5, rtol=1e-4)


def test_dropout_comes_from_the_generator_and_keeps_the_mean():
    layer = Transformer(16, 1, 4, 32, 0.25).layers[0].train()
    x = torch.ones(200, 10, 16)
    dropped = layer.drop(x, seeded())
    assert torch.equal(dropped, layer.drop(x, seeded())) and not torch.equal(dropped, layer.drop(x, seeded(1)))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval().drop(x, seeded()), x)


@pytest.mark.parametrize("name", ["rotation", "jigsaw"])
def test_images_that_do_not_suit_the_task_are_refused(name):
    data = as_images(torch.zeros(4, 1, 8, 10, dtype=torch.uint8), torch.arange(4), classes=list("abcd"))
    kind, settings = TASKS[name]
    context = Context(build({**SPEC, "size": (8, 10)}), RunSettings(), {"pretrain": data, "val": data}, seed=0)
    with pytest.raises(BadInput, match=r"images of 8 x 10 pixels have no .*; --set size=32 resizes them"):
        kind(context, settings, ATTACK, 0)
