"""`ssp_joint` from pre-training to attack: what its members share, when, and that the finished one is an ordinary model."""

import pytest
import torch

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite
from rush_bench.defenses import load_defense
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.recipes.ssp import make
from rush_bench.settings import override
from rush_bench.store import read_card, read_weights
from rush_bench.training import train
from rush_bench.training.finetune import Finetune

SMALL = ("size=8", "network.name=resnet", "network.blocks=1,1", "network.width=4", "n_train=64")
SHORT = ("joint.epochs=1", "joint.layers=1", "finetune.epochs=1", "attack.steps=1", "finetune_attack.steps=1")
SHORT += ("finetune.select_images=16",)
TRUNK = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")


def finished(store, *sets):
    """The three encoders' weights of a short run."""
    train("ssp_joint", dataset="digits", preset="smoke", sets=(*SMALL, *SHORT, *sets), store=store, name="run")
    weights, prefix = read_weights(store, "run"), "encoder.members."
    return [{k.removeprefix(f"{prefix}{n}."): v for k, v in weights.items() if k.startswith(f"{prefix}{n}.")} for n in range(3)]


def test_partial_fine_tuning_keeps_one_trunk_and_full_does_not(tmp_path):
    partial = finished(tmp_path / "partial", "finetune.mode=partial")
    first = partial[0]
    for other in partial[1:]:
        assert all(torch.equal(first[key], other[key]) for key in first if not key.startswith("layer2"))
        assert not torch.equal(first["layer2.0.conv1.weight"], other["layer2.0.conv1.weight"])
    full = finished(tmp_path / "full")
    for other in full[1:]:
        assert not any(torch.equal(full[0][key], other[key]) for key in TRUNK)


@pytest.mark.parametrize(
    ("sets", "protocol", "votes"),
    [
        (("finetune.protocol=SLF",), "SLF", [0]),
        (("finetune.protocol=ALF",), "ALF", [0]),
        (("finetune.protocol=NSLF", "noise=uniform:0.3"), "NSLF", [0, 1, 64]),
    ],
)
def test_a_linear_protocol_moves_the_members_heads_alone(tmp_path, sets, protocol, votes, monkeypatch):
    before = {}

    def prepare(self, fresh):
        before.update({key: value.clone() for key, value in self.network.state_dict().items() if key.startswith("encoder.")})
        own(self, fresh)
        assert not any(head.weight.any() or head.bias.any() for head in self.network.head.members)

    own = Finetune.prepare
    monkeypatch.setattr(Finetune, "prepare", prepare)
    finished(tmp_path, "linear.epochs=1", *sets)
    weights, card = read_weights(tmp_path, "run"), read_card(tmp_path, "run")
    assert (card["protocol"], card["votes"]) == (protocol, votes)
    assert before and all(torch.equal(weights[key], value) for key, value in before.items())
    heads = [value for key, value in weights.items() if key.startswith("head.") and key.endswith("weight")]
    assert len(heads) == 3 and all(value.any() for value in heads)


def test_the_finished_model_is_attacked_as_any_other(tmp_path):
    longer = ("n_train=160", "finetune.epochs=3", "finetune.batch_size=10", "finetune.lr=0.2")
    finished(tmp_path, "network.width=8", "joint.batch_size=48", *longer)
    defense = load_defense("run", store=tmp_path)
    assert (defense.draws, defense.shape, defense.classes) == (0, (1, 8, 8), 10)
    images = rb.load_dataset("digits", "test", 40, size=8)
    suite = parse_suite("linf25.5-quick", only=("clean", "pgd"), overrides={"pgd.steps": 5})
    table = rb.attack([defense], suite, images, out=tmp_path, quiet=True).table().frame
    assert table.loc[0, "pgd"] < table.loc[0, "clean"] - 10 and table.loc[0, "clean"] > 25


def test_both_kinds_of_ensemble_end_in_the_same_network():
    joint, apart = (make(name).settings.network for name in ("ssp_joint", "ssp"))
    assert joint == apart
    spec = {"name": "tiny", "members": joint.members}
    assert build(spec).state_dict().keys() == build({"name": "tiny", "members": 3}).state_dict().keys()


def test_other_numbers_of_members_are_refused():
    recipe = make("ssp_joint")
    with pytest.raises(BadInput, match=r"network\.members"):
        recipe.plans(override(recipe.settings, {"network.members": 2}))
