"""RUSH and SimCLR against the paper: views, order, noise, numbers, and the cost of a step."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rush_bench import registry
from rush_bench.datasets import as_images, views
from rush_bench.networks import build
from rush_bench.noise import Noise, Uniform
from rush_bench.recipes import rush, simclr
from rush_bench.settings import override
from rush_bench.store import read_card
from rush_bench.training import train
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.loop import train_step
from rush_bench.training.losses import nt_xent
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.prepare import resolve_settings
from rush_bench.training.stage import Batch, Context


def stage_of(recipe: str, number: int = 0, count: int = 64, **layer):
    """A recipe's stage on random colour images, with the paper's settings but a small network."""
    system = registry.recipes.load(recipe)
    settings = override(system.settings, layer)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = as_images(pixels, torch.arange(count) % 10)
    network = build({"name": "resnet", "blocks": [1, 1], "width": 4, "size": 8})
    plan = system.plans(settings)[number]
    splits = {"pretrain": images, "train": images, "val": images}
    return plan.make(Context(network, settings, splits, 0)), plan


def batch_of(stage, rows: int = 16, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(stage.splits["train"], torch.arange(rows), generator, 0, step)


def seen_pair(stage, batch, monkeypatch) -> list[torch.Tensor]:
    """The two tensors that enter the network."""
    pair: list[torch.Tensor] = []
    real = stage.project
    monkeypatch.setattr(stage, "project", lambda x1, x2: pair.extend((x1, x2)) or real(x1, x2))
    stage.loss(batch)
    return pair


@pytest.mark.parametrize(
    ("recipe", "layer", "noisy"),
    [
        ("rush", {}, [False, True]),  # eq. 11: exactly one, the second
        ("rush", {"pretrain.noisy_views": "both"}, [True, True]),
        ("rush", {"pretrain.noisy_views": "none"}, [False, False]),
        ("simclr", {}, [False, False]),
        ("simclr", {"noise": "uniform:0.3"}, [False, False]),  # its noise is the probe's and the inference's
    ],
)
def test_which_views_are_noisy(recipe, layer, noisy, monkeypatch):
    stage, _ = stage_of(recipe, **layer)
    stage.views = lambda x, generator: torch.ones_like(x)
    pair = seen_pair(stage, batch_of(stage, 64), monkeypatch)
    for view, has_noise in zip(pair, noisy, strict=True):
        assert torch.equal(view, torch.ones_like(view)) is not has_noise
        if has_noise:  # U(-0.3, 0.3) for each pixel and channel, not clipped
            noise = view - 1
            assert noise.min() >= -0.3001 and 0.299 < noise.max() <= 0.3001
            assert float(noise.std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)
            channels = noise.transpose(0, 1).flatten(1)
            assert (torch.corrcoef(channels) - torch.eye(3)).abs().max() < 0.06
    if all(noisy):
        assert not torch.equal(pair[0], pair[1])


def test_order_of_appendix_a(monkeypatch):
    """Crop with flip, jitter, gray, and noise last; nothing else, no blur, no normalisation."""
    order: list[tuple] = []

    def record(module, name):
        real = getattr(module, name)

        def wrapped(*args, **keys):
            order.append((name, args[2:], keys))
            return real(*args, **keys)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("random_resized_crop", "color_jitter", "random_gray"):
        record(views, name)
    record(Noise, "sample")
    stage, _ = stage_of("rush")
    stage.loss(batch_of(stage))
    names = [name for name, _, _ in order]
    assert names == ["random_resized_crop", "color_jitter", "random_gray"] * 2 + ["sample"]
    _, _, crop = order[0]
    assert crop["scale"] == (0.08, 1.0) and crop["flip"] == 0.5 and crop["interpolation"] == "bilinear"
    assert order[1][1] == (0.4, 0.4, 0.4, 0.1) and order[1][2] == {"p": 0.8}
    assert order[2][2] == {"p": 0.2}


def test_the_two_views_differ_and_so_do_steps(monkeypatch):
    stage, _ = stage_of("simclr")
    one, two = (seen_pair(stage, batch_of(stage, step=step), monkeypatch) for step in (0, 1))
    again = seen_pair(stage, batch_of(stage, step=0), monkeypatch)
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], two[0])
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])


def test_the_loss_is_nt_xent_of_both_views_in_one_batch(monkeypatch):
    stage, _ = stage_of("rush", **{"pretrain.temperature": 0.2})
    batch, outputs = batch_of(stage), []
    stage.projector.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss = stage.loss(batch)
    assert len(outputs) == 1 and outputs[0].shape == (32, 128)
    torch.testing.assert_close(loss, nt_xent(*outputs[0].chunk(2), 0.2))


def test_projector_is_the_two_layer_mlp():
    stage, _ = stage_of("rush")
    kinds = [type(module).__name__ for module in stage.projector]
    assert kinds == ["Linear", "ReLU", "Linear"]
    assert (stage.projector[0].in_features, stage.projector[0].out_features, stage.projector[2].out_features) == (8, 8, 128)
    stage, _ = stage_of("rush", **{"pretrain.projector_norm": True, "pretrain.projector_hidden": 32})
    assert [type(module).__name__ for module in stage.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


# Recipes S2.1 and appendix B of the RUSH paper; for SimCLR "as 2.1" (S2.2).
PAPER = {
    "pretrain.epochs": 1000,
    "pretrain.batch_size": 512,
    "pretrain.lr": 0.5,
    "pretrain.lr_min": 0.001,
    "pretrain.momentum": 0.9,
    "pretrain.weight_decay": 1e-4,
    "pretrain.warmup_epochs": 0,
    "pretrain.optimiser": "sgd",
    "pretrain.temperature": 0.5,
    "pretrain.crop_floor": 0.08,
    "pretrain.flip": 0.5,
    "pretrain.jitter": (0.4, 0.4, 0.4, 0.1),
    "pretrain.jitter_p": 0.8,
    "pretrain.gray_p": 0.2,
    "finetune.epochs": 25,
    "finetune.batch_size": 512,
    "finetune.lr": 0.1,
    "finetune.lr_min": 0.001,
    "finetune.momentum": 0.9,
    "finetune.weight_decay": 2e-4,
    "finetune.augment": "none",
    "finetune.noisy": True,
    "network.name": "resnet18",
    "network.stem": "cifar",
    "network.mean": (),
}
OWN = {
    "rush": {"noise": "uniform:0.3", "pretrain.noisy_views": "one", "finetune.bn_adapt": "beta_stats"},
    "simclr": {"noise": "none", "finetune.bn_adapt": "none"},
}


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16)])
def test_preset_paper_has_the_papers_numbers(recipe, shape):
    settings = resolve_settings(registry.recipes.load(recipe), "paper", shape, [])
    for key, expected in (PAPER | OWN[recipe]).items():
        value = settings
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected, key


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("preset", ["short", "smoke", "demo"])
@pytest.mark.parametrize(("shape", "network"), [((3, 32, 32), "resnet18"), ((1, 16, 16), "tiny")])
def test_other_presets_shorten_and_fit_the_images(recipe, preset, shape, network):
    settings = resolve_settings(registry.recipes.load(recipe), preset, shape, [])
    assert settings.network.name == network and settings.pretrain.flip == (0.0 if network == "tiny" else 0.5)
    assert settings.pretrain.epochs <= 100 and settings.finetune.epochs <= 10
    per_image = 2 if (preset, network) == ("demo", "tiny") else 1
    assert settings.pretrain.lr / settings.pretrain.batch_size == pytest.approx(per_image * 0.5 / 512, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "layer", "expected"),
    [
        ("rush", {}, ("NSLF", [1, 64])),
        ("simclr", {}, ("SLF", [0])),
        ("simclr", {"noise": "uniform:0.3"}, ("NSLF", [0, 1, 64])),
        ("simclr", {"noise": "uniform:0.3", "finetune.noisy": "false"}, ("SLF", [0, 1, 64])),
    ],
)
def test_protocol_and_votes_of_the_four_combinations(recipe, layer, expected):
    system = registry.recipes.load(recipe)
    card = system.card(override(system.settings, layer))
    assert (card["protocol"], card["votes"]) == expected and card["extra_data"] is None


@pytest.mark.parametrize(("noisy", "expected"), [(True, Uniform(0.3)), (False, None)])
def test_simclrs_probe_draws_the_noise_that_it_is_told_to(noisy, expected):
    stage, _ = stage_of("simclr", 1, **{"noise": "uniform:0.3", "finetune.noisy": noisy})
    assert isinstance(stage, Finetune) and stage.noise == expected and stage.selection_metric == "noisy"


class Operations(TorchDispatchMode):
    """Counts what is dispatched, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket._qualified_op_name] += 1
        if function.overloadpacket._qualified_op_name == "aten::index":
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), "a boolean index is a host sync"
        return function(*args, **(kwargs or {}))


SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("number", [0, 1])
def test_operations_of_a_step_do_not_grow_with_the_batch_and_none_stops_the_device(recipe, number):
    counts = []
    for rows in (8, 48):
        stage, plan = stage_of(recipe, number)
        optimiser = make_optimiser(plan.settings, stage.parameter_groups())
        stage.prepare(fresh=True)
        stage.begin_epoch(0)
        train_step(stage, optimiser, batch_of(stage, rows, 0))  # momentum buffers exist from here on
        with Operations() as operations:
            train_step(stage, optimiser, batch_of(stage, rows, 1))
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert not SYNCS & set(counts[0])
    assert 0 < counts[0].total() < 700


@pytest.mark.parametrize("recipe", OWN)
def test_smoke_on_digits_learns(recipe, tmp_path):
    train(recipe, dataset="digits", preset="smoke", store=tmp_path, sets=["pretrain.epochs=3", "finetune.epochs=2"])
    card = read_card(tmp_path, f"{recipe}-digits")
    for stage in ("pretrain", "finetune"):
        losses = [entry["loss"] for entry in card["validation"]["history"] if entry["stage"] == stage]
        assert losses[-1] < losses[0]
    assert card["network"]["name"] == "tiny" and card["validation"]["knn"] > 0.6


def write_stl10(folder, counts=(40, 20, 64)) -> None:
    """A small folder in STL-10's official binary format: 3 x 96 x 96, column by column, labels from 1."""
    generator = np.random.default_rng(0)
    (folder / "stl10_binary").mkdir(parents=True)
    for split, count in zip(("train", "test", "unlabeled"), counts, strict=True):
        generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / "stl10_binary" / f"{split}_X.bin")
        if split != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / "stl10_binary" / f"{split}_y.bin")


def test_stl10_in_its_official_format(tmp_path):
    write_stl10(tmp_path / "data")
    sets = ["network.name=resnet", "network.blocks=1,1,1,1", "network.width=4", "pretrain.batch_size=32"]
    folder = train("rush", dataset="stl10", preset="smoke", data_dir=tmp_path / "data", store=tmp_path, sets=sets)
    card = read_card(tmp_path, folder.name)
    assert folder.name == "rush-stl10" and card["network"]["size"] == 32 and card["network"]["channels"] == 3
    # Pre-training sees the unlabelled images alone (sources S5.27), fine-tuning the labelled ones without a tenth.
    assert (card["data"]["n_pretrain"], card["data"]["n_train"], card["data"]["n_val"]) == (64, 36, 4)


def test_defaults_are_frozen_and_the_recipes_registered():
    assert {"rush", "simclr"} <= set(registry.recipes.entries)
    assert rush.RushSettings() == registry.recipes.load("rush").settings
    with pytest.raises(AttributeError):
        simclr.SimCLRSettings().noise = "none"  # type: ignore[misc]
    assert FinetuneSettings().bn_adapt == "none"
