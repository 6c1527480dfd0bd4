"""Training that starts from an encoder: by any protocol, without a second pre-training, bit for bit after any stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rush_bench.cli import main
from rush_bench.datasets import load_dataset
from rush_bench.defenses import load_defense
from rush_bench.defenses.load import listed
from rush_bench.defenses.published import import_checkpoint
from rush_bench.errors import BadInput, WorkLeft
from rush_bench.networks import build
from rush_bench.store import ENCODERS, model_names, read_card, read_weights
from rush_bench.training import loop, train

PLAIN = ("channels_last=false",)  # oneDNN of some builds writes beyond its memory at four channels in channels_last
TINY = (
    "size=8",
    "network.name=resnet",
    "network.blocks=1,1",
    "network.width=4",
    "n_train=96",
    "pretrain.batch_size=32",
    *PLAIN,
)
FAST = ("finetune.epochs=2", "finetune.batch_size=32", "aff.epochs=2", "aff.batch_size=32")
CLEAN = ("finetune.protocol=SLF", "finetune.noisy=false", "finetune.bn_adapt=none")


def pretrained(recipe: str, store: Path, *sets: str, name: str | None = None, **keys) -> Path:
    return train(recipe, dataset="digits", preset="smoke", sets=(*TINY, *sets), store=store, name=name, **keys)


def tune(store: Path, source: str, protocol: str | None, *sets: str, **keys) -> Path:
    keys = {"dataset": "digits", "preset": "smoke", "n_train": 96} | keys
    return train("finetune", from_=source, protocol=protocol, sets=(*PLAIN, *FAST, *sets), store=store, **keys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with RUSH and ACL, and the encoders that their pre-training left."""
    store = tmp_path_factory.mktemp("store") / "models"
    for recipe in ("rush", "acl"):
        pretrained(recipe, store)
    return store


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "models"))


def encoder_of(store: Path, recipe: str) -> str:
    (name,) = [name for name in model_names(store / ENCODERS) if name.startswith(recipe)]
    return name


def same(one: dict, other: dict, prefix: str = "") -> bool:
    return all(torch.equal(one[key], other[key]) for key in one if key.startswith(prefix))


PROTOCOLS = {"SLF": None, "NSLF": "uniform:0.3", "ALF": None, "AFF": None}


def test_four_protocols_from_one_encoder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = encoder_of(store, "rush")
    monkeypatch.setattr("rush_bench.recipes.rush.RushStage.loss", None)  # nothing may pre-train
    for protocol, noise in PROTOCOLS.items():
        folder = tune(store, name, protocol, noise=noise)
        card, weights = read_card(store, folder.name), read_weights(store, folder.name)
        assert (folder.name, card["protocol"], card["recipe"]) == (f"{name}-{protocol}", protocol, "finetune")
        assert "linear head" in card["protocol_in_words"] or protocol == "AFF"
        made = read_card(store / ENCODERS, name)
        assert card["from"]["name"] == name and card["from"]["sha256"] == made["sha256"]["model"] == card["data"]["from"]
        assert (card["from"]["recipe"], card["from"]["head"], card["pretrain_dataset"]) == ("rush", "new", "digits")
        assert {entry["stage"] for entry in card["validation"]["history"]} == {"aff" if protocol == "AFF" else "finetune"}
        assert card["network"] == made["network"] and card["settings"]["network"]["blocks"] == [1, 1]
        moved = not same(weights, read_weights(store / ENCODERS, name), "encoder.")
        assert moved == (protocol in ("NSLF", "AFF"))
        row = load_defense(f"{folder.name}@64" if noise else folder.name, store=store)
        assert row.labels()["protocol"] == f"{protocol} from {name}"
    assert set(model_names(store)) == {"acl-digits", "rush-digits"} | {f"{name}-{protocol}" for protocol in PROTOCOLS}
    assert not {name} & {row.partition("@")[0] for row in listed(store)}  # no model, and `all` does not attack it


def test_rush_in_two_commands_is_rush(store: Path) -> None:
    """Its second stage by itself, from what its first left: the same weights as of one run."""
    whole = pretrained("rush", store, *FAST[:2], name="whole")
    parts = tune(store, encoder_of(store, "rush"), "NSLF", noise="uniform:0.3")
    assert same(read_weights(store, whole.name), read_weights(store, parts.name))
    assert read_card(store, parts.name)["votes"] == read_card(store, whole.name)["votes"] == [1, 64]


def test_both_routes_of_an_encoder(store: Path) -> None:
    whole = pretrained("acl", store, "aff.routes=2", *FAST[2:], name="whole")
    parts = tune(store, encoder_of(store, "acl"), "AFF", "aff.routes=2")
    assert same(read_weights(store, whole.name), read_weights(store, parts.name))


@pytest.mark.parametrize("protocol", ["NSLF", "AFF"])
def test_stopped_after_every_step_equals_uninterrupted(protocol: str, store: Path) -> None:
    name, noise = encoder_of(store, "rush"), PROTOCOLS[protocol]
    whole, stops = tune(store, name, protocol, noise=noise, name="whole"), 0
    while True:
        try:
            parts = tune(store, name, protocol, noise=noise, name="parts", max_minutes=0)
        except WorkLeft:
            stops += 1
        else:
            break
    assert stops == 2 * 3  # epochs times batches
    assert same(read_weights(store, whole.name), read_weights(store, parts.name))
    cards = [read_card(store, folder.name) for folder in (whole, parts)]
    for card in cards:
        del card["name"], card["seconds"], card["environment"]
    assert cards[0] == cards[1]


def test_an_encoder_that_changes_under_it_is_refused(store: Path) -> None:
    name = encoder_of(store, "rush")
    with pytest.raises(WorkLeft):
        tune(store, name, "SLF", name="mine", max_minutes=0)
    tune(store, name, "SLF", name="done")
    home = store / ENCODERS
    weights = home / name / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    for run in ("mine", "done"):
        with pytest.raises(BadInput, match="does not match the SHA-256 in its card"):
            tune(store, name, "SLF", name=run)
    shutil.rmtree(home / name)
    (home / encoder_of(store, "acl")).rename(home / name)  # another encoder under the same name
    for run in ("mine", "done"):
        with pytest.raises(BadInput, match=r"data\.from is .* there and .* here"):
            tune(store, name, "SLF", name=run)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stage of every training step from now on."""
    seen, step = [], loop.train_step

    def count(stage, *rest):
        seen.append(stage.name)
        return step(stage, *rest)

    monkeypatch.setattr(loop, "train_step", count)
    return seen


@pytest.mark.parametrize("recipe", ["rush", "acl"])
def test_a_pretraining_is_found_again(recipe: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (*CLEAN, *FAST)
    steps = counted(monkeypatch)
    again = pretrained(recipe, store, *sets, name="again")
    assert "pretrain" not in steps and steps
    fresh = pretrained(recipe, tmp_path / "fresh", *sets, name="again")
    assert "pretrain" in steps
    cards = [read_card(folder.parent, "again") for folder in (again, fresh)]
    assert cards[0]["encoder"] == encoder_of(store, recipe) and cards[0]["seconds"] > 0
    for card in cards:
        del card["seconds"], card["environment"]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("what", ["settings", "seed", "data", "code"])
def test_another_pretraining_is_another_encoder(what: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "code":
        monkeypatch.setattr("rush_bench.training.encoders.code_digest", lambda module: "other")
    sets = {"settings": ("pretrain.temperature=0.4",), "data": ("n_train=97",)}.get(what, ())
    steps = counted(monkeypatch)
    pretrained("rush", store, *CLEAN, *FAST, *sets, name="other", seed=1 if what == "seed" else 0)
    assert "pretrain" in steps
    assert len(model_names(store / ENCODERS)) == 3


def test_a_damaged_encoder_is_not_trained_from(store: Path) -> None:
    weights = store / ENCODERS / encoder_of(store, "rush") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInput, match=r"encoders.*does not match the SHA-256"):
        pretrained("rush", store, *CLEAN, name="again")


@pytest.mark.parametrize("recipe", ["pgd_at", "noise_sup"])
def test_supervised_recipes_start_from_a_model(recipe: str, store: Path, tmp_path: Path) -> None:
    """The whole network for the same data set; for other classes, and from an encoder, with a new head."""
    digits = {split: load_dataset("digits", split) for split in ("train", "test")}
    arrays = {f"{s}_images": x.pixels.permute(0, 2, 3, 1).numpy() for s, x in digits.items()}
    arrays |= {f"{s}_labels": x.labels.numpy() for s, x in digits.items()}
    np.savez(tmp_path / "others.npz", **arrays, classes=np.array([f"class {k}" for k in range(10)]))
    sets = (*PLAIN, "train.epochs=1", "train.lr=1e-9", "train.batch_size=32")
    for source, dataset in (("rush-digits", "digits"), ("rush-digits", tmp_path / "others.npz"), ("rush", "digits")):
        name = encoder_of(store, source) if source == "rush" else source
        keys = {"dataset": str(dataset), "preset": "smoke", "n_train": 96, "store": store, "seed": 3}
        folder = train(recipe, from_=name, sets=sets, **keys)
        card, weights = read_card(store, folder.name), read_weights(store, folder.name)
        kept = (source, str(dataset)) == ("rush-digits", "digits")
        assert card["from"]["head"] == ("kept" if kept else "new") and card["protocol"] == "supervised"
        before = read_weights(store / ENCODERS if source == "rush" else store, name)
        assert torch.allclose(weights["encoder.conv1.weight"], before["encoder.conv1.weight"], atol=1e-6)
        assert torch.allclose(weights["head.weight"], before["head.weight"], atol=1e-6) == kept
        shutil.rmtree(folder)


def test_the_best_epoch_of_a_model(store: Path) -> None:
    pretrained("simclr", store, "finetune.epochs=6", "finetune.lr=5", name="wild")
    assert "best" in read_card(store, "wild")["sha256"], "or this test shows nothing"
    folder = tune(store, "wild:best", "SLF")
    card = read_card(store, folder.name)
    assert card["from"]["name"] == "wild:best" and card["from"]["sha256"] == read_card(store, "wild")["sha256"]["best"]
    assert folder.name == "wild-best-SLF"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"from_": None}, r"finetune puts a head on an encoder; say which: --from"),
        ({"from_": "rush-digit"}, r"did you mean 'rush-digits'"),
        ({"recipe": "rush", "from_": "rush-digits", "protocol": None}, r"rush makes its own encoder.*train finetune --from"),
        ({"sets": ["network.width=8"]}, r"the network is that of rush-digits; leave network\.width out"),
        ({"protocol": "NSLF"}, "noise=uniform:0.3"),
        ({"protocol": "AFF", "sets": ["aff.routes=2"]}, "needs an encoder with both BatchNorm routes; rush-digits has one"),
        ({"protocol": "SLFF"}, "did you mean 'SLF'"),
        ({"pretrain_on": "cifar10"}, "leave --pretrain-on out"),
    ],
)
def test_bad_input(keys: dict, says: str, store: Path) -> None:
    keys = {"recipe": "finetune", "from_": "rush-digits", "protocol": "SLF", "dataset": "digits", "preset": "smoke"} | keys
    with pytest.raises(BadInput, match=says):
        train(keys.pop("recipe"), store=store, name="mine", **keys)
    assert not (store / "mine").exists()


def test_other_channels_and_a_name_of_two_things(store: Path, tmp_path: Path) -> None:
    images = np.zeros((40, 8, 8, 3), np.uint8)
    parts = {
        f"{s}_{what}": images if what == "images" else np.arange(40) % 2
        for s in ("train", "test")
        for what in ("images", "labels")
    }
    np.savez(tmp_path / "color.npz", **parts, classes=np.array(["a", "b"]))
    with pytest.raises(BadInput, match="rush-digits takes images of 1 channels, color has 3"):
        tune(store, "rush-digits", "SLF", dataset=str(tmp_path / "color.npz"), n_train=None)
    shutil.copytree(store / "rush-digits", store / ENCODERS / "rush-digits")
    with pytest.raises(BadInput, match="both a model and an encoder named 'rush-digits'"):
        tune(store, "rush-digits", "SLF")


# What fine-tuning reads alone, changed; and small settings for what pre-trains.
TUNED = {
    "rush": CLEAN,
    "acl": ("label_share=0.5", "noise=none"),
    "ssp_rotation": ("finetune.protocol=SLF", "linear.epochs=1", "finetune_attack.steps=1"),
}
SMALLER = {
    "advcl": ("pretrain.clusters=2,5", "simclr.epochs=1"),
    "byorl_reimpl": ("pretrain.projector_hidden=16", "pretrain.projector_out=8"),
    "deacl": ("distil.epochs=1",),
    "dynacl_pp": ("probe.epochs=1", "trades.epochs=1"),
    "rocl": ("pretrain.projector_hidden=16",),
    "ssp_rotation": ("rotation.epochs=1", "rotation.batch_size=48", "finetune.epochs=1", "network.blocks=1,1"),
}
EACH = ("acl", "advcl", "byorl_reimpl", "deacl", "dynacl", "dynacl_pp", "rocl", "rush", "simclr", "ssp_rotation")


@pytest.mark.parametrize("recipe", EACH)
def test_what_an_encoder_leaves_out_of_its_name_does_not_decide_it(recipe: str, tmp_path: Path) -> None:
    """`Recipe.finetuning_settings` of every system: with those settings changed, the same name and the same bits."""
    small = ["size=8", "network.name=resnet", "network.width=4", "n_train=48", *PLAIN, *SMALLER.get(recipe, ())]
    if recipe != "ssp_rotation":
        small += ["network.blocks=1", "pretrain.epochs=1", "pretrain.batch_size=48", "finetune.epochs=1", "aff.epochs=1"]
    other = TUNED.get(recipe, ("finetune.protocol=NSLF", "noise=gaussian:0.25", "finetune.lr=0.7"))
    found = []
    for number, sets in enumerate(((), other)):
        store = tmp_path / str(number)
        with pytest.raises(WorkLeft):  # after the first step of fine-tuning, when the encoder is there
            for _ in range(100):
                try:
                    train(recipe, dataset="digits", preset="smoke", sets=[*small, *sets], store=store, max_minutes=0)
                except WorkLeft:
                    if model_names(store / ENCODERS):
                        raise
        (name,) = model_names(store / ENCODERS)
        found.append((name, read_card(store / ENCODERS, name)["sha256"]))
    assert found[0] == found[1]


def test_encoders_are_listed_and_shown(store: Path) -> None:
    name = encoder_of(store, "rush")
    listed_ = CliRunner().invoke(main, ["list", "encoders", "--store", str(store)])
    assert name in listed_.stdout and encoder_of(store, "acl") in listed_.stdout and "rush-digits " not in listed_.stdout
    shown = CliRunner().invoke(main, ["show", name, "--store", str(store), "--json"])
    card = json.loads(shown.stdout)
    assert (card["kind"], card["recipe"], card["stages"]) == ("encoder", "rush", ["pretrain"])
    assert card["settings"]["pretrain"]["batch_size"] == 32 and "finetune" not in card["settings"]


def test_what_the_encoder_of_a_file_saw_is_not_stated_until_somebody_says(store: Path, tmp_path: Path) -> None:
    net = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 2, "channels": 3, "size": 8})
    state = {key.replace("encoder.", "backbone."): value for key, value in net.state_dict().items()}
    state = {key.replace("head.", "classifier_adv."): value + 0.1 * ("running" in key) for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "DeACL.pt")
    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2
    parts = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "color.npz", **parts, classes=np.array(["a", "b"]))

    def tuned() -> dict:
        asked = {"dataset": str(tmp_path / "color.npz"), "n_train": None}
        folder = tune(store, str(tmp_path / "DeACL.pt"), "SLF", "size=8", **asked)
        return read_card(store, folder.name)

    card = tuned()
    assert card["pretrain_dataset"] == card["from"]["pretrain_dataset"] == "not stated" and card["name"] == "DeACL-SLF-color"
    assert read_card(store / ENCODERS, "DeACL")["pretrain_dataset"] == "not stated"
    import_checkpoint(tmp_path / "DeACL.pt", "DeACL", as_="encoder", store=store, dataset=str(tmp_path / "color.npz"))
    again = tuned()  # of the same file, whose encoder is in the store and has its data set stated
    assert again["pretrain_dataset"] == "color" and again["name"] == "DeACL-SLF"
