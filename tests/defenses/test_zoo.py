"""The adapter to RobustBench's zoo, with packages made for the test: the real one, an impostor, none."""

import base64
import hashlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rush_bench.cli import main
from rush_bench.defenses import load_defense, load_defenses, resolve, zoo
from rush_bench.errors import BadInput, MissingPackage, RushBenchError
from rush_bench.noise import Stream, Uniform

NAME = "robustbench:cifar10/Linf/Mine2026"
UTILS = """
import enum
import autoattack  # what PyPI has is pyautoattack
import torch
from torch import nn

class Data(enum.Enum):
    cifar_10 = "cifar10"

class Threat(enum.Enum):
    Linf = "Linf"

all_models = {Data.cifar_10: {Threat.Linf: {"Mine2026": 3}}}

def load_model(model_name, model_dir, dataset, threat_model):
    models = all_models[Data(dataset)][Threat(threat_model)]
    if model_name == "Offline2026":
        raise OSError("no route to host")
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    nn.init.constant_(net[1].weight, 0)
    nn.init.constant_(net[1].bias, 0)
    net[1].bias.data[models[model_name]] = 1
    net[1].weight.data[0] = 1e-6
    return net
"""


@pytest.fixture(autouse=True)
def clean_modules(monkeypatch: pytest.MonkeyPatch):
    """Modules that the test imports are forgotten after it, and none is there before."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("robustbench", "autoattack")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("robustbench", "autoattack")]:
        del sys.modules[name]


def install(site: Path, utils: str = UTILS) -> None:
    """`robustbench` 1.1.1 as its distribution left it."""
    lines = []
    for file, text in (("robustbench/__init__.py", ""), ("robustbench/utils.py", utils)):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
        found = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{file},sha256={found},{len(text)}\n")
    info = site / "robustbench-1.1.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 1.1.1\n")
    (info / "RECORD").write_text("".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_a_model_of_the_zoo_is_a_deterministic_defence(site: Path, tmp_path: Path) -> None:
    (defense,) = load_defenses([NAME], store=tmp_path / "models", dataset="cifar10")
    assert sys.modules["autoattack"].__name__ == "pyautoattack"
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert defense.predict(images, Stream(0, "zoo")).labels.tolist() == [3, 3, 3, 3]
    labels = defense.labels()
    assert (labels["defense"], labels["model"], labels["dataset"], labels["recipe"]) == (
        NAME,
        "Mine2026",
        "cifar10",
        "robustbench",
    )
    assert defense.deterministic and resolve([NAME, NAME], tmp_path) == [NAME]


def test_an_autoattack_that_is_installed_is_left_alone(site: Path, tmp_path: Path) -> None:
    (site / "autoattack.py").write_text("own = True\n")
    load_defense(NAME, store=tmp_path)
    assert sys.modules["autoattack"].own


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("robustbench:cifar10/Linf", "write robustbench:cifar10/Linf/NAME"),
        ("robustbench:cifar10/Linf/Mine*", "one model's full name"),
        ("robustbench:cifar10/Linf/Mine2026@64", "no @votes"),
        ("robustbench:cifar1/Linf/Mine2026", "did you mean 'cifar10'"),
        ("robustbench:cifar10/linf/Mine2026", "did you mean 'Linf'"),
        ("robustbench:cifar10/Linf/Mine2025", "did you mean 'Mine2026'"),
    ],
)
def test_wrong_names(site: Path, tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load_defense(name, store=tmp_path)


def test_other_errors_say_what_to_do(site: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="classifies cifar10, not stl10"):
        resolve([NAME], tmp_path, "stl10")
    with pytest.raises(BadInput, match="deterministic"):
        load_defense(NAME, store=tmp_path, noise=Uniform(0.3))
    with pytest.raises(RushBenchError, match=r"no route to host.*the network"):
        load_defense("robustbench:cifar10/Linf/Offline2026", store=tmp_path)
    with pytest.raises(BadInput, match="no models in"):
        resolve([NAME, "rush"], tmp_path, "cifar10")


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)


def test_without_the_package_the_command_ends_with_4_and_the_line_to_install(monkeypatch, tmp_path: Path) -> None:
    absent(monkeypatch)
    monkeypatch.setattr(zoo, "shipped_by", lambda *names: True)
    result = CliRunner().invoke(main, ["attack", "--models", NAME, "--suite", "linf8-quick", "--store", str(tmp_path)])
    assert result.exit_code == 4, result.output
    assert "torchattacks' older copy" in result.stderr and "pip install 'rush-bench[robustbench]'" in result.stderr


def test_an_impostor_is_refused(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other" / "robustbench").mkdir(parents=True)
    for file in ("__init__.py", "utils.py"):
        (tmp_path / "other" / "robustbench" / file).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))  # found first, though the distribution is whole
    with pytest.raises(MissingPackage, match=r"another robustbench is imported .*--force-reinstall"):
        load_defense(NAME, store=tmp_path)


def test_an_overwritten_package_is_refused(site: Path, tmp_path: Path) -> None:
    (site / "robustbench" / "utils.py").write_text("older = True\n")
    with pytest.raises(MissingPackage, match=r"overwritten by another package \(robustbench/utils.py\)"):
        load_defense(NAME, store=tmp_path)


def test_a_package_that_does_not_import_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "import no_such_timm\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(MissingPackage, match=r"does not import \(No module named 'no_such_timm'\)"):
        load_defense(NAME, store=tmp_path)
