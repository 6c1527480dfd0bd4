"""`audit`: the verdict, its files, the claim, and what it is held against."""

import dataclasses
import json
from pathlib import Path

import pytest

from rush_bench.api.audit import published_claim, stated_claim
from rush_bench.audits import run as room
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.experiments import BUDGETS
from rush_bench.audits.finding import Finding
from rush_bench.errors import BadInput
from rush_bench.registry import recipes
from rush_bench.settings import to_dict
from rush_bench.training.prepare import resolve_settings

SMALL = {"points": 2, "sweep": (1, 2), "steps": 2, "draws": 1, "lengths": (1, 2, 3), "restarts": 2, "losses_steps": 2}
SMALL |= {"rand": (2,), "rand_steps": 2, "banks": (2,), "part_steps": 2, "queries": (4,), "sweep_steps": 2, "votes": (1, 2)}
SMALL |= {"certificate": 200, "published": {"steps": 1, "queries": 2, "targets": 1}, "long": 3, "peers": 1, "targets": 1}


@pytest.fixture
def audit(rush_bench, store: Path, mine: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch):
    """`audit` at a budget that takes a moment, its probes made by hand: the probes have tests of their own."""
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **SMALL))
    names = {"flags": "zero-gradients", "truth": "true-gradient", "indicators": "unconstrained-attack-failure"}
    names["binarization"] = "binarization"
    for kind, check in names.items():
        found = Finding(check, "made by hand", 0.0, 0.0, "<=", "nothing", "pass")
        monkeypatch.setattr(room, kind, lambda *arguments, found=found: [found])

    def run(*args: object, models: str = "plain"):
        return rush_bench("audit", models, "--budget", "quick", "--n", "6", "--dataset", mine, *args)

    return run


def test_a_verdict_with_its_files(audit) -> None:
    result = audit("--claim", "99%", "--json")
    assert result.exit_code == 5 and "not said to stand: plain-mine (" in result.stderr, result.output
    said = json.loads(result.stdout)
    (found,) = said["audits"]
    assert said["failed"] == {} and found["verdict"]["claim"] == {"value": 0.99, "source": "stated with --claim"}
    assert found["verdict"]["word"] in ("refuted", "weakened")  # it was never trained
    assert found["verdict"]["decided_by"][0] == "worst case"
    (path,) = Path("results/audit").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["verdict"] == found["verdict"] and kept["findings"] == found["findings"]
    text = path.with_suffix(".md").read_text()
    assert "99.0 %" in text and ("REFUTED" in text or "WEAKENED" in text)
    shown = audit("--claim", "99%")
    assert shown.exit_code == 5 and "plain-mine on mine" in shown.stdout
    # another claim, from the same records
    low = audit("--claim", "5", "--json")
    verdict = json.loads(low.stdout)["audits"][0]["verdict"]
    assert (verdict["word"], verdict["rule"]) == ("cannot say", 0)


def test_without_a_claim_it_is_the_replay(audit) -> None:
    found = json.loads(audit("--json").stdout)["audits"][0]["verdict"]
    assert found["claim"]["source"] == "PGD-20, replayed on these weights"


def test_stopped_is_3_and_the_same_command_finishes(audit) -> None:
    stopped = audit("--max-minutes", "0")
    assert stopped.exit_code == 3 and "no verdict yet" in stopped.stdout
    assert audit().exit_code == 5  # a claim at chance cannot be settled


def test_a_shard_that_is_done_is_0_and_leaves_the_verdict_to_the_last(audit) -> None:
    second = audit("--shard", "2/2", "--chunk", "3")
    assert second.exit_code == 0 and "wait for the others" in second.stderr and "no verdict yet" in second.stdout
    first = audit("--shard", "1/2", "--chunk", "3")
    assert first.exit_code == 5 and "no verdict yet" not in first.stdout


def test_a_failing_probe_is_1(audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise ValueError("no such luck")

    monkeypatch.setattr(room, "indicators", broken)
    result = audit("--json")
    assert result.exit_code == 1 and "no such luck" in result.stderr
    said = json.loads(result.stdout)
    assert said["audits"][0]["verdict"] is None and said["failed"].keys() == {"plain-mine probe indicators"}
    assert said["failed"]["plain-mine probe indicators"].startswith("ValueError: no such luck (")


def test_a_plan_gives_no_verdict(audit) -> None:
    result = audit("--plan", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["audits"] == [] and not Path("results").exists()


@pytest.mark.parametrize("claim", ["0.779", "1", "0", "101", "-5", "nan", "many", "8/0"])
def test_a_claim_is_a_percentage(audit, claim) -> None:
    result = audit(f"--claim={claim}")
    assert result.exit_code == 2 and "--claim takes an accuracy in percent" in result.stderr
    assert not Path("results").exists()


@pytest.mark.parametrize("said", [77.8, "77.8", "77.8 %"])
def test_a_percentage_may_be_a_text(said) -> None:
    assert stated_claim(said).value == pytest.approx(0.778)


def test_a_claim_of_robustbench_is_about_this_threat_and_data(audit, tmp_path) -> None:
    info = {"name": "a paper", "dataset": "mine", "eps": "8/255", "reported": "54.8", "autoattack_acc": "54.43"}
    path = tmp_path / "Sehwag.json"
    path.write_text(json.dumps(info))
    found = stated_claim(path, "linf", 8 / 255, "mine")
    assert found.value == pytest.approx(0.548) and found.source == "reported of a paper in Sehwag.json"
    for other in (("linf", 4 / 255, "mine"), ("linf", 8 / 255, "cifar10")):
        with pytest.raises(BadInput, match=f"the audit is at --norm linf --eps {other[1]:.4g} on {other[2]}"):
            stated_claim(path, *other)


def test_a_claim_in_the_folder_of_a_norm_is_about_that(tmp_path) -> None:
    path = tmp_path / "mine" / "Linf" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"name": "a", "dataset": "mine", "eps": "0.5", "reported": "54.8"}))
    assert stated_claim(path, "linf", 0.5).value == pytest.approx(0.548)
    with pytest.raises(BadInput, match=r"at linf 0\.5 on mine; the audit is at --norm l2 --eps 0\.5"):
        stated_claim(path, "l2", 0.5)


def test_a_claim_about_other_data_is_refused_whatever_data_the_models_bring(audit, tmp_path) -> None:
    info = {"name": "a", "dataset": "cifar10", "eps": "8/255", "reported": "54.8"}
    (tmp_path / "a.json").write_text(json.dumps(info))
    result = audit(f"--claim={tmp_path / 'a.json'}")
    assert result.exit_code == 2 and "on cifar10; the audit is at --norm linf --eps 0.03137 on mine" in result.stderr


def test_some_experiments_are_not_enough(audit) -> None:
    result = audit("--only", "T1")
    assert result.exit_code == 2 and "settle --only" in result.stderr


def evidence(**labels) -> Evidence:
    said = {"recipe": "rush", "votes": 64, "dataset": "cifar10", "pretrain_dataset": "cifar10", "norm": "linf", "eps": 8 / 255}
    said |= {"preset": "paper"}
    return Evidence("rush@64", {**said, **labels}, ())


def card_of(recipe: str, preset: str, *layers) -> dict:
    """What training writes down of itself."""
    shape = (3, 32, 32)
    settings = resolve_settings(recipes.load(recipe), preset, shape, layers, "cifar10")
    network = {"name": "resnet18", "classes": 10, "channels": 3, "size": 32}
    found = {"recipe": recipe, "dataset": "cifar10", "preset": preset, "network": network, "settings": to_dict(settings)}
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("labels", "claim", "says"),
    [
        ({}, 0.795, "AA"),  # above the 77.8 under PGD
        ({"votes": 1}, 0.747, "AA"),
        ({"dataset": "cifar100", "pretrain_dataset": "cifar100"}, 0.466, "PGD"),  # no AA is published there
        ({"votes": 8}, None, None),
        ({"norm": "l2", "eps": 0.5}, None, None),
        ({"eps": 4 / 255}, None, None),
        ({"recipe": "cohen"}, None, None),
        ({"dataset": "digits", "pretrain_dataset": "digits"}, None, None),
    ],
)
def test_published_claims(labels, claim, says, monkeypatch) -> None:
    recipe = labels.get("recipe", "rush")
    monkeypatch.setattr("rush_bench.api.audit.cards_measured", lambda store, digests: {recipe: card_of(recipe, "paper")})
    found = published_claim(evidence(**labels), Path("models"))
    if claim is None:
        assert found is None
    else:
        assert found.value == pytest.approx(claim)
        assert f"under {says}" in found.source and "Table 1" in found.source and "other weights" in found.source


@pytest.mark.parametrize(
    ("preset", "layer"),
    [
        ("short", {}),
        ("paper", {"network.name": "tiny"}),
        ("paper", {"pretrain.epochs": 8}),
        ("paper", {"finetune.lr": 0.05}),
        ("paper", {"n_train": 1000}),
    ],
    ids=str,
)
def test_a_number_about_the_papers_training_is_no_claim_about_another(preset, layer, monkeypatch) -> None:
    cards = [card_of("rush", preset, layer)]
    monkeypatch.setattr("rush_bench.api.audit.cards_measured", lambda store, digests: dict(enumerate(cards)))
    assert published_claim(evidence(), Path("models")) is None
    cards[0] = card_of("rush", "paper") | {"from": {"name": "another"}}
    assert published_claim(evidence(), Path("models")) is None
    cards[0] = card_of("rush", "paper") | {"recipe": "a plug-in that is not here"}
    assert published_claim(evidence(), Path("models")) is None
    cards.clear()  # weights that no card knows
    assert published_claim(evidence(), Path("models")) is None
