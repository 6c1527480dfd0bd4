"""The files that are shipped: what they ask for, and the equal-cost rule that one of them names."""

import tomllib
from pathlib import Path

import pytest

from rush_bench.attacks.suites import parse_suite
from rush_bench.bench import file as files
from rush_bench.bench.equal import budget_of, stretched
from rush_bench.bench.jobs import Place, expand
from rush_bench.bench.plan import check
from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.registry import recipes
from rush_bench.settings import read_toml
from rush_bench.training.prepare import resolve_settings

SHAPE = (3, 32, 32)


def no_images(*args, **options):
    raise BadInput("no images here")


def coloured(*args, **options):
    import torch

    return as_images(torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.arange(4), classes=list("abcd"), name="cifar10")


def jobs_of(name: str, tmp_path: Path, load=coloured):
    bench = files.read(files.find(name))
    found = expand(bench, Place(tmp_path / "out", tmp_path / "store"), load)
    check(found)
    return {job.name: job for job in found}


@pytest.mark.parametrize("name", files.shipped())
def test_every_shipped_file_is_right_and_says_what_it_is(name, tmp_path):
    bench = files.read(files.find(name))
    assert bench.title != name and jobs_of(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "models", "name"),
    [
        ("own_network", 3, "attack mine linf8-quick"),
        ("control", 2, "attack control-c10@64 linf8-quick"),
        ("full_size", 2, "attack rush-c10-full@64 linf8-quick"),
    ],
)
def test_the_examples_are_right(tmp_path, file, models, name):
    jobs = jobs_of(str(Path(__file__).parents[2] / f"examples/{file}.toml"), tmp_path)
    assert sum(job.makes != "" for job in jobs.values()) == models and name in jobs


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('title = "mine"\n[[table]]\n', encoding="utf-8-sig")
    assert files.read(path).title == "mine" and read_toml(path)["title"] == "mine"


def test_the_demo_is_two_systems_and_two_suites(tmp_path):
    jobs = jobs_of("demo", tmp_path, no_images)
    kinds = [job.kind for job in jobs.values()]
    assert kinds == ["train"] * 2 + ["attack"] * 4 + ["table", "report"]
    attack = jobs["attack rush-digits linf25.5-quick"].context().params
    suite = parse_suite(attack["suite"], attack["attacks"].split(","))
    assert suite.shown == "linf25.5-quick without apgd" and attack["sets"] == ("square.queries=100",)


def test_digits_has_every_recipe_that_starts_from_nothing(tmp_path):
    trained = {name.removeprefix("train ") for name in jobs_of("digits", tmp_path, no_images) if name.startswith("train ")}
    own = {name for name, entry in recipes.entries.items() if entry.entry_point is None}
    assert {f"{name}-digits" for name in own - {"finetune"}} <= trained and "finetune-digits" not in trained


def sets_of(job) -> dict[str, str]:
    return dict(word.split("=", 1) for word in job.context().params["sets"])


def test_table1_stretches_every_schedule_to_the_budget(tmp_path):
    jobs = jobs_of("table1-cpu", tmp_path)
    assert sets_of(jobs["train rush-c10-tiny"]) == {"network.name": "tiny", "pretrain.epochs": "8", "finetune.epochs": "3"}
    whole = sets_of(jobs["train noise_sup-c10-tiny"])
    assert whole == {"network.name": "tiny", "train.epochs": "18", "train.milestones": "[9.0,13.5]"}
    assert sets_of(jobs["train noise_sup-c10-tiny-s2"]) == whole and "--seed 2" in jobs["train noise_sup-c10-tiny-s2"].line
    acl = {"network.name": "tiny", "pretrain.epochs": "1", "pretrain.warmup_epochs": "0.01", "aff.epochs": "1"}
    assert sets_of(jobs["train acl-c10-tiny"]) == acl | {"aff.milestones": "[0.39,0.59]"}
    assert {f"train {name}-c10-tiny-x{share}" for name in ("rush", "noise_sup") for share in ("0.25", "4")} <= jobs.keys()
    heads = {"simclr-nslf": "simclr", "rush-slf": "rush"}
    assert all(jobs[f"train {head}-c10-tiny"].needs == (f"{name}-c10-tiny",) for head, name in heads.items())
    audit = jobs["audit rush-c10-tiny@64 8/255"]
    assert audit.needs == ("rush-c10-tiny",) and audit.waits_for(jobs["train acl-c10-tiny"])


def test_without_images_the_rule_waits_for_them(tmp_path):
    jobs = jobs_of("table1-cpu", tmp_path, no_images)
    assert "no images here" in str(jobs["train rush-c10-tiny"].trouble)


def paper(name: str, *sets):
    system = recipes.load(name)
    return system, resolve_settings(system, "paper", SHAPE, [{"network.width": 16}, *sets], "cifar10")


@pytest.fixture(scope="module")
def budget():
    system = recipes.load("rush")
    return budget_of(system, resolve_settings(system, "paper", SHAPE, [{"pretrain.epochs": 8, "finetune.epochs": 3}]))


def test_rush_sets_the_budget(budget):
    assert (budget.passes, budget.head) == (8 * 2 * 3 + 3 * 2, 3)
    assert stretched(*paper("rush"), budget, 1).passes == budget.passes


ORDER = tomllib.loads(files.shipped()["table1-cpu"].read_text())["train"][0]["recipe"]


@pytest.mark.parametrize("name", sorted({*ORDER} - {"random_probe"}))  # whose encoder is not trained
def test_every_system_is_near_the_budget(budget, name):
    fitted = stretched(*paper(name), budget, 1)
    system, settings = paper(name, fitted.sets)
    spent = sum(plan.encoder_passes * plan.settings.epochs for plan in system.plans(settings))
    assert spent == fitted.passes == pytest.approx(budget.passes, rel=0.2)


@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_decays_keep_their_place(budget, share):
    sets = stretched(*paper("noise_sup"), budget, share).sets
    assert [m / sets["train.epochs"] for m in sets["train.milestones"]] == pytest.approx([0.5, 0.75], abs=0.01)


@pytest.mark.parametrize(("recipe", "share"), [("rush", 0.1), ("noise_sup", 0.02), ("acl", 1e-4)])
def test_a_share_that_pays_no_half_epoch_is_refused(budget, recipe, share):
    with pytest.raises(BadInput, match=f"cost = {share:g} pays less than half an epoch of .* of {recipe}"):
        stretched(*paper(recipe), budget, share)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cost = nan", "cost = nan is to be a share"),
        ("cost = inf", "cost = inf is to be a share"),
        ("cost = 1\nset.pretrain.epochs = 7", "cost decides pretrain.epochs, so that set would have no effect"),
    ],
)
def test_a_cost_is_a_number_and_decides_the_epochs(tmp_path, line, says):
    path = tmp_path / "own.toml"
    equal = '[equal_cost]\nrecipe = "rush"\npreset = "paper"\ndataset = "cifar10"\n'
    path.write_text(equal + f'[[train]]\nrecipe = "rush"\ndataset = "cifar10"\npreset = "paper"\n{line}\n')
    with pytest.raises(BadInput, match=says):
        jobs_of(str(path), tmp_path)


def test_a_recipe_whose_passes_nobody_counted_is_refused(budget):
    with pytest.raises(BadInput, match=r"the passes of ssp_selfie are not counted"):
        stretched(*paper("ssp_selfie"), budget, 1)
    with pytest.raises(BadInput, match=r"no linear head"):
        budget_of(*paper("pgd_at"))


@pytest.mark.parametrize("name", ["random_probe", "random_probe_frozen"])
def test_a_cost_that_stretches_nothing_is_refused(budget, name):
    assert stretched(*paper(name), budget, 1).sets["finetune.epochs"] == budget.head
    with pytest.raises(BadInput, match=rf"cost = 4 changes nothing of {name}, which has a linear head alone"):
        stretched(*paper(name), budget, 4)


def test_a_log_of_no_known_kind_is_refused_at_reading(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('[[train]]\nrecipe = "rush"\ndataset = "digits"\nlog = "bogus"\n')
    with pytest.raises(BadInput, match=r"own\.toml: \[\[train\]\] 1: --log bogus is not known; give tensorboard"):
        check(jobs_of(str(path), tmp_path, no_images).values())
