"""The `paper` preset of every recipe against the numbers of recipes R2, one row a recipe."""

from functools import reduce

import pytest

from rush_bench import registry
from rush_bench.settings import override

IMAGENET = {"network.mean": (0.485, 0.456, 0.406), "network.std": (0.229, 0.224, 0.225)}
CIFAR = {"network.mean": (0.4914, 0.4822, 0.4465)}
SGD = {"train.optimiser": "sgd", "train.lr": 0.1, "train.momentum": 0.9, "train.nesterov": False, "train.decay": 0.1}
STEPS = {"train.schedule": "steps", "train.warmup_epochs": 0, "train.augment": "crop_flip", "train.padding": 4}
PGD10 = {"attack.eps": 8 / 255, "attack.step": 2 / 255, "attack.steps": 10, "attack.start": "uniform", "attack.mode": "eval"}


def sgd(epochs, batch_size, milestones, weight_decay):
    own = {"epochs": epochs, "batch_size": batch_size, "milestones": milestones, "weight_decay": weight_decay}
    return SGD | STEPS | {f"train.{key}": value for key, value in own.items()}


def task(name, epochs, weight_decay, nesterov=False):
    own = {"epochs": epochs, "weight_decay": weight_decay, "nesterov": nesterov, "lr": 0.1, "warmup_from": 0.01}
    own |= {"batch_size": 128, "schedule": "cosine", "momentum": 0.9}
    return {f"{name}.{key}": value for key, value in own.items()}


ROWS: dict[str, dict] = {
    "pgd_at": sgd(200, 128, (100, 150), 5e-4) | PGD10 | {"noise": "none", "network.mean": ()},  # R2.16
    "trades": sgd(76, 128, (74,), 2e-4)  # R2.16: decay at epoch 75, counted from 1
    | {"train.beta": 6.0, "attack.eps": 0.031, "attack.step": 0.007, "attack.steps": 10, "attack.start": "gaussian"}
    | {"attack.mode": "eval", "network.mean": ()},
    "noise_sup": sgd(200, 128, (100, 150), 5e-4) | {"noise": "uniform:0.3", "network.name": "resnet18"},  # R2.17
    "random_probe": {  # RUSH's second stage, R2.1
        "noise": "uniform:0.3",
        "network.name": "resnet18",
        "finetune.epochs": 25,
        "finetune.batch_size": 512,
        "finetune.lr": 0.1,
        "finetune.lr_min": 0.001,
        "finetune.momentum": 0.9,
        "finetune.weight_decay": 2e-4,
        "finetune.bn_adapt": "beta_stats",
    },
    "cohen": sgd(90, 256, (30, 60), 1e-4) | CIFAR | {"noise": "gaussian:0.25"},  # R2.7
    "smoothadv": sgd(150, 256, (50, 100), 1e-4)  # R2.8
    | CIFAR
    | {"noise": "gaussian:0.12", "attack.method": "pgd", "attack.eps": 127 / 256, "attack.steps": 10, "attack.ramp": 10},
    "free": sgd(29, 128, (14.25, 21.37), 2e-4) | {"train.replays": 8, "attack.eps": 8 / 255},  # R2.6
    "dataaug": SGD  # R2.9
    | {"train.lr": 0.4, "train.nesterov": True, "train.weight_decay": 5e-4, "train.batch_size": 1024, "train.epochs": 400}
    | {"train.schedule": "cosine", "train.warmup_epochs": 10, "train.beta": 6.0, "train.average": 0.995}
    | {"train.cutmix": True, "train.generated": "", "train.generated_share": 0.7, "train.label_smoothing": 0.1}
    | {"attack.eps": 8 / 255, "attack.steps": 10, "attack.method": "adam", "attack.step": 0.1, "attack.late_step": 0.01}
    | {"attack.mode": "batch", "select.steps": 40, "train.select_images": 1024}
    | CIFAR,
    "ssp": task("rotation", 100, 3e-4)  # R2.11
    | task("jigsaw", 100, 3e-4)
    | task("selfie", 200, 1e-4, nesterov=True)
    | {"selfie.padding": 2, "selfie.flip": 0.0, "selfie.hidden": 4, "selfie.dim": 1024, "selfie.layers": 12}
    | {"selfie.heads": 16, "selfie.feedforward": 2048, "selfie.dropout": 0.1, "selfie.double_softmax": False}
    | PGD10
    | {"attack.mode": "train", "network.members": 3}
    | {"finetune.epochs": 100, "finetune.milestones": (60, 80), "finetune.weight_decay": 3e-4, "finetune.lr": 0.1}
    | {"finetune.batch_size": 128, "finetune.padding": 4, "finetune.flip": 0.5, "finetune.mode": "full"}
    | {"finetune_attack.eps": 8 / 255, "finetune_attack.steps": 10}
    | IMAGENET,
}


def value(settings, key: str):
    return reduce(getattr, key.split("."), settings)


@pytest.mark.parametrize("name", ROWS)
def test_paper_settings(name):
    recipe = registry.recipes.load(name)
    settings = override(recipe.settings, recipe.presets["paper"], recipe.adapt("paper", (3, 32, 32)))
    assert {key: value(settings, key) for key in ROWS[name]} == ROWS[name]


def test_free_makes_80_000_updates_with_falls_after_40_000_and_60_000():
    train = registry.recipes.load("free").settings.train
    an_epoch = 45_000 // train.batch_size * train.replays
    updates = [40_000, 60_000, 80_000]
    assert [m * an_epoch for m in (*train.milestones, train.epochs)] == pytest.approx(updates, rel=0.02)


def test_pretext_tasks_warm_up_for_200_steps():
    settings = registry.recipes.load("ssp").settings
    for own in (settings.rotation, settings.jigsaw, settings.selfie):
        assert own.warmup_epochs * (45_000 // own.batch_size) == pytest.approx(200, abs=1)


@pytest.mark.parametrize("name", sorted(set(registry.recipes.entries)))
def test_every_recipe_has_the_presets_and_a_card(name):
    recipe = registry.recipes.load(name)
    assert {"paper", "short", "smoke"} <= set(recipe.presets)
    card = recipe.card(recipe.settings)
    assert {"protocol", "extra_data", "votes"} <= set(card) and card["votes"]
    for shape in ((1, 16, 16), (3, 32, 32)):
        for preset in recipe.presets:
            settings = override(recipe.settings, recipe.presets[preset], recipe.adapt(preset, shape))
            plans = recipe.plans(settings)
            # A plan's settings are the run's of the same name: batches are fitted to the data by that name.
            assert all(value(settings, plan.name) == plan.settings for plan in plans)
            assert settings.network.mean == () or len(settings.network.mean) == shape[0]
