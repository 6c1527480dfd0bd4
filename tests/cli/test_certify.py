"""`rush-bench certify`: models of a store, a network of one's own, reading back, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from rush_bench.certificates import check
from rush_bench.certificates.tsv import COLUMNS
from rush_bench.cli import main
from rush_bench.networks import build
from rush_bench.store import save_model

QUICK = ["--n", "20", "--n0", "10", "--draws", "300"]


@pytest.fixture
def certify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`certify` in a folder with `mine.npz` and a store of a Gaussian, a uniform and a deterministic model."""
    monkeypatch.chdir(tmp_path)
    rng, labels = np.random.default_rng(0), np.arange(40) % 5
    pixels = (labels[:, None, None] * 50 + rng.integers(0, 25, (40, 8, 8))).astype(np.uint8)
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}
    np.savez("mine.npz", **arrays, classes=np.array(list("abcde")))
    laws = {"gauss": {"law": "gaussian", "scale": 0.25}, "rush": {"law": "uniform", "scale": 0.3}, "plain": None}
    for name, noise in laws.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8})
        card = {"name": f"{name}-mine", "recipe": name, "dataset": "mine", "network": model.spec, "noise": noise}
        save_model(tmp_path / "models" / f"{name}-mine", card | {"votes": [1, 64] if noise else [0]}, model.state_dict())
    return lambda *args: CliRunner().invoke(main, ["certify", *map(str, args)])


def test_staged_models_of_a_store_then_read_back(certify) -> None:
    result = certify("gauss,rush", "--dataset", "mine.npz", *QUICK, "--mode", "staged", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["contradictions"] == []
    assert {(c["defense"], c["norm"], c["chunks_done"]) for c in said["certificates"]} == {
        ("gauss-mine", "l2", 2),
        ("rush-mine", "l1", 2),
    }
    assert all(c["n"] == 20 and len(c["certified"]) >= 3 for c in said["certificates"])
    assert Path("results/certificates/curve.png").stat().st_size > 1000
    assert not Path("results/runs").exists()  # certificates are no rows of the table of attacks

    folder = said["certificates"][0]["folder"]
    assert not Path(folder, "cohen.tsv").exists()  # its six columns cannot say that the mode stopped early
    again = certify("--read", folder, "--radius", "0.05", "--json")
    (read,) = json.loads(again.stdout)["certificates"].values()
    assert read["acr"] is None and read["lower_bounds"]  # it stopped early: its radii have no mean worth a name
    assert read["certified"][0]["accuracy"] > 0
    assert certify("gauss", "--dataset", "mine.npz", *QUICK, "--mode", "staged").exit_code == 0
    assert len(list(Path("results/certificates/runs").iterdir())) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_table_that_differs_is_exit_code_1(certify, tmp_path: Path) -> None:
    certify("gauss", "--dataset", "mine.npz", *QUICK)
    (file,) = tmp_path.rglob("cohen.tsv")
    assert file.read_text().splitlines()[0].split("\t") == list(COLUMNS)
    share = json.loads(certify("--read", file, "--radius", "0", "--json").stdout)["certificates"]["cohen.tsv"]["certified"][0]
    for accuracy, code in ((share["accuracy"], 0), (share["accuracy"] + 0.05, 1)):
        Path("reference.txt").write_text(f"radius\tbest_cert_accuracy\tbest_model\n0\t{accuracy}\tx\n")
        result = certify("--read", file, "--table", "reference.txt")
        assert result.exit_code == code, result.output
        assert f"1 lines compared with reference.txt, {code} differ" in result.stderr


@pytest.mark.usefixtures("undrawn")
def test_stopped_is_3_and_a_shard_waits_for_the_others(certify) -> None:
    stopped = certify("gauss", "--dataset", "mine.npz", *QUICK, "--max-minutes", "0")
    assert stopped.exit_code == 3 and "the same command continues" in stopped.stderr
    half = certify("gauss", "--dataset", "mine.npz", *QUICK, "--shard", "1/2")
    assert half.exit_code == 0 and "wait for the others" in half.stderr
    whole = certify("gauss", "--dataset", "mine.npz", *QUICK)
    assert whole.exit_code == 0 and "gauss-mine gaussian:0.25 l2 on mine, fixed" in whole.stdout


@pytest.mark.usefixtures("undrawn")
def test_a_network_of_ones_own(certify, tmp_path: Path) -> None:
    lines = [
        "import torch",
        "def build():",
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()",
    ]
    Path("own_certified_net.py").write_text("\n".join(lines))
    result = certify(
        "--model", "own_certified_net:build", "--noise", "uniform:0.3", "--dataset", "mine.npz", *QUICK, "--norm", "linf"
    )
    assert result.exit_code == 0, result.output
    assert "own_certified_net.build uniform:0.3 linf" in result.stdout


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", ["fixed", "staged"])
def test_a_certificate_of_another_alpha_says_so(certify, mode: str) -> None:
    given = ("gauss", "--dataset", "mine.npz", *QUICK, "--mode", mode)
    usual, loose = (certify(*given, "--alpha", alpha, "--json") for alpha in ("0.001", "0.25"))
    for result, said in ((usual, False), (loose, True)):
        (found,) = json.loads(result.stdout)["certificates"]
        key = Path(found["folder"]).name[:6]
        both = certify(*given, "--alpha", "0.25" if said else "0.001").stdout
        (row,) = (line for line in both.splitlines() if f"[{key}]" in line)
        assert (f"on mine, {mode}, alpha=0.25 [{key}]" in row) == said and (f"on mine, {mode} [{key}]" in row) != said


def test_an_attack_below_a_certificate_is_exit_code_1(certify, monkeypatch: pytest.MonkeyPatch) -> None:
    clash = check.Comparison("gauss@64", "pgd", "l2", 0.1, 64, 20, 0.9, 0.9, 0.1, 0.05)
    monkeypatch.setattr(check, "contradictions", lambda certificates, attacks: [clash])
    result = certify("gauss", "--dataset", "mine.npz", *QUICK)
    assert result.exit_code == 1 and "certificate above attack" in result.stderr and "10.00% right" in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "say what to certify"),
        (["gauss", "--model", "a:b"], "say what to certify"),
        (["gauss", "--noise", "gaussian:1"], "--noise without --model"),
        (["gauss", "--name", "mine"], "--name without --model"),
        (["--model", "a:b", "--noise", "gaussian:1"], "--model needs --dataset"),
        (["plain", "--dataset", "mine.npz"], "plain-mine is deterministic"),
        (["gaus", "--dataset", "mine.npz"], "did you mean 'gauss'"),
        (["gauss", "--mode", "quick"], "no value for mode named 'quick'; known: fixed, staged, target"),
        (["gauss", "--mode", "target"], "give one --radius"),
        (["gauss", "--mode", "target", "--radius", "5", "--dataset", "mine.npz"], "certify radii up to"),
        (["gauss", "--alpha", "2"], "alpha=2.0 must be a finite number, above 0 and below 1"),
        (["gauss", "--alpha", "0.5"], "alpha = 0.5: a bound that may be wrong for one image in 2 certifies nothing"),
        (["gauss", "--norm", "linf", "--dataset", "mine.npz"], "gaussian noise certifies l2"),
        (["gauss", "--table", "x"], "--table goes with --read"),
        (["gauss", "--read", "x"], "leave out the models"),
        (["--read", "nowhere.tsv"], "nowhere.tsv cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(certify, args: list[str], says: str) -> None:
    result = certify(*args)
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not Path("results").exists()
