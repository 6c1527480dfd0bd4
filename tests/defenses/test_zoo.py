"""The adapter to RobustBench's zoo, with packages made for the test: the real one, an impostor, none."""

import argparse
import base64
import hashlib
import importlib.metadata
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rush_bench.cli import main
from rush_bench.defenses import load_defense, load_defenses, resolve, zoo
from rush_bench.errors import BadInput, MissingPackage, RushBenchError
from rush_bench.noise import Stream, Uniform
from rush_bench.records.published import published

NAME = "robustbench:cifar10/Linf/Mine2026"
UTILS = """
import enum
import autoattack  # what PyPI has is pyautoattack
import torch
from pathlib import Path
from torch import nn

class Data(enum.Enum):
    cifar_10 = "cifar10"

class Threat(enum.Enum):
    Linf = "Linf"

class NoSuchLink(Exception):  # as gdown's, which is no OSError
    pass

def linear(width=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width))

class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList([linear(), linear()])

    def forward(self, x):
        return sum(model(x).softmax(1) for model in self.models) / 2

all_models = {Data.cifar_10: {Threat.Linf: {
    "Mine2026": {"model": linear, "gdrive_id": "one"},
    "Rebuffi2021Fixing_70_16_cutmix_extra": {"model": linear, "gdrive_id": "two"},
    "Chen2020Adversarial": {"model": Ensemble, "gdrive_id": ["a", "b"]},
}}}

def read(path):
    if not path.is_file():
        raise NoSuchLink("Cannot retrieve the public link of the file.")
    return torch.load(path, map_location="cpu")["state_dict"]

def load_model(model_name, model_dir, dataset, threat_model):
    data, threat = Data(dataset), Threat(threat_model)
    spec = all_models[data][threat][model_name]
    path, net = Path(model_dir) / data.value / threat.value / f"{model_name}.pt", spec["model"]()
    if isinstance(spec["gdrive_id"], list):
        for i, model in enumerate(net.models):
            model.load_state_dict(read(path.with_name(f"{path.name}_m{i}.pt")))
    else:
        net.load_state_dict(read(path))
    return net.eval()
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


def put(store: Path, file: str, content: dict | None = None) -> Path:
    """A file of weights where RobustBench looks for it: by default of a linear network that says 3."""
    path = store / "robustbench" / "cifar10" / "Linf" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"1.weight": torch.zeros(10, 3072), "1.bias": torch.nn.functional.one_hot(torch.tensor(3), 10).float()}
    weights["1.weight"][0] = 1e-6
    torch.save({"state_dict": weights} if content is None else content, path)
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for file in ("Mine2026.pt", "Rebuffi2021Fixing_70_16_cutmix_extra.pt"):
        put(tmp_path / "models", file)
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
    assert (labels["protocol"], labels["extra_data"], labels["architecture"]) == (
        "see RobustBench (Linf)",
        "see RobustBench",
        "Sequential",
    )
    assert defense.deterministic and resolve([NAME, NAME], tmp_path) == [NAME]


TABLE1 = {  # block and footnote of a Data AUG row of the RUSH paper's Table 1: its entry in the zoo
    ("CIFAR-10", "1"): "Rebuffi2021Fixing_R18_ddpm",
    ("CIFAR-10", "2"): "Rebuffi2021Fixing_70_16_cutmix_extra",
    ("CIFAR-100", "1"): "Rebuffi2021Fixing_R18_ddpm",
    ("CIFAR-100", "2"): "Rebuffi2021Fixing_70_16_cutmix_ddpm",
}


def test_what_a_table_must_show_of_the_data_aug_rows(site: Path, tmp_path: Path) -> None:
    defense = load_defense("robustbench:cifar10/Linf/Rebuffi2021Fixing_70_16_cutmix_extra", store=tmp_path / "models")
    labels = defense.labels()
    facts = ("supervised (Linf)", "80M Tiny Images", "WideResNet-70-16")
    assert (labels["protocol"], labels["extra_data"], labels["architecture"]) == facts
    rows = {(row.block, row.footnotes[0]): row for row in published().table1 if row.method.startswith("Data AUG")}
    assert set(rows) == set(TABLE1)
    for place, name in TABLE1.items():
        row, (protocol, extra_data, architecture) = rows[place], zoo.ABOUT[name]
        assert row.protocol and row.protocol.value == protocol
        assert row.architecture and row.architecture.value == architecture
        assert row.extra_data and extra_data and row.extra_data.value in extra_data


def test_an_ensemble_that_averages_probabilities(site: Path, tmp_path: Path) -> None:
    """Chen2020Adversarial returns means of softmax: its loss is the log of those, without a second softmax."""
    name = "robustbench:cifar10/Linf/Chen2020Adversarial"
    flat = {"1.weight": torch.zeros(10, 3072), "1.bias": torch.zeros(10)}
    put(tmp_path, "Chen2020Adversarial.pt_m0.pt")
    put(tmp_path, "Chen2020Adversarial.pt_m1.pt", {"state_dict": flat})
    defense = load_defense(name, store=tmp_path)
    three = (math.e / (math.e + 9) + 0.1) / 2  # e^1 against nine times e^0, and one in ten
    got = defense.predict(torch.zeros(1, 3, 32, 32), Stream(0, "zoo")).probabilities
    assert float(got[0, 3]) == pytest.approx(three, abs=1e-6)
    labels = defense.labels()
    facts = ("AFF (Linf)", None, "3 x ResNet-50 (pre-activation)")
    assert (labels["protocol"], labels["extra_data"], labels["architecture"]) == facts


def test_an_autoattack_that_is_installed_is_left_alone(site: Path, tmp_path: Path) -> None:
    (site / "autoattack.py").write_text("own = True\n")
    load_defense(NAME, store=tmp_path / "models")
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
    with pytest.raises(BadInput, match="no models in"):
        resolve([NAME, "rush"], tmp_path, "cifar10")


@pytest.mark.parametrize(
    ("model", "there", "says"),
    [
        ("Mine2026", [], r"Cannot retrieve .*\); where no download gets through.*uc\?id=one as .*Linf/Mine2026\.pt$"),
        ("Chen2020Adversarial", [], r"id=a as .*\.pt_m0\.pt, .*id=b as .*\.pt_m1\.pt$"),
        ("Chen2020Adversarial", ["Chen2020Adversarial.pt_m0.pt"], r"by hand: [^,]*id=b as .*\.pt_m1\.pt$"),
    ],
)
def test_absent_weights_are_named_with_their_place(site: Path, tmp_path: Path, model: str, there: list[str], says: str) -> None:
    for file in there:
        put(tmp_path, file)
    with pytest.raises(RushBenchError, match=says):
        load_defense(f"robustbench:cifar10/Linf/{model}", store=tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>quota exceeded</html>", {"state_dict": {}, "args": argparse.Namespace()}, {"state_dict": {}}]
)
def test_weights_that_cannot_be_read(site: Path, tmp_path: Path, content: bytes | dict) -> None:
    path = put(tmp_path, "Mine2026.pt", {} if isinstance(content, bytes) else content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(RushBenchError, match=r"cannot be loaded \(.+\); delete .*Mine2026\.pt to download") as caught:
        load_defense(NAME, store=tmp_path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.skipif(not list(importlib.metadata.distributions(name="robustbench")), reason="robustbench is not installed")
@pytest.mark.filterwarnings("ignore")  # its own, of old names in timm
def test_the_real_package_has_the_rows_of_data_aug_and_they_load(tmp_path: Path) -> None:
    utils = zoo.real_robustbench()
    rebuffi = {name for name in zoo.entries(utils, "cifar10", "Linf") if name.startswith("Rebuffi2021Fixing")}
    assert rebuffi == {name for name in zoo.ABOUT if name.startswith("Rebuffi2021Fixing")}
    for (block, _), name in TABLE1.items():
        assert name in zoo.entries(utils, block.lower().replace("-", ""), "Linf")
    network = zoo.entries(utils, "cifar10", "Linf")["Rebuffi2021Fixing_R18_ddpm"]["model"]().eval()
    put(tmp_path, "Rebuffi2021Fixing_R18_ddpm.pt", network.state_dict())
    defense = load_defense("robustbench:cifar10/Linf/Rebuffi2021Fixing_R18_ddpm", store=tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = defense.predict(images, Stream(0, "zoo")).probabilities
    with torch.no_grad():
        torch.testing.assert_close(got, network(images).softmax(1), atol=1e-5, rtol=1e-4)


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
