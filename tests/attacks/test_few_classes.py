"""Two and three classes: what exists of AutoAttack runs, the table says which, and `worst` exists."""

import pytest
import torch
from torch import nn

import rush_bench as rb
from rush_bench.attacks.parts import STANDARD, parts_for
from rush_bench.attacks.suites import parse_suite
from rush_bench.audits.experiments import BUDGETS, Subject, plan
from rush_bench.datasets import Images
from rush_bench.defenses.losses import dlr, dlr_to, margin, margin_to
from rush_bench.noise import Stream
from rush_bench.registry import attacks
from rush_bench.settings import override
from rush_bench.threats import Threat

SHAPE, COUNT = (1, 4, 4), 6
SHORT = {"steps": 3, "queries": 10, "points": 3, "draws": 2, "eot_iter": 2, "select_draws": 2, "least_bank": 2}


def network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, classes)).eval()


def data(classes: int) -> Images:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    labels = network(classes)(pixels / 255).argmax(1)
    return Images(pixels, labels, torch.arange(COUNT), tuple(map(str, range(classes))), "few", "test")


def defenses(classes: int) -> list[rb.Defense]:
    return [
        rb.Deterministic(network(classes), shape=SHAPE, name="still"),
        rb.Smoothed(network(classes), noise="uniform:0.1", votes=2, shape=SHAPE, name="noisy@2"),
    ]


@pytest.mark.parametrize(
    ("classes", "parts"),
    [(2, ("apgd-ce", "fab-t", "square")), (3, ("apgd-ce", "apgd-dlr", "fab-t", "square")), (4, STANDARD)],
)
def test_the_parts_that_exist(classes, parts):
    assert parts_for(classes) == parts
    assert parts_for(classes, ("apgd-dlr",)) == (("apgd-dlr",) if classes > 2 else ("apgd-ce",))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_whole_suite_of_few_classes_has_its_worst(classes, tmp_path):
    suite = parse_suite("linf25.5-quick", overrides={"square.queries": 20})
    run = rb.attack(defenses(classes), suite, data(classes), out=tmp_path, quiet=True)
    frame = run.table().frame
    assert run.complete and not run.failed and frame["worst"].notna().all()


@pytest.mark.usefixtures("short_square")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["aa", "apgd", "aa-rand", "aa-published", "eot-apgd", "eot-apgd-t", "pgd", "square"])
def test_every_attack_takes_few_classes(classes, name):
    images = data(classes)
    for defense in defenses(classes):
        plain = attacks.load(name)()
        attack = override(plain, {key: value for key, value in SHORT.items() if hasattr(plain, key)})
        threat = Threat("linf", 0.1)
        attacked = attack.on(defense).run(defense, images.floats(), images.labels, threat, Stream(0, "few", images.index))
        assert threat.size(attacked - images.floats()).max() <= 0.1 + 1e-6
        assert all(passes >= 0 for passes in attack.passes(defense))


@pytest.mark.usefixtures("short_square")
def test_the_table_says_which_parts_ran(tmp_path):
    suite = parse_suite("linf25.5", only=("clean", "aa"), overrides={"aa.steps": 2})
    notes = rb.attack(defenses(2)[:1], suite, data(2), out=tmp_path, quiet=True).table().frame["notes"][0]
    assert "parts=apgd-ce+fab-t+square (usual all)" in notes and "steps=2 (usual 0)" in notes


@pytest.mark.parametrize("classes", [2, 3])
def test_dlr_of_too_few_classes_is_the_margin(classes):
    scores, labels = torch.randn(5, classes).log_softmax(1), torch.zeros(5, dtype=torch.int64)
    pairs = torch.stack([labels, labels + 1], 1)
    assert torch.equal(dlr(scores, labels), margin(scores, labels)) == (classes == 2)
    assert torch.equal(dlr_to(scores, pairs), margin_to(scores, pairs))


@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize("classes", [2, 3])
def test_settle_has_its_experiments_for_few_classes(classes, draws):
    for budget in BUDGETS.values():
        subject = Subject(draws, classes, "linf", 0.1, has_base=draws > 0, has_bank=True, has_votes=draws > 0, has_module=True)
        trials = plan(subject, budget)
        for trial in trials:
            if trial.attack == "aa":
                assert trial.settings["parts"] == parts_for(classes, budget.parts or STANDARD), trial
        assert {"T4", "T6", "T15"} <= {trial.experiment for trial in trials}
