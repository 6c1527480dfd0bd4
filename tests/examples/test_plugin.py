"""The example plug-in, found by its entry points as if it were installed."""

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import rush_bench as rb
from rush_bench import registry
from rush_bench.attacks.suites import parse_suite
from rush_bench.cli import main
from rush_bench.defenses import Deterministic
from rush_bench.evaluation.runner import attack

EXAMPLE = Path(__file__).parents[2] / "examples" / "rush-bench-plugin"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an installation leaves: the package on the path, and a dist-info with the entry points of its pyproject."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / "rush_bench_plugin-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for kind in ("recipes", "attacks", "datasets"):  # they read the entry points once
        monkeypatch.setitem(getattr(registry, kind).__dict__, "entries", registry.Registry(kind).entries)
    yield
    for name in [name for name in sys.modules if name.startswith("rush_bench_plugin")]:
        del sys.modules[name]


def test_both_are_listed_with_the_package_they_come_from(installed: None) -> None:
    for kind, name in (("attacks", "fgsm"), ("defenses", "mixup")):
        rows = json.loads(CliRunner().invoke(main, ["list", kind, "--json"]).stdout)
        assert {row["name"]: row["summary"] for row in rows}[name] == "plug-in from rush-bench-plugin"
    shown = CliRunner().invoke(main, ["show", "mixup", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["presets"]["paper"]["train"]["epochs"] == 200


def test_the_attack_is_exact_on_a_linear_network(installed: None, linear, grey, worst_margin, tmp_path: Path) -> None:
    """FGSM with a margin loss against the one other class that can win: the closed form of a linear network."""
    eps = 4 / 255
    defense = Deterministic(linear, shape=(1, 4, 4), name="linear")
    suite = parse_suite("linf4-quick", only=("clean", "fgsm"), overrides={"fgsm.loss": "margin"})
    run = attack([defense], suite, grey, out=tmp_path, quiet=True)
    assert run.failed == {}
    table = run.table()
    assert 0 < table["fgsm"].item() < table["clean"].item() == 100  # every finished estimate is a column
    frame = next(result.frame for result in run.results if result.labels["attack"] == "fgsm")
    images = grey.floats()
    bound = worst_margin(linear, images, grey.labels, "linf", eps)
    right = torch.tensor((frame.correct == frame.repeats).to_numpy())
    assert bool(right[bound > 0].all()), "where no attack exists none may be found"
    # one step of the margin goes for the best other class, which is the nearest for most images
    assert int((~right).sum()) >= 0.8 * int((bound <= 0).sum()) > 0


def test_the_recipe_trains_by_the_command(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["train", "mixup", "--dataset", "digits", "--preset", "smoke", "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert (card["name"], card["recipe"], card["protocol"]) == ("mixup-digits", "mixup", "supervised")
    wrong = CliRunner().invoke(main, [*line, "--name", "other", "--set", "alpha=0.2"])
    assert wrong.exit_code == 2 and "alpha=1 only" in wrong.stderr


def test_the_loss_is_equation_1(installed: None) -> None:
    """Cross-entropy is linear in the labels: the loss of a batch, drawn again by hand from the same generator."""
    from rush_bench_plugin.mixup import MixupSettings, MixupStage

    from rush_bench.settings import override
    from rush_bench.training.stage import Batch, Context

    network = rb.networks.build({"name": "tiny", "classes": 10, "channels": 1, "size": 16})
    images = rb.load_dataset("digits", "train", n=20)
    settings = override(MixupSettings(), {"train.augment": "none", "precision": "float32"})
    stage = MixupStage(Context(network, settings, {"train": images, "val": images}, 0), settings.train).eval()
    batch = Batch(images, torch.arange(20), torch.Generator().manual_seed(3), 0, 0)
    loss = stage.loss(batch)
    generator = torch.Generator().manual_seed(3)
    other, lam = torch.randperm(20, generator=generator), torch.rand((), generator=generator)
    soft = torch.nn.functional.one_hot(images.labels, 10).float()
    x = images.floats()
    logits = network(lam * x + (1 - lam) * x[other])
    expected = torch.nn.functional.cross_entropy(logits, lam * soft + (1 - lam) * soft[other])
    assert torch.allclose(loss, expected, atol=1e-5)


def test_a_name_that_exists_is_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("pgd", "rush_bench_plugin.fgsm:FGSM", "rush_bench.attacks")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(rb.errors.BadInput, match="registers 'pgd', which exists; rename"):
        _ = registry.Registry("attacks").entries
