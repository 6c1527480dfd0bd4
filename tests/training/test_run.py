"""`train`: layers of settings, the card, and errors that name the fix."""

import dataclasses
import errno
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rush_bench import registry
from rush_bench.datasets import load_dataset
from rush_bench.errors import BadInput, RushBenchError, WorkLeft
from rush_bench.networks import build
from rush_bench.progress import Bar
from rush_bench.store import read_card, read_weights
from rush_bench.training import prepare, train
from rush_bench.training.checkpoint import CheckpointFile
from rush_bench.training.options import Optimisation, RunSettings
from rush_bench.training.prepare import load_splits
from rush_bench.training.stage import Plan, Recipe, Stage

TINY = ("network.name=resnet", "network.blocks=1", "network.width=4", "n_train=64", "pretrain.batch_size=32")
NAMES = (
    *(
        "..",
        ".",
        "",
        "a/b",
        "/a",
        "a@3",
        "a:best",
        "a,b",
        "[x]",
        "a*",
        "a?",
        ".hidden",
        "-a",
        "a b",
        " a",
        "a\tb",
        "a\n",
        "a\0b",
    ),
    *("all", "a" * 300, "a\\b"),
)


def quick(store: Path, *sets: str, recipe: str = "simclr", **keys) -> Path:
    return train(recipe, dataset="digits", preset="smoke", sets=(*TINY, *sets), store=store, **keys)


def test_layers_preset_toml_set_in_this_order(tmp_path):
    config = tmp_path / "my.toml"
    config.write_text('noise = "gaussian:1/8"\n[pretrain]\nlr = 0.02\nepochs = 1\n')
    folder = quick(tmp_path, "pretrain.lr=0.03", "finetune.epochs=1", recipe="rush", config=config, name="mine")
    card = read_card(tmp_path, "mine")
    assert folder == tmp_path / "mine"
    assert card["settings"]["pretrain"]["lr"] == 0.03  # --set over TOML
    assert card["settings"]["pretrain"]["epochs"] == 1  # TOML over preset
    assert card["settings"]["finetune"]["batch_size"] == 64  # preset over default
    assert card["settings"]["pretrain"]["weight_decay"] == 1e-4  # default
    assert card["noise"] == {"law": "gaussian", "scale": 0.125}


def test_the_card_says_what_ran_and_the_weights_load(tmp_path):
    quick(tmp_path, recipe="rush", seed=3)
    card = read_card(tmp_path, "rush-digits")
    assert (card["recipe"], card["dataset"], card["pretrain_dataset"]) == ("rush", "digits", "digits")
    assert (card["protocol"], card["extra_data"], card["preset"]) == ("NSLF", None, "smoke")
    assert card["noise"] == {"law": "uniform", "scale": 0.3} and card["votes"] == [1, 64]
    assert card["epochs_done"] == {"pretrain": 2, "finetune": 2} and card["seed"] == 3
    assert card["data"]["n_train"] == card["data"]["n_pretrain"] == 64
    assert card["data"]["n_val"] == len(load_dataset("digits", "val"))
    assert card["data"]["digest"]["train"] == load_dataset("digits", "train", 64).digest
    assert {"clean", "noisy", "knn", "best"} <= set(card["validation"]) and card["seconds"] > 0
    assert [entry["epoch"] for entry in card["validation"]["history"]] == [1, 2, 1, 2]
    network = build(card["network"])
    network.load_state_dict(read_weights(tmp_path, "rush-digits"))
    val = load_dataset("digits", "val")
    accuracy = (network.eval()(val.floats()).argmax(1) == val.labels).float().mean()
    assert float(accuracy) == pytest.approx(card["validation"]["clean"], abs=1e-6)


def test_best_weights_are_kept_where_they_are_not_the_last(tmp_path):
    quick(tmp_path, "finetune.epochs=6", "finetune.lr=5", "pretrain.epochs=1")
    card = read_card(tmp_path, "simclr-digits")
    history = [entry for entry in card["validation"]["history"] if entry["stage"] == "finetune"]
    best = max(history, key=lambda entry: entry["clean"])
    assert card["validation"]["best"] == {"score": best["clean"], "epoch": best["epoch"]}
    assert ("best" in card["sha256"]) is (best["epoch"] != 6)
    assert best["epoch"] != 6  # or this test shows nothing
    network = build(card["network"])
    network.load_state_dict(read_weights(tmp_path, "simclr-digits", "best"))
    val = load_dataset("digits", "val")
    assert float((network.eval()(val.floats()).argmax(1) == val.labels).float().mean()) == pytest.approx(best["clean"])


def test_transfer(tmp_path):
    """Pre-training sees the one data set, fine-tuning the other; the name says so."""
    import numpy as np

    digits = {split: load_dataset("digits", split) for split in ("train", "test")}
    arrays = {f"{s}_images": x.pixels.permute(0, 2, 3, 1).numpy() for s, x in digits.items()}
    arrays |= {f"{s}_labels": x.labels.numpy() % 2 for s, x in digits.items()}
    np.savez(tmp_path / "parity.npz", **arrays, classes=np.array(["even", "odd"]))
    folder = train(
        "simclr", dataset=str(tmp_path / "parity.npz"), pretrain_on="digits", preset="smoke", sets=TINY, store=tmp_path
    )
    card = read_card(tmp_path, folder.name)
    assert folder.name == "simclr-digits-to-parity" and card["network"]["classes"] == 2
    assert (card["pretrain_dataset"], card["dataset"]) == ("digits", "parity")
    assert card["data"]["digest"]["pretrain"] == load_dataset("digits", "transfer", 64).digest


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recipe": "rsh"}, "did you mean 'rush'"),
        ({"preset": "papr"}, "did you mean 'paper'"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"sets": ["pretrain.lrr=1"]}, "did you mean 'pretrain.lr'"),
        ({"sets": ["pretrain.lr=fast"]}, "must be a finite number"),
        ({"sets": ["noise=uniform"]}, "write uniform:0.3"),
        ({"sets": ["noise=none"]}, "it is the recipe simclr"),
        ({"sets": ["network.name=resnet17"]}, "did you mean 'resnet18'"),
        ({"sets": ["finetune.bn_adapt=betas"]}, "did you mean 'beta'"),
        ({"sets": ["finetune.epochs=0"]}, "must be a whole number, at least 1"),
        ({"n_train": 10**6}, "give 1 to 1167"),
        ({"n_train": 0}, "must be a whole number, at least 1"),
        ({"n_train": 1}, "needs at least 2 images"),
        ({"device": "cuda:99"}, "--device auto"),
        ({"config": "no.toml"}, "settings file no.toml cannot be read"),
        *(({"name": name}, "plain folder name") for name in NAMES),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(tmp_path, keys, message):
    keys = {"recipe": "rush", "dataset": "digits", "preset": "smoke"} | keys
    with pytest.raises(BadInput, match=message):
        train(keys.pop("recipe"), store=tmp_path, **keys)
    assert not list(tmp_path.iterdir())


def test_a_data_set_without_labels_cannot_be_fine_tuned_on(tmp_path, monkeypatch):
    images = load_dataset("digits", "train", 64)
    monkeypatch.setattr(
        prepare, "load_dataset", lambda *a, **k: dataclasses.replace(images, labels=torch.full_like(images.labels, -1))
    )
    with pytest.raises(BadInput, match=r"has no labels.*--pretrain-on"):
        train("simclr", dataset="digits", preset="smoke", store=tmp_path)


def coloured(path: Path, channels: int, side: int = 20) -> str:
    """A data set of four classes whose images are one colour each."""
    shape = (80, side, side) if channels == 1 else (80, side, side, 3)
    pixels = np.empty(shape, np.uint8)
    pixels[:] = 160 if channels == 1 else (200, 100, 50)
    labels = np.arange(80) % 4
    both = {f"{part}_images": pixels for part in ("train", "test")} | {f"{part}_labels": labels for part in ("train", "test")}
    np.savez(path, classes=["a", "b", "c", "d"], **both)
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_transfers_between_any_two_data_sets(tmp_path, channels):
    """Other size, other channels, other classes, both ways: what is pre-trained on takes the target's shape."""
    mine = coloured(tmp_path / "mine.npz", channels)
    common = {"preset": "smoke", "sets": TINY, "store": tmp_path}
    there = train("simclr", dataset="digits", pretrain_on=mine, name="there", **common)
    back = train("simclr", dataset=mine, pretrain_on="digits", name="back", **common)
    shapes = {"there": (1, 16, 10), "back": (channels, 20, 4)}
    for folder in (there, back):
        card = read_card(tmp_path, folder.name)
        network = card["network"]
        assert (network["channels"], network["size"], network["classes"]) == shapes[folder.name]
        assert {card["dataset"], card["pretrain_dataset"]} == {"digits", "mine"}
        build(network).load_state_dict(read_weights(tmp_path, folder.name))
    system = registry.recipes.load("simclr")
    splits = load_splits(system, system.settings, "digits", mine, None, False)
    expected = 160 if channels == 1 else round(0.2989 * 200 + 0.587 * 100 + 0.114 * 50)
    assert splits["pretrain"].shape == (1, 16, 16) and set(splits["pretrain"].pixels.unique().tolist()) == {expected}
    grey = load_splits(system, system.settings, mine, "digits", None, False)["pretrain"]
    assert grey.shape == (channels, 20, 20) and bool((grey.pixels == grey.pixels[:, :1]).all())


def test_a_folder_of_another_run_is_refused_before_and_after_it_finishes(tmp_path):
    with pytest.raises(WorkLeft):
        quick(tmp_path, max_minutes=0)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"pretrain\.lr is 0\.06 there and 0\.01 here.*--name"):
            quick(tmp_path, "pretrain.lr=0.01")
        with pytest.raises(BadInput, match="seed is 0 there and 1 here"):
            quick(tmp_path, seed=1)
        quick(tmp_path)
    assert quick(tmp_path, "pretrain.lr=0.01", name="other").name == "other"


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: b"rubbish" * 40])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, damage):
    with pytest.raises(WorkLeft):
        quick(tmp_path, max_minutes=0)
    path = tmp_path / "simclr-digits" / ".training" / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=r"checkpoint\.pt is damaged.*delete"):
        quick(tmp_path)


def test_two_processes_do_not_train_one_model(tmp_path):
    with CheckpointFile(tmp_path / "simclr-digits", {}).lock(), pytest.raises(BadInput, match="another process"):
        quick(tmp_path)
    quick(tmp_path)


def test_an_unwritable_store_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RushBenchError, match="cannot write"):
        quick(tmp_path / "file")


def test_training_works_without_locks_and_says_so_once(tmp_path, unlocked, capsys):
    unlocked(errno.ENOLCK)
    with pytest.raises(WorkLeft):
        quick(tmp_path, max_minutes=0)
    quick(tmp_path)
    assert capsys.readouterr().err.count("has no locks") == 1
    assert not (tmp_path / "simclr-digits" / ".training").exists()


def test_leftovers_of_kills_are_swept(tmp_path):
    with pytest.raises(WorkLeft):
        quick(tmp_path, max_minutes=0)
    folder = tmp_path / "simclr-digits"
    for stale in (folder / ".training" / ".checkpoint-1234abcd.part.pt", folder / ".model-1234abcd.part.safetensors"):
        stale.write_bytes(b"half")
    quick(tmp_path)
    assert {path.name for path in folder.iterdir()} <= {"card.json", "log.jsonl", "model.safetensors", "best.safetensors"}


class Failing(Stage):
    """Loss 1, 1, ... and then not a number, or weights that are not."""

    def loss(self, batch):
        loss = self.network(batch.images).square().mean()
        return loss * torch.nan if batch.step == self.run_settings.size - 16 else loss


def failing_recipe(step: int) -> Recipe:
    plan = Plan("pretrain", "train", Optimisation(epochs=3, batch_size=16), Failing)
    card = {"protocol": "none", "extra_data": None, "votes": [0]}
    # The step at which it fails travels in a setting that is free here.
    return Recipe("failing", RunSettings(size=16 + step), lambda s: [plan], lambda s: card, {"short": {}})


def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(tmp_path, monkeypatch):
    real = prepare.load_dataset
    monkeypatch.setattr(prepare, "load_dataset", lambda *a, size=None, **k: real(*a, **k))
    with pytest.raises(RushBenchError, match=r"loss is nan in stage 'pretrain', epoch 2, step 3; the last good") as error:
        train(failing_recipe(step=6), dataset="digits", sets=TINY[:4], store=tmp_path)  # 4 steps an epoch
    assert error.value.exit_code == 1 and "--set pretrain.lr" in str(error.value)
    content = torch.load(tmp_path / "failing-digits" / ".training" / "checkpoint.pt", weights_only=True)
    assert (content["where"]["epoch"], content["where"]["step"]) == (1, 0)
    assert all(x.isfinite().all() for x in content["module"].values())


def test_a_learning_rate_that_explodes_is_an_error(tmp_path):
    with pytest.raises(RushBenchError, match=r"not finite|loss is"):
        quick(tmp_path, "pretrain.lr=1e30", "pretrain.epochs=8")
    assert not (tmp_path / "simclr-digits" / "card.json").exists()


def test_batches_shrink_to_the_data_and_the_card_says_so(tmp_path):
    stream = io.StringIO()
    quick(tmp_path, "finetune.batch_size=999", report=Bar(stream=stream))
    assert "finetune.batch_size is 64: there are no more images" in stream.getvalue()
    assert read_card(tmp_path, "simclr-digits")["settings"]["finetune"]["batch_size"] == 64


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, capsys):
    for stream in (Terminal(), io.StringIO()):
        quick(tmp_path / f"{stream.isatty()}", name="mine", report=Bar(stream=stream))
        text = stream.getvalue()
        assert "pretrain" in text and "is finished: validation clean" in text
        assert re.search(r"epoch \d/\d  loss \d\.\d{4}  \w+ \d+\.\d %", text)  # what was measured last, beside the loss
        shown = re.findall(r"epoch (\d)/\d  loss \d\.\d{4}  (\w+) (\d+\.\d) % after epoch (\d)", text)
        folder = tmp_path / f"{stream.isatty()}" / "mine"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert shown and all(int(measured) == int(now) - 1 for now, *_, measured in shown)
        for _, metric, percent, measured in shown:
            assert percent in {f"{100 * line[metric]:.1f}" for line in log if line["epoch"] == int(measured) and metric in line}
        assert ("\x1b[" in text) is stream.isatty()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [["precision=bfloat16"], ["channels_last=false"], ["pretrain.optimiser=lars"]])
def test_options_run(tmp_path, options):
    folder = quick(tmp_path, *options, recipe="rush")
    losses = [entry["loss"] for entry in json.loads((folder / "card.json").read_text())["validation"]["history"]]
    assert all(0 < loss < 10 for loss in losses)


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    quick(tmp_path, recipe="rush")
    assert torch.equal(before, torch.random.get_rng_state())
