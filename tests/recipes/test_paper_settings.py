"""The `paper` preset of every recipe against the numbers of docs/sources.md, one row per recipe."""

from functools import reduce

import pytest

from rush_bench import registry
from rush_bench.errors import BadInput
from rush_bench.settings import override
from rush_bench.training.prepare import resolve_settings

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
    "pgd_at": sgd(200, 128, (100, 150), 5e-4) | PGD10 | {"noise": "none", "network.mean": ()},  # S2.16
    "trades": sgd(76, 128, (74,), 2e-4)  # S2.16: decay at epoch 75, counted from 1
    | {"train.beta": 6.0, "attack.eps": 0.031, "attack.step": 0.007, "attack.steps": 10, "attack.start": "gaussian"}
    | {"attack.mode": "eval", "network.mean": ()},
    "standard": sgd(200, 128, (100, 150), 5e-4) | {"network.name": "resnet18"},  # S2.16, without its attack
    "noise_sup": sgd(200, 128, (100, 150), 5e-4) | {"noise": "uniform:0.3", "network.name": "resnet18"},  # S2.17
    "random_probe": {  # RUSH's second stage, S2.1
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
    "purify": sgd(200, 128, (100, 150), 5e-4)  # S2.18
    | {"diffusion.epochs": 2048, "diffusion.batch_size": 128, "diffusion.optimiser": "adam", "diffusion.lr": 2e-4}
    | {"diffusion.lr_min": 2e-4, "diffusion.clip": 1.0, "diffusion.ema": 0.9999, "diffusion.flip": 0.5}
    | {"diffusion.timesteps": 1000, "diffusion.width": 128, "diffusion.multipliers": (1, 2, 2, 2)}
    | {"purification.start": 0.1, "purification.steps": 100, "purification.eta": 1.0, "noise": "none"},
    "cohen": sgd(90, 256, (30, 60), 1e-4) | CIFAR | {"noise": "gaussian:0.25"},  # S2.7
    "smoothadv": sgd(150, 256, (50, 100), 1e-4)  # S2.8
    | CIFAR
    | {"network.std": (1.0, 1.0, 1.0)}
    | {
        "noise": "gaussian:0.12",
        "attack.draws": 2,
        "attack.method": "pgd",
        "attack.eps": 127 / 256,
        "attack.steps": 10,
        "attack.ramp": 10,
    },
    "free": sgd(228, 128, (114, 171), 2e-4) | {"train.replays": 8, "attack.eps": 8 / 255},  # S2.6
    "dataaug": SGD  # S2.9
    | {"train.lr": 0.4, "train.nesterov": True, "train.weight_decay": 5e-4, "train.batch_size": 1024, "train.epochs": 400}
    | {"train.schedule": "cosine", "train.warmup_epochs": 10, "train.beta": 6.0, "train.average": 0.995}
    | {
        "train.mixes": True,
        "train.bn_momentum": 0.01,
        "train.generated": "",
        "train.generated_share": 0.7,
        "train.label_smoothing": 0.1,
    }
    | {"attack.eps": 8 / 255, "attack.steps": 10, "attack.method": "adam", "attack.step": 0.1, "attack.late_step": 0.01}
    | {"attack.mode": "batch", "select.steps": 40, "train.select_images": 1024}
    | CIFAR,
    "ssp": task("rotation", 100, 3e-4)  # S2.11
    | task("jigsaw", 100, 3e-4)
    | task("selfie", 200, 1e-4, nesterov=True)
    | {"selfie.padding": 2, "selfie.flip": 0.0, "selfie.hidden": 4, "selfie.dim": 1024, "selfie.layers": 12}
    | {"selfie.heads": 16, "selfie.feedforward": 2048, "selfie.dropout": 0.1, "selfie.double_softmax": False}
    | PGD10
    | {"attack.mode": "train", "network.members": 3}
    | {"finetune.epochs": 100, "finetune.milestones": (60, 80), "finetune.weight_decay": 3e-4, "finetune.lr": 0.1}
    | {"finetune.batch_size": 128, "finetune.padding": 4, "finetune.flip": 0.5, "finetune.mode": "full"}
    | {"finetune_attack.eps": 8 / 255, "finetune_attack.steps": 10, "finetune_attack.mode": "train"}
    | {"finetune.warmup_epochs": 0.57, "finetune.warmup_from": 0.01}
    | IMAGENET,
    "ssp_joint": {"joint.epochs": 150, "joint.lr": 0.001, "joint.batch_size": 80, "joint.schedule": "cosine"}  # S2.11
    | {"joint.diversity": 0.1, "joint.ridge": 1e-5, "joint.hidden": 4, "joint.dim": 1024, "joint.layers": 12}
    | {"joint.heads": 16, "joint.feedforward": 2048, "joint.dropout": 0.1, "joint.double_softmax": False}
    | PGD10
    | {"attack.mode": "train", "network.members": 3}
    # Not in S2.11; as the released code has them.
    | {"joint.weight_decay": 1e-4, "joint.momentum": 0.9, "joint.nesterov": True, "joint.warmup_epochs": 0}
    | {"joint.padding": 4, "joint.flip": 0.5, "joint.penalise": True, "joint.selfie_weight": 4.0, "joint.lr_min": 1e-8}
    | {"finetune.epochs": 100, "finetune.milestones": (60, 80), "finetune.mode": "full", "finetune_attack.steps": 10}
    | IMAGENET,
}


def contrastive(**own):
    """Pre-training numbers that most rows share (S2.3 to S2.5), and a row's own."""
    shared = {"epochs": 1000, "batch_size": 512, "momentum": 0.9, "schedule": "cosine", "temperature": 0.5, "flip": 0.5}
    shared |= {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2, "interpolation": "bilinear"}
    return {f"pretrain.{key}": value for key, value in {**shared, **own}.items()}


LARS = {"optimiser": "lars", "lr": 5.0, "weight_decay": 1e-6, "lars_exclude_1d": False, "warmup_epochs": 10, "lr_min": 1e-6}
PGD5 = {"attack.eps": 8 / 255, "attack.step": 2 / 255, "attack.steps": 5, "attack.start": "uniform", "attack.mode": "eval"}
AFF = {"aff.objective": "trades", "aff.beta": 6.0, "aff.lr": 0.1, "aff.weight_decay": 2e-4, "aff.batch_size": 128}
AFF |= {"aff.attack.eps": 8 / 255, "aff.attack.step": 2 / 255, "aff.attack.steps": 10, "aff.attack.start": "gaussian"}
SLF = {"finetune.epochs": 25, "finetune.batch_size": 512, "finetune.lr": 0.01, "finetune.weight_decay": 2e-4}
SLF |= {"finetune.schedule": "steps", "finetune.attack.steps": 10, "finetune.alf_loss": "ce", "finetune.bn_adapt": "none"}
SEMI = {"teacher.epochs": 100, "teacher.milestones": (39, 59), "distil.epochs": 15, "distil.milestones": (4, 9)}
SEMI |= {"distil.lr": 0.1, "distil.weight_decay": 5e-4, "distil.alpha": 0.5, "distil.temperature": 1.0, "distil.beta": 6.0}

ROWS |= {
    "acl": contrastive(**LARS, crop_floor=0.1, variant="DS", projector_layers=3, route=1)
    | {"pretrain.interpolation": "bicubic"}  # S2.3
    | PGD5
    | IMAGENET
    | AFF
    | SEMI
    | {"finetune.protocol": "AFF", "aff.epochs": 100, "aff.milestones": (39, 59), "aff.routes": 1, "label_share": 1.0}
    | {"distil.batch_size": 198, "distil.attack.steps": 10},
    "dynacl": contrastive(**LARS, crop_floor=0.1, anneal_every=50, reweighting=2 / 3, key_momentum=0.99)  # S2.12
    | PGD5
    | IMAGENET
    | SLF
    | AFF
    | {"finetune.protocol": "SLF", "finetune.milestones": (10, 20), "finetune.head_init": "zero", "plus": False}
    | {"aff.epochs": 25, "aff.milestones": (15, 20), "aff.routes": 2, "aff.attack.start": "zero"},
    "dynacl_pp": {
        "plus": True,
        "probe.epochs": 10,
        "probe.lr": 0.01,
        "probe.clusters": 10,
        "probe.batch_size": 512,
        "probe.weight_decay": 1e-4,
        "trades.epochs": 25,
        "trades.lr": 0.1,
        "trades.batch_size": 512,
        "trades.weight_decay": 1e-4,
        "trades.attack.start": "zero",
    }
    | {"trades.milestones": (10, 20), "trades.beta": 6.0, "trades.objective": "trades"},
    "rocl": contrastive(  # S2.5
        optimiser="lars", lr=1.5, warmup_from=0.1, warmup_epochs=10, weight_decay=1e-6, lars_exclude_1d=False, crop_floor=0.08
    )
    | {"pretrain.projector_hidden": 2048, "pretrain.projector_out": 128, "pretrain.projector_norm": False}
    | {"pretrain.pair_weight": 1 / 256, "pretrain.detach_keys": True, "pretrain.attack_group": 256, "network.mean": ()}
    | {"attack.eps": 0.0314, "attack.step": 0.007, "attack.steps": 7, "attack.start": "uniform", "attack.mode": "eval"}
    | {"finetune.epochs": 150, "finetune.lr": 0.1, "finetune.weight_decay": 5e-4, "finetune.batch_size": 1024}
    | {"finetune.milestones": (30, 50, 100), "finetune.protocol": "SLF", "finetune.augment": "none"},
    "advcl": contrastive(optimiser="sgd", lr=0.5, weight_decay=1e-4, warmup_epochs=10, warmup_from=0.01, lr_min=5e-4)  # S2.4
    | {"pretrain.crop_floor": 0.2, "pretrain.base_temperature": 0.07, "pretrain.radius": 8.0, "pretrain.ce_weight": 0.2}
    | {"pretrain.clusters": (2, 10, 50, 100, 500), "pretrain.projector_norm": True, "pretrain.projector_out": 128}
    | PGD5
    | {"attack.mode": "train", "network.mean": (), "pseudo_source": "self_simclr", "pretrain.route": 1}
    | SLF
    | {"finetune.milestones": (15, 20), "finetune.protocol": "SLF"},
    "byorl_reimpl": contrastive(
        **LARS, projector_hidden=4096, projector_out=256, target_momentum=0.996, symmetric=False
    )  # S2.10
    | PGD10,
    "deacl": {  # S2.13
        "distil.epochs": 100,
        "distil.batch_size": 256,
        "distil.lr": 0.5,
        "distil.weight_decay": 5e-4,
        "distil.weight": 2.0,
        "distil.padding": 4,
        "network.padding": 2,
        "finetune.lr": 0.1,
        "finetune.alf_lr": 0.01,
        "finetune.milestones": (15, 20),
        "finetune.protocol": "SLF",
        "distil.start": "teacher",
        "aff.lr": 0.01,
        "aff.batch_size": 512,
        "aff.epochs": 25,
        "aff.milestones": (15, 20),
    }
    | PGD5
    | CIFAR
    | {"network.std": (0.247, 0.243, 0.261)},
}


def value(settings, key: str):
    return reduce(getattr, key.split("."), settings)


@pytest.mark.parametrize("name", ROWS)
def test_paper_settings(name):
    recipe = registry.recipes.load(name)
    settings = override(recipe.settings, recipe.presets["paper"], recipe.adapt("paper", (3, 32, 32)))
    assert {key: value(settings, key) for key in ROWS[name]} == ROWS[name]


@pytest.mark.parametrize("replays", [1, 2, 4, 8, 10])
def test_free_makes_80_000_updates_with_falls_after_40_000_and_60_000(replays):
    recipe = registry.recipes.load("free")
    settings = override(recipe.settings, {"train.replays": replays})
    ((plan),) = recipe.plans(settings)
    an_epoch = 45_000 // plan.settings.batch_size * replays
    assert [m * an_epoch for m in plan.settings.milestones] == pytest.approx([40_000, 60_000], rel=0.001)
    assert 80_000 <= plan.settings.epochs * an_epoch < 80_100 + an_epoch  # whole passes


@pytest.mark.parametrize(
    ("recipe", "dataset", "side", "layer", "expected"),
    [
        ("dynacl", "cifar10", 32, {}, {"finetune.lr": 0.01}),
        ("dynacl", "cifar100", 32, {}, {"finetune.lr": 0.05}),
        ("dynacl_pp", "cifar100", 32, {"finetune.protocol": "ALF"}, {"finetune.lr": 0.05}),
        ("dynacl", "cifar100", 32, {"finetune.lr": 0.2}, {"finetune.lr": 0.2}),
        ("dynacl", "stl10", 96, {}, {"finetune.lr": 0.1}),
        ("dynacl", "stl10", 32, {}, {"finetune.lr": 0.01}),
        ("acl", "cifar10", 32, {}, {"aff.epochs": 100, "aff.milestones": (39, 59)}),
        ("acl", "cifar100", 32, {}, {"aff.epochs": 25, "aff.milestones": (14, 19), "finetune.lr": 0.05}),
        ("rocl", "cifar100", 32, {}, {"finetune.lr": 0.1}),
    ],
)
def test_what_the_sources_have_otherwise_on_a_data_set(recipe, dataset, side, layer, expected):
    settings = resolve_settings(registry.recipes.load(recipe), "paper", (3, side, side), [layer], dataset)
    assert {key: value(settings, key) for key in expected} == expected


def test_presets_go_above_what_a_data_set_has():
    system = registry.recipes.load("acl")
    settings = resolve_settings(system, "smoke", (3, 32, 32), [], "cifar100")
    assert settings.aff.epochs == system.presets["smoke"]["aff.epochs"] != 25


def test_alf_has_its_own_rate_in_deacl():
    recipe = registry.recipes.load("deacl")
    rates = {
        p: recipe.plans(override(recipe.settings, {"finetune.protocol": p}))[-1].settings.lr for p in ("SLF", "ALF", "AFF")
    }
    assert rates == {"SLF": 0.1, "ALF": 0.01, "AFF": 0.01}


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
            assert all(value(settings, f"{plan.name}.batch_size") == plan.settings.batch_size for plan in plans)
            assert settings.network.mean == () or len(settings.network.mean) == shape[0]


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        ("rush", {"pretrain.batch_size": 1}),
        ("rush", {"pretrain.temperature": 0}),
        ("rush", {"pretrain.gray_p": 1.1}),
        ("rush", {"finetune.epochs": 0}),
        ("dynacl", {"pretrain.key_momentum": 1.5}),
        ("dynacl_pp", {"probe.clusters": 0}),
        ("acl", {"label_share": -0.1}),
        ("acl", {"distil.alpha": 2}),
        ("advcl", {"pretrain.clusters": "2,0"}),
        ("deacl", {"finetune.alf_lr": 0}),
        ("rocl", {"pretrain.attack_group": 1}),
        ("free", {"train.replays": 0}),
        ("smoothadv", {"attack.draws": 0}),
        ("dataaug", {"train.generated_share": 1}),
        ("dataaug", {"train.bn_momentum": 0}),
        ("ssp", {"selfie.hidden": 16}),
        ("ssp_joint", {"joint.ridge": 0}),
        ("byorl_reimpl", {"pretrain.target_momentum": -1}),
    ],
)
def test_numbers_that_mean_nothing(recipe, layer):
    with pytest.raises(BadInput, match=next(iter(layer)) + "=.* must be"):
        override(registry.recipes.load(recipe).settings, layer)
