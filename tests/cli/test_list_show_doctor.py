"""`list`, `show`, `doctor`: names and what is behind them."""

import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from rush_bench import registry
from rush_bench.cli import common, doctor, main, show
from rush_bench.cli.doctor import BROKEN, OPTIONAL_MISSING, WORKS
from rush_bench.cli.explain import explained
from rush_bench.records import load_results
from rush_bench.settings import override, to_dict

ROOT = Path(__file__).parents[2]


def names(result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in json.loads(result.stdout):
        found.setdefault(row["kind"], []).append(row["name"])
    return found


def test_list_has_every_kind(rush_bench, store: Path, mine: Path, quick: list[str]) -> None:
    assert rush_bench("attack", *quick, "--models", "plain", "--dataset", mine).exit_code == 0
    found = names(rush_bench("list", "--json"))
    assert found["defenses"] == list(registry.recipes.entries) and "rush" in found["defenses"]
    assert {"cifar10", "cifar100", "digits", "stl10"} <= set(found["datasets"])
    assert {"clean", "pgd", "eot", "aa"} <= set(found["attacks"])
    assert found["models"] == ["plain-mine", "rush-mine"]
    assert "linf8" in found["suites"] and len(found["results"]) == 5
    text = rush_bench("list").stdout
    assert all(name in text for group in found.values() for name in group)


@pytest.mark.parametrize("kind", ["defences", "recipes"])
def test_other_words_for_defenses(rush_bench, kind: str) -> None:
    assert "rush" in rush_bench("list", kind).stdout


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": 3}'])
def test_a_bad_card_does_not_hide_the_others(rush_bench, store: Path, content: str) -> None:
    (store / "plain-mine" / "card.json").write_text(content)
    result = rush_bench("list", "models")
    assert result.exit_code == 0
    assert "unreadable card" in result.stdout and "rush on mine" in result.stdout


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"labels": []}'])
def test_a_bad_record_does_not_hide_the_others(rush_bench, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "results" / "runs" / "abc"
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(content)
    result = rush_bench("list", "results")
    assert result.exit_code == 0 and "unreadable record" in result.stdout


@pytest.mark.parametrize(
    "name", ["rush", "simclr", "digits", "cifar10", "stl10", "linf8", "l2-0.25-quick", "pgd", "aa", "plain-mine"]
)
def test_show_of_every_kind(rush_bench, store: Path, name: str) -> None:
    said = json.loads(rush_bench("show", name, "--json").stdout)
    assert said["name"] == name
    text = rush_bench("show", name)
    assert text.exit_code == 0 and f"{said['kind']} {name}" in text.stdout


def test_show_of_a_suite_has_the_settings_that_run(rush_bench) -> None:
    said = json.loads(rush_bench("show", "linf25.5-quick", "--json").stdout)
    assert (said["norm"], said["eps"], said["columns"]["pgd"]["steps"]) == ("linf", pytest.approx(0.1), 10)


def test_show_of_a_result(rush_bench, store: Path, mine: Path, quick: list[str]) -> None:
    assert rush_bench("attack", *quick, "--models", "plain", "--dataset", mine).exit_code == 0
    name = names(rush_bench("list", "results", "--json"))["results"][0]
    said = json.loads(rush_bench("show", name, "--json").stdout)
    assert said["chunks_done"] == 1 and said["labels"][0]["defense"] == "plain-mine"
    (cell,) = [cell for cell in load_results(Path("results")) if cell.folder.name == name]
    (accuracy,) = said["accuracies"].values()
    assert accuracy.startswith(f"{100 * cell.frame['correct'].mean():.1f} [") and accuracy in rush_bench("show", name).stdout
    wrong = rush_bench("show", name[:-1] + "x", "--kind", "result")
    assert wrong.exit_code == 2 and f"did you mean {name!r}" in wrong.stderr


@pytest.mark.parametrize("entry", [e for e in registry.attacks.entries.values() if e.entry_point is None], ids=lambda e: e.name)
def test_what_is_read_of_an_attack_is_what_it_is(entry: registry.Entry) -> None:
    made = registry.attacks.load(entry.name)()
    assert show._attack(entry.name) == (to_dict(made), explained(made))


@pytest.mark.parametrize("kind", ["recipes", "attacks"])
def test_every_setting_is_explained(kind: str) -> None:
    known = getattr(registry, kind)
    for name, entry in known.entries.items():
        made = known.load(name)
        settings = made.settings if kind == "recipes" else made()
        if entry.entry_point is None and dataclasses.is_dataclass(settings):
            assert [key for key, line in explained(settings).items() if not line] == [], name


def test_one_word_of_several_meanings_is_explained_by_its_group() -> None:
    lines = explained(registry.recipes.load("pgd_at").settings)
    assert lines["train.padding"].startswith("pixels of black border") and "first convolution" in lines["network.padding"]
    assert lines["train.select_every"] == "epochs between validations" and lines["attack.step"].endswith("in pixel units")
    pgd = explained(registry.attacks.load("pgd")())
    assert pgd["select_every"] == "steps between two judgements" and "a share of eps" in pgd["step"]


def test_settings_of_a_card_have_no_empty_column(rush_bench, store: Path) -> None:
    model, recipe = (rush_bench("show", name).stdout.partition("settings")[2] for name in ("plain-mine", "standard"))
    assert "value" in model and "what it is" not in model and "what it is" in recipe


def test_a_setting_that_presets_differ_in_says_so(rush_bench) -> None:
    text = rush_bench("show", "rush").stdout
    assert "paper 1000, short 100, smoke 2, demo 15" in text and "passes over the training images" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("attack --models plain-mine,ru", "plain-mine,rush-mine"),
        ("attack --suite l2", "l2-0.5"),
        ("train si", "simclr"),
        ("train rush --dataset di", "digits"),
        ("show linf8-", "linf8-quick"),
        ("list exp", "experiments"),
        ("figure eps,wat", "eps,waterfall"),
        ("compare n", "net"),
    ],
)
def test_the_shell_completes_names(rush_bench, store: Path, line: str, expected: str) -> None:
    cell = Path("results/runs/0123456789abcdef/cell.json")
    cell.parent.mkdir(parents=True)
    cell.write_text('{"labels": [{"defense": "net"}]}')
    *words, last = line.split()
    found = ShellComplete(main, {}, "rush-bench", "_RUSH_BENCH_COMPLETE").get_completions(words, last)
    assert expected in [item.value for item in found]


def test_shown_settings_feed_back(rush_bench) -> None:
    presets = json.loads(rush_bench("show", "rush", "--json").stdout)["presets"]
    recipe = registry.recipes.load("rush")
    assert override(recipe.settings, presets["smoke"]) == override(recipe.settings, recipe.presets["smoke"])
    assert presets["paper"]["pretrain"]["epochs"] == 1000


def test_one_name_of_two_kinds_is_told(rush_bench, store: Path) -> None:
    (store / "rush-mine").rename(store / "rush")
    result = rush_bench("show", "rush")
    assert "defense rush" in result.stdout and "also the name of a model" in result.stderr
    model = rush_bench("show", "rush", "--kind", "model")
    assert "model rush" in model.stdout and model.stderr == ""


@pytest.mark.parametrize("kind", ["modle", "models", "model"])
def test_show_with_a_wrong_kind_or_name(rush_bench, store: Path, kind: str) -> None:
    result = rush_bench("show", "plain-mien", "--kind", kind)
    assert result.exit_code == 2
    assert ("did you mean 'models'" if kind == "modle" else "did you mean 'plain-mine'") in result.stderr


def test_doctor_finds_what_is_here(
    rush_bench, store: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "together", lambda codes: doctor.devices())  # which starts a process
    (tmp_path / "data").mkdir()
    mine.rename(tmp_path / "data" / "cifar10.npz")
    result = rush_bench("doctor", "--json")
    checks = {check["what"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0, result.output
    assert all(checks[name]["state"] == WORKS for name in ("torch", "torchvision", "cpu", "models", "results", "digits"))
    assert checks["cifar10"]["finding"].endswith("cifar10.npz")
    assert checks["stl10"]["state"] == OPTIONAL_MISSING and "downloaded" in checks["stl10"]["finding"]
    assert checks["torch"]["finding"] == importlib.metadata.version("torch")


@pytest.mark.parametrize("text", ["pip install 'rush-bench[torchattacks]'", "net[v2]", "[bold]", "net[/]", "net\\", ":x:"])
def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    common.print_rows(f"of {text}", [f"what {text}", "finding"], [["first", text], [text, "last"]])
    said = capsys.readouterr().out
    assert said.count(text) == 4 and f"of {text}" in said


def test_doctor_says_what_to_install(rush_bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "together", lambda codes: None)
    monkeypatch.setattr(doctor, "try_import", lambda code: "ImportError: no [such] name")
    monkeypatch.setattr(doctor, "OPTIONAL", {"click": ("", "pip install 'rush-bench[click]'")})
    said = rush_bench("doctor").stdout
    assert "no [such] name; pip install 'rush-bench[click]'" in said


def test_doctor_shows_a_folder_that_cannot_be_written(rush_bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "together", lambda codes: [])
    Path("results").write_text("a file")
    result = rush_bench("doctor")
    assert result.exit_code == 1 and "results cannot be written" in result.stdout


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages: `robustbench` as its distribution left it, `torchattacks` that brings a copy of it."""
    site = tmp_path / "site"
    record = "robustbench/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n"  # of nothing
    for name, files in (("robustbench", record), ("torchattacks", "torchattacks/__init__.py,,\nrobustbench/__init__.py,,\n")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("")
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(files)
    monkeypatch.syspath_prepend(str(site))
    return site


def check_robustbench(code: str = "pass") -> doctor.Check:
    return doctor.optional("robustbench", code, "pip install robustbench", doctor.try_import)


def test_an_optional_package_that_works(site: Path) -> None:
    assert check_robustbench() == doctor.Check("robustbench", WORKS, "1.0, usable")


def test_an_optional_package_that_another_overwrote(site: Path) -> None:
    (site / "robustbench" / "__init__.py").write_text("older = True\n")
    check = check_robustbench()
    assert check.state == OPTIONAL_MISSING and "overwritten" in check.finding and "--force-reinstall" in check.finding


def test_an_optional_package_that_does_not_import(site: Path) -> None:
    check = check_robustbench("import no_such_package")
    assert check.state == OPTIONAL_MISSING and "No module named 'no_such_package'; pip install" in check.finding


def test_an_optional_package_that_is_not_there(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (site / "robustbench-1.0.dist-info").iterdir():
        path.unlink()
    (site / "robustbench-1.0.dist-info").rmdir()
    check = check_robustbench()
    assert check.state == OPTIONAL_MISSING and "torchattacks' older copy" in check.finding


def test_a_needed_package_that_is_missing_or_broken() -> None:
    assert doctor.required("no-such-package", lambda code: None).state == BROKEN
    check = doctor.required("torchvision", lambda code: "RuntimeError: operator torchvision::nms does not exist")
    assert check.state == BROKEN and "nms" in check.finding and "constraints.txt" in check.finding


def test_an_import_is_tried() -> None:
    assert doctor.try_import("import json") is None
    assert "no_such_package" in (doctor.try_import("import no_such_package") or "")


def forked(code: str) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter does; torch, which takes seconds to import, is there already."""

    def work() -> None:
        with Path("said").open("w") as said, contextlib.redirect_stdout(said):
            exec(code, {})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return subprocess.CompletedProcess([], process.exitcode, Path("said").read_text(), "")


@pytest.mark.parametrize("loads", [True, False])
def test_torchvision_loads_its_operators_beside_this_torch(loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = ""
    if not loads:  # as one of another torch answers
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision/__init__.py").touch()
        (tmp_path / "torchvision/extension.py").write_text("def _assert_has_ops(): raise RuntimeError('no operators')\n")
        before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        before += "for name in [name for name in sys.modules if name.startswith('torchvision')]: del sys.modules[name]\n"
    done = forked(f"{before}{doctor.OPERATORS}print('torchvision' in sys.modules)")
    assert (done.returncode, done.stdout) == ((0, "False\n") if loads else (1, ""))


def test_imports_are_tried_together_with_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in ("print('hello')", "import no_such_package"):
        first, second = doctor._run(code), forked(code)
        assert (first.stdout, first.returncode) == (second.stdout, second.returncode)
    monkeypatch.setattr(doctor, "_run", forked)
    found = doctor.together(["print('hello')", "import json"])
    assert found is not None and [check.what for check in found] == [check.what for check in doctor.devices()]
    assert doctor.together(["import no_such_package"]) is None


def test_an_import_that_hangs_is_told() -> None:
    assert doctor.try_import("import time; time.sleep(60)", timeout=0.2) == "no answer in 0 s"


def test_the_needed_packages_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [f"{line}; extra == 'dev'" for line in project["optional-dependencies"]["dev"]]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert {"torch", "torchvision", "click", "pyautoattack"} <= set(doctor.requirements())
    assert "pytest" not in doctor.requirements()
