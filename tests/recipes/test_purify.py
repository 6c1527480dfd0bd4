"""The recipes of the purifier: the DDPM's loss and average, the card and its files, resuming, what the store gives back."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rush_bench import registry
from rush_bench.cli import main
from rush_bench.datasets import load_dataset
from rush_bench.defenses import Randomised, load_defense
from rush_bench.defenses.load import stored_transform
from rush_bench.defenses.purify import Purifier
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.files import sha256_file
from rush_bench.networks import build
from rush_bench.networks.ddpm import linear_schedule
from rush_bench.noise import Stream
from rush_bench.recipes.purify import DiffusionSettings, DiffusionStage, PurifySettings
from rush_bench.settings import override
from rush_bench.training import train
from rush_bench.training.stage import Batch, Context

SMALL = ("size=8", "network.name=resnet", "network.blocks=1", "network.width=8", "n_train=64", "diffusion.batch_size=32")


def trained(store, sets=()):
    return train("purify", dataset="digits", preset="smoke", sets=(*SMALL, *sets), store=store, name="run")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    trained(folder)
    return folder


def test_the_card_says_both_and_the_files_are_its_own(store):
    card = json.loads((store / "run" / "card.json").read_text())
    assert (card["protocol"], card["votes"], card["pretrain_dataset"]) == ("supervised, purified", [1], "digits")
    assert card["transform"] == {
        "name": "purify",
        "timesteps": 100,
        "start": 15,
        "steps": 3,
        "eta": 1.0,
        "width": 4,
        "multipliers": [1, 2, 2],
    }
    assert card["epochs_done"] == {"diffusion": 2, "train": 2}
    assert {"model", "transform"} <= set(card["sha256"])
    assert all(sha256_file(store / "run" / f"{stem}.safetensors") == sha for stem, sha in card["sha256"].items())


@pytest.mark.parametrize(("name", "votes"), [("run", 1), ("run@3", 3)])
def test_the_store_gives_the_purified_network(store, name, votes):
    defense = load_defense(name, store=store)
    assert isinstance(defense, Randomised) and isinstance(defense.transform, Purifier)
    assert (defense.draws, defense.identity()["average"], defense.transform.times) == (votes, "vote", [15, 10, 5, 0])
    assert not any(weight.requires_grad for weight in defense.transform.parameters())
    images = load_dataset("digits", "test", 5, size=8)
    found = defense.predict(images.floats(), Stream(0, "x", images.index))
    chain, average = stored_transform("run", store=store)
    own = Randomised(defense.body.network, transform=chain, votes=votes, average=average, shape=(1, 8, 8))
    assert torch.equal(own.predict(images.floats(), Stream(0, "x", images.index)).votes, found.votes)
    assert own.identity() == defense.identity()


def test_attack_takes_it_by_name(store, tmp_path):
    line = ["attack", "--models", "run@2", "--suite", "linf25.5-quick", "--store", str(store), "--out", str(tmp_path)]
    line += ["--n", "2", "--repeats", "2", "--set", "pgd.steps=1", "--set", "eot.steps=1", "--set", "eot.draws=2"]
    few = ["--set", "square.queries=4"]
    done = CliRunner().invoke(main, [*line, "--set", "eot.select_draws=2", "--set", "apgd.steps=2", *few, "--json"])
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout)["table"]
    assert [(row["defense"], row["protocol"]) for row in table] == [("run@2", "supervised, purified")] * len(table)


def test_a_cut_or_foreign_purifier_is_refused(store, tmp_path):
    trained(tmp_path, sets=["diffusion.width=8"])
    weights, card = tmp_path / "run" / "transform.safetensors", tmp_path / "run" / "card.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(BadInput, match="does not match the SHA-256"):
        load_defense("run", store=tmp_path)
    weights.write_bytes(whole)
    said = json.loads(card.read_text())
    said["transform"]["width"] = 4
    del said["digest"]
    card.write_text(json.dumps(said))
    with pytest.raises(RushBenchError, match="does not fit its card"):
        load_defense("run", store=tmp_path)


def stage(**more):
    settings = override(
        PurifySettings(diffusion=DiffusionSettings(**{"timesteps": 100, "width": 4, "multipliers": (1, 2), **more}))
    )
    data = load_dataset("digits", "train", 32, size=8)
    network = build({"name": "resnet", "blocks": [1], "width": 4, "channels": 1, "size": 8})
    return DiffusionStage(Context(network, settings, {"train": data, "val": data, "pretrain": data}, 0), settings.diffusion)


def batch(made, step=0):
    data = made.splits["pretrain"]
    return Batch(data, torch.arange(32), torch.Generator().manual_seed(step), 0, step)


def test_the_loss_is_that_of_the_noise_at_its_time():
    """Ho et al. eq. 14: a network that knows the image makes no error; one that says 0 errs by the noise's variance."""
    made, a = stage(flip=0.0), linear_schedule(100).float()
    assert float(made.loss(batch(made)).detach()) == pytest.approx(1, abs=0.1)
    seen = []

    class Knows(nn.Module):
        def forward(self, x, t):
            seen.append(t)
            image = 2 * batch(made).images - 1
            return (x - a[t].sqrt()[:, None, None, None] * image) / (1 - a[t]).sqrt()[:, None, None, None]

    made.unet = Knows()
    assert float(made.loss(batch(made)).detach()) < 1e-8
    assert int(seen[0].min()) >= 0 and int(seen[0].max()) <= 99 and len(seen[0].unique()) > 15


def test_the_average_is_the_mean_of_what_was():
    made, means = stage(ema=0.9), []
    weight = made.unet.stem.weight
    kept = weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        made.after_step(batch(made, step))
        keep = min(0.9, (1 + step) / (10 + step))
        kept = keep * kept + (1 - keep) * weight.detach()
        means.append(kept)
    assert torch.allclose(made.average.stem.weight, means[-1], atol=1e-6)
    made.finish()
    assert torch.equal(made.carried["transform"]["stem.weight"], made.average.stem.weight)


def test_gradients_are_clipped_and_the_classifier_is_left_alone():
    made = stage(clip=1e-3)
    before = copy.deepcopy(made.network.state_dict())
    with torch.no_grad():
        for weight in made.unet.out.parameters():
            weight.normal_()
    made.backward(batch(made))
    norm = torch.stack([weight.grad.norm() for weight in made.unet.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert {id(w) for w in made.parameter_groups()} == {id(w) for w in made.unet.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in made.network.state_dict().items())


@pytest.mark.parametrize(
    ("recipe", "sets", "text"),
    [
        ("purify", {"noise": "uniform:0.3"}, "leave noise=none"),
        ("purify_simclr", {"finetune.protocol": "AFF"}, "is SLF"),
        ("purify", {"purification.steps": 200}, "at least as many times as steps"),
        ("purify", {"purification.start": 0.05}, "at least as many times as steps"),
    ],
)
def test_refusals_name_the_fix(recipe, sets, text):
    made = registry.recipes.load(recipe)
    settings = override(made.settings, sets)
    with pytest.raises(BadInput, match=text):
        made.plans(settings)
        made.card(settings)


@pytest.mark.parametrize(("more", "text"), [({"width": 6}, "multiple of 4"), ({"multipliers": (1, 1, 1, 1, 1)}, "too often")])
def test_a_network_that_cannot_be_is_refused(more, text):
    with pytest.raises(BadInput, match=text):
        stage(**more)


def test_the_stages_of_both():
    for name, stages in (("purify", ["diffusion", "train"]), ("purify_simclr", ["diffusion", "pretrain", "finetune"])):
        made = registry.recipes.load(name)
        assert [plan.name for plan in made.plans(made.settings)] == stages
        assert made.card(made.settings)["transform"]["start"] == made.card(made.settings)["transform"]["steps"] == 100
