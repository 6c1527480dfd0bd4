"""An ensemble of finished models: the mean of their probabilities, a model of its own in the store."""

import shutil

import pytest
import torch
from click.testing import CliRunner

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite
from rush_bench.cli import main
from rush_bench.defenses import load_defense
from rush_bench.defenses.ensemble import make_ensemble
from rush_bench.errors import BadInput
from rush_bench.networks import build, resolve
from rush_bench.noise import Stream, Uniform
from rush_bench.store import read_card, save_model

SPECS = {
    "one": {"name": "resnet", "blocks": [1], "width": 4, "mean": [0.5], "std": [0.2]},
    "two": {"name": "wrn", "blocks": [1, 1], "width": 4},
    "three": {"name": "resnet", "blocks": [1], "width": 4, "members": 2},  # itself an ensemble, as `ssp` leaves
}


def a_model(store, name, seed=0, dataset="digits", size=8, noise=None, spec=None):
    full = resolve({"channels": 1, "size": size, "classes": 10} | (spec or SPECS[name]))
    card = {"name": name, "recipe": f"{name}_recipe", "dataset": dataset, "pretrain_dataset": None, "preset": "short"}
    card |= {"network": full, "noise": noise, "votes": [1] if noise else [0], "protocol": "AFF", "extra_data": None}
    network = build(full, seed)
    save_model(store / name, card | {"settings": {}, "data": {}}, network.state_dict())
    return network.eval()


def test_it_is_the_mean_probability_of_members_of_any_kind(tmp_path):
    networks = [a_model(tmp_path, name, seed) for seed, name in enumerate(SPECS)]
    folder = make_ensemble(list(SPECS), name="all3", store=tmp_path)
    images = rb.load_dataset("digits", "test", 20, size=8)
    with torch.no_grad():
        expected = sum(network(images.floats()).double().softmax(1) for network in networks) / 3
    for name in SPECS:
        shutil.rmtree(tmp_path / name)  # it needs them no longer
    defense = load_defense("all3", store=tmp_path)
    prediction = defense.predict(images.floats(), Stream(0, "test", images.index))
    torch.testing.assert_close(prediction.probabilities.double(), expected, atol=1e-5, rtol=0)
    card = read_card(folder.parent, "all3")
    assert [member["name"] for member in card["members"]] == list(SPECS)
    assert all(len(member["sha256"]) == 64 for member in card["members"]) and card["protocol"] == "AFF"
    assert defense.about["architecture"] == "resnet + wrn + 2 x resnet"


def test_it_is_attacked_as_any_other(tmp_path):
    for seed, name in enumerate(("one", "two")):
        a_model(tmp_path, name, seed)
    make_ensemble(["one", "two"], name="pair", store=tmp_path)
    images = rb.load_dataset("digits", "test", 10, size=8)
    suite = parse_suite("linf25.5-quick", only=("clean", "pgd"), overrides={"pgd.steps": 2})
    table = rb.attack([load_defense("pair", store=tmp_path)], suite, images, out=tmp_path, quiet=True).table().frame
    assert table.loc[0, "pgd"] <= table.loc[0, "clean"] and table.loc[0, "defense"] == "pair"


def test_a_randomised_ensemble_keeps_its_law(tmp_path):
    law = Uniform(0.3).to_dict()
    for name in ("one", "two"):
        a_model(tmp_path, name, noise=law)
    make_ensemble(["one", "two"], name="pair", store=tmp_path)
    assert load_defense("pair@1", store=tmp_path).draws == 1


def test_the_same_call_again_changes_nothing_and_another_is_refused(tmp_path):
    for seed, name in enumerate(SPECS):
        a_model(tmp_path, name, seed)
    path = make_ensemble(["one", "two"], name="pair", store=tmp_path) / "model.safetensors"
    written = path.stat().st_mtime_ns
    make_ensemble(["one", "two"], name="pair", store=tmp_path)
    assert path.stat().st_mtime_ns == written
    for models, name in ((["one", "three"], "pair"), (["one", "two"], "three")):
        with pytest.raises(BadInput, match="another model named"):
            make_ensemble(models, name=name, store=tmp_path)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["one"], "at least two models"),
        (["one", "one"], "each once"),
        (["one", "tow"], "did you mean 'two'"),
        (["one", "other-data"], "differ in dataset"),
        (["one", "noisy"], "differ in noise"),
        (["one", "larger"], "differ in size"),
        (["one", "two:best"], "has no 'best' weights"),
    ],
)
def test_members_that_do_not_go_together(tmp_path, models, message):
    a_model(tmp_path, "one")
    a_model(tmp_path, "two")
    a_model(tmp_path, "other-data", dataset="cifar10", spec=SPECS["one"])
    a_model(tmp_path, "noisy", noise=Uniform(0.3).to_dict(), spec=SPECS["one"])
    a_model(tmp_path, "larger", size=16, spec=SPECS["one"])
    with pytest.raises(BadInput, match=message):
        make_ensemble(models, name="made", store=tmp_path)
    assert not (tmp_path / "made").exists()


def test_the_command(tmp_path):
    for seed, name in enumerate(("one", "two")):
        a_model(tmp_path, name, seed)
    done = CliRunner().invoke(main, ["ensemble", "one", "two", "--name", "pair", "--store", str(tmp_path)])
    assert done.exit_code == 0 and done.stdout == "" and "'pair'" in done.stderr
    wrong = CliRunner().invoke(main, ["ensemble", "one", "--name", "alone", "--store", str(tmp_path)])
    assert wrong.exit_code == 2 and "at least two" in wrong.stderr
