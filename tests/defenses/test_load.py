import json

import pytest
import torch

from rush_bench.defenses import Deterministic, Smoothed, from_target, load_defense, load_defenses, resolve
from rush_bench.defenses.load import budget
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.networks import resolve as full_spec
from rush_bench.noise import Gaussian, Stream, Uniform
from rush_bench.store import save_model

SPEC = full_spec({"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    common = {"pretrain_dataset": "digits", "protocol": "NSLF", "extra_data": None, "preset": "smoke", "network": SPEC}
    law = {"law": "uniform", "scale": 0.3}
    models = {
        "rush-digits": {"recipe": "rush", "dataset": "digits", "noise": law, "votes": [1, 64]},
        "rush-cifar10": {"recipe": "rush", "dataset": "cifar10", "noise": law, "votes": [1, 64]},
        "simclr-digits": {"recipe": "simclr", "dataset": "digits", "noise": None, "votes": [0]},
        "both": {"recipe": "simclr", "dataset": "digits", "noise": law, "votes": [0, 1]},
    }
    for seed, (name, card) in enumerate(models.items()):
        state, best = (build(SPEC, seed=seed + shift).state_dict() for shift in (0, 10))
        save_model(folder / name, {"name": name, **common, **card}, state, best)
    return folder


@pytest.mark.parametrize(
    ("patterns", "dataset", "names"),
    [
        (["all"], "digits", ["both", "both@1", "rush-digits@1", "rush-digits@64", "simclr-digits"]),
        (["rush"], "digits", ["rush-digits@1", "rush-digits@64"]),
        (["rush@64"], "cifar10", ["rush-cifar10@64"]),
        (["rush*@7"], None, ["rush-cifar10@7", "rush-digits@7"]),
        (["simclr-digits", "rush@1"], "digits", ["simclr-digits", "rush-digits@1"]),
        (["rush-digits:best@64"], None, ["rush-digits:best@64"]),
    ],
)
def test_patterns(store, patterns, dataset, names):
    assert resolve(patterns, store, dataset) == names


@pytest.mark.parametrize(
    ("patterns", "dataset", "says"),
    [
        (["rash"], "digits", "did you mean 'rush'"),
        (["rush@x"], None, "number of votes"),
        (["rush@0"], None, "number of votes"),
        (["simclr-digits@64"], None, "deterministic"),
        (["all"], "stl10", "train one first.*stl10; for a network of your own: --model PKG:BUILD"),
    ],
)
def test_wrong_patterns(store, patterns, dataset, says):
    with pytest.raises(BadInput, match=says):
        resolve(patterns, store, dataset)


def test_what_is_loaded_predicts_as_what_was_saved(store):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stream = Stream(0, "load")
    plain = load_defense("simclr-digits", store=store)
    assert isinstance(plain, Deterministic)
    assert torch.equal(plain.predict(images, stream).labels, build(SPEC, seed=2).eval()(images).argmax(1))
    noisy = load_defense("rush-digits@3", store=store)
    assert isinstance(noisy, Smoothed) and noisy.draws == 3 and noisy.noise == Uniform(0.3)
    made = Smoothed(build(SPEC, seed=0).eval(), noise=Uniform(0.3), votes=3, shape=(1, 8, 8))
    assert torch.equal(noisy.predict(images, stream).votes, made.predict(images, stream).votes)
    assert noisy.identity() == made.identity()
    best = load_defense("rush-digits:best@3", store=store)
    assert best.identity() != noisy.identity() and best.labels()["model"] == "rush-digits:best"
    other = load_defense("rush-digits@3", store=store, noise=Gaussian(0.1))
    assert other.noise == Gaussian(0.1)
    # a model that is listed with and without votes is taken by its very name
    assert isinstance(load_defense("both", store=store), Deterministic)
    with pytest.raises(BadInput, match="more than one model"):
        load_defense("rush-digits", store=store)
    assert [d.name for d in load_defenses(["rush"], store=store, dataset="cifar10")] == ["rush-cifar10@1", "rush-cifar10@64"]


def test_damaged_models_are_refused(store, tmp_path):
    import shutil

    folder = tmp_path / "simclr-digits"
    shutil.copytree(store / "simclr-digits", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInput, match=r"SHA-256.*train again"):
        load_defense("simclr-digits", store=tmp_path)
    (folder / "card.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        load_defense("simclr-digits", store=tmp_path)
    card = json.loads((store / "simclr-digits" / "card.json").read_text())
    with pytest.raises(BadInput, match="no 'worst' weights"):
        load_defense("rush-digits:worst@1", store=store)
    assert set(card["sha256"]) == {"model", "best"}


NETS = """
import torch
from torch import nn
from rush_bench.defenses import Deterministic
def build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
def defense(): return Deterministic(build(), shape=(1, 8, 8), name="own")
def nothing(): return 3
ready = build()
"""


def test_targets_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "target_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    shape = (1, 8, 8)
    assert [d.name for d in from_target("target_nets:build", shape=shape)] == ["target_nets.build"]
    assert [d.name for d in from_target("target_nets:build", noise="uniform:0.3", votes=8, shape=shape)] == [
        "target_nets.build@1",
        "target_nets.build@8",
    ]
    assert [d.name for d in from_target("target_nets:defense", shape=shape)] == ["own"]
    assert [d.name for d in from_target("target_nets:ready", shape=shape)] == ["target_nets.ready"]
    for target, says in (
        ("target_nets", "package.module:function"),
        ("no_such_module:build", "cannot import"),
        ("target_nets:bild", "has no 'bild'"),
        ("target_nets:nothing", "must return an nn.Module"),
    ):
        with pytest.raises(BadInput, match=says):
            from_target(target, shape=shape)


def test_budget_of_a_card():
    card = {"epochs_done": {"pretrain": 14, "finetune": 3}, "data": {"digest": {}, "n_train": 45000, "n_val": 5000}}
    assert budget(card) == "14 + 3 epochs of 45000 images"
    assert budget({}) is None
