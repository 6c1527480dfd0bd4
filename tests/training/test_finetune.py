"""What moves in fine-tuning under each BatchNorm switch, and what stays."""

import pytest
import torch

from rush_bench.datasets import Images, as_images
from rush_bench.networks import build
from rush_bench.training.finetune import Finetune, FinetuneSettings
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import Batch, Context

MOVES = {
    "none": {"head"},
    "beta": {"head", "beta"},
    "affine": {"head", "beta", "gamma"},
    "stats": {"head", "stats"},
    "beta_stats": {"head", "beta", "stats"},
}


def random_images(count: int = 24, split: str = "train") -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return as_images(pixels, torch.arange(count) % 4, name="random", split=split)


def finetune_stage(settings: FinetuneSettings, noise: str = "uniform:0.3") -> Finetune:
    spec = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 16, "classes": 4}
    splits = {"train": random_images(), "val": random_images(12, "val")}
    return Finetune(Context(build(spec), RunSettings(noise=noise), splits, seed=0), settings)


def take_steps(stage: Finetune, settings: FinetuneSettings, count: int = 2) -> None:
    optimiser = make_optimiser(settings, stage.parameter_groups())
    stage.begin_epoch(0)
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        train_step(stage, optimiser, Batch(stage.splits["train"], torch.arange(16), generator, 0, step))


def kind(key: str, network: torch.nn.Module) -> str:
    if key.startswith("head."):
        return "head"
    module = network.get_submodule(key.rpartition(".")[0])
    if not isinstance(module, torch.nn.BatchNorm2d):
        return "convolution"
    return {"weight": "gamma", "bias": "beta"}.get(key.rpartition(".")[2], "stats")


@pytest.mark.parametrize("switch", MOVES)
def test_what_moves(switch):
    settings = FinetuneSettings(bn_adapt=switch)
    stage = finetune_stage(settings)
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    stage.prepare(fresh=True)
    take_steps(stage, settings)
    after = stage.network.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    # Every tensor of a kind moves, and nothing of another kind does.
    assert moved == {key for key in after if kind(key, stage.network) in MOVES[switch]}


def test_the_paper_switch_is_the_default_of_rush_and_slf_of_simclr():
    from rush_bench.recipes import rush, simclr

    assert rush.RushSettings().finetune.bn_adapt == "beta_stats"
    assert simclr.SimCLRSettings().finetune.bn_adapt == "none"


@pytest.mark.parametrize(("switch", "depends"), [("beta", False), ("none", False), ("beta_stats", True), ("stats", True)])
def test_batch_mates_matter_only_where_batch_statistics_are_used(switch, depends):
    stage = finetune_stage(FinetuneSettings(bn_adapt=switch))
    stage.begin_epoch(0)
    x = stage.splits["train"].floats()
    together, alone = stage.network.encoder(x[:8])[:4], stage.network.encoder(x[:4])
    assert torch.allclose(together, alone, atol=1e-6) is not depends


@pytest.mark.parametrize("noise", ["uniform:0.3", "none"])
def test_noise_is_added_once_last_and_not_clipped(noise):
    stage = finetune_stage(FinetuneSettings(), noise)
    data = stage.splits["train"]
    batch = Batch(data, torch.arange(16), torch.Generator().manual_seed(0), 0, 0)
    added = stage.inputs(batch) - data.floats(torch.arange(16))
    if noise == "none":
        assert not added.any()
    else:
        assert 0.299 < added.abs().max() <= 0.3001 and abs(float(added.std()) - 0.3 / 3**0.5) < 0.005
        assert stage.inputs(batch).min() < 0 and stage.inputs(batch).max() > 1


def test_cached_features_give_the_same_weights_as_recomputed_ones():
    settings = FinetuneSettings(noisy=False)
    cached, plain = finetune_stage(settings), finetune_stage(settings)
    cached.prepare(fresh=True)
    assert set(cached.features) == {"train"} and not plain.features
    for stage in (cached, plain):
        take_steps(stage, settings, 5)
    torch.testing.assert_close(cached.network.state_dict(), plain.network.state_dict())
    assert cached.validate() == plain.validate()


@pytest.mark.parametrize("settings", [FinetuneSettings(), FinetuneSettings(noisy=False, augment="crop_flip")])
def test_nothing_is_cached_where_inputs_change(settings):
    stage = finetune_stage(settings)
    stage.prepare(fresh=True)
    assert not stage.features


def test_crop_flip_moves_the_images():
    stage = finetune_stage(FinetuneSettings(augment="crop_flip", noisy=False))
    data, rows = stage.splits["train"], torch.arange(16)
    views = stage.inputs(Batch(data, rows, torch.Generator().manual_seed(0), 0, 0))
    assert views.shape == (16, 1, 16, 16) and not torch.equal(views, data.floats(rows))


@pytest.mark.parametrize(("init", "zero"), [("zero", True), ("default", False)])
def test_head_init(init, zero):
    stage = finetune_stage(FinetuneSettings(head_init=init))
    stage.prepare(fresh=True)
    assert bool((stage.network.head.weight == 0).all()) is zero
    stage.network.head.weight.data.fill_(1)
    stage.prepare(fresh=False)  # after a checkpoint was loaded, its head stays
    assert bool((stage.network.head.weight == 1).all())


@pytest.mark.parametrize(("noise", "keys"), [("none", {"clean"}), ("uniform:0.3", {"clean", "noisy"})])
def test_validation_numbers(noise, keys):
    stage = finetune_stage(FinetuneSettings(bn_adapt="beta"), noise)
    numbers = stage.validate()
    assert set(numbers) == keys and stage.selection_metric in keys
    assert numbers == stage.validate()  # the noise draw is fixed
    val = stage.splits["val"]
    right = (stage.network.eval()(val.floats()).argmax(1) == val.labels).float().mean()
    assert numbers["clean"] == pytest.approx(float(right))
