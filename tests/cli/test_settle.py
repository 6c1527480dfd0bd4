"""`settle`: plan, stop, finish, share, fail, contradict; on models of the store and on a network of one's own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rush_bench.attacks.control import RandomNoise
from rush_bench.audits.experiments import BUDGETS
from rush_bench.evaluation import runner
from rush_bench.records import load_results

SMALL = {"points": 2, "sweep": (1, 2), "steps": 2, "draws": 1, "sweep_steps": 2, "queries": (4,), "certificate": 200}


@pytest.fixture
def settle(rush_bench, but, store: Path, mine: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch):
    """`settle` at a budget that takes a moment."""
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **SMALL))

    def run(*args: object, models: str | None = "rush@1", only: str | None = "T0,T1"):
        usual = ["--budget", "quick", "--n", "10", "--repeats", "2", "--dataset", mine, *(["--only", only] if only else [])]
        return rush_bench("settle", *([models] if models else []), *but(usual, args))

    return run


def test_a_plan_says_the_cost_and_runs_nothing(settle) -> None:
    result = settle("--plan", only=None)
    assert result.exit_code == 0, result.output
    assert "rush-mine@1: about" in result.stderr
    assert not {"nan", "inf"} & set(result.stderr.split())
    for name in ("T0 random noise", "T1 draws of a gradient", "T15 as published", "T12 certificates in linf"):
        assert name in result.stderr
    assert not Path("results").exists()


def test_stopped_is_3_and_the_same_command_finishes(settle) -> None:
    stopped = settle("--max-minutes", "0", "--json")
    assert stopped.exit_code == 3 and "the same command continues" in stopped.stderr
    assert json.loads(stopped.stdout)["complete"] is False
    result = settle("--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["complete"] is True and said["failed"] == {} and said["contradictions"] == []
    trials = {(row["experiment"], row["trial"]): row for row in said["defenses"][0]["trials"]}
    assert set(trials) == {("T0", "2 random points"), ("T1", "m=1"), ("T1", "m=2")}
    assert all(row["low"] <= row["accuracy"] <= row["high"] and row["n"] == 10 for row in trials.values())
    files = {path.suffix for path in Path("results/settle").iterdir() if path.is_file()}
    assert files >= {".csv", ".md"}


def test_shards(settle) -> None:
    second = settle("--shard", "2/2", "--chunk", "5")
    assert second.exit_code == 0 and "wait for the others" in second.stderr
    first = settle("--shard", "1/2", "--chunk", "5")
    assert first.exit_code == 0 and "wait for" not in first.stderr
    assert all(result.complete for result in load_results(Path("results/settle")))


def test_a_failing_cell_is_1_and_the_others_go_on(settle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, *rest):
        raise ValueError("no such luck")

    monkeypatch.setattr(RandomNoise, "run", broken)
    result = settle("--json", only="T0,T1,T11")
    assert result.exit_code == 1 and "no such luck" in result.stderr
    said = json.loads(result.stdout)
    done = {row["experiment"]: row["accuracy"] is not None for row in said["defenses"][0]["trials"]}
    assert done == {"T0": False, "T1": True, "T11": False} and len(said["failed"]) == 2
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--only", "T99"), "no experiment named 'T99'"),
        (("--eps", "0"), "no radius"),
        (("--budget", "quik"), "did you mean 'quick'"),
        (("--shard", "3/2"), "--shard"),
        (("--noise", "uniform:0.3"), "--model"),
        (("--max-minutes", "-1"), "max-minutes"),
    ],
)
def test_wrong_usage_is_2(settle, args, says) -> None:
    result = settle(*args)
    assert result.exit_code == 2 and says in result.stderr
    assert not Path("results").exists()


def test_nothing_or_both_to_settle(settle) -> None:
    assert settle(models=None).exit_code == 2
    assert "say what to settle" in settle("--model", "a:b").stderr


def test_a_network_of_ones_own(settle, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mynets.py").write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    own = ("--model", "mynets:build")
    result = settle(*own, "--noise", "gaussian:0.2", "--votes", "3", "--json", models=None)
    assert result.exit_code == 0, result.output
    assert [each["defense"] for each in json.loads(result.stdout)["defenses"]] == ["mynets.build@3"]
    assert "needs --noise" in settle(*own, "--votes", "3", models=None).stderr


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch):
    """The scorer finds every prediction wrong from here on."""
    original = runner.score

    def score(*arguments):
        scored = original(*arguments)
        counts, wrong = np.zeros_like(scored["counts"]), (arguments[2].numpy() + 1) % scored["counts"].shape[1]
        counts[np.arange(len(wrong)), wrong] = scored["repeats"]
        return {**scored, "counts": counts, "correct": np.zeros_like(scored["correct"])}

    return lambda: monkeypatch.setattr(runner, "score", score)


SURE = "import torch\n\ndef build():\n    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))\n"
SURE += "    k = torch.arange(5.0)\n    net[1].weight.data = (1000 * k / 64)[:, None].repeat(1, 64)\n"
SURE += "    net[1].bias.data = -500 * ((50 * k + 12) ** 2) / 255 / 50\n    return net.eval()\n"


def test_a_contradiction_is_1_for_settle_attack_and_certify(
    settle, rush_bench, mine: Path, lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brightness tells the classes of these images apart, and noise averages out: all are certified, and a liar says broken."""
    Path("sure.py").write_text(SURE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    own = ("--model", "sure:build", "--noise", "gaussian:0.05", "--dataset", mine, "--n", "10")
    pgd = ("--suite", "linf8-quick", "--attacks", "clean,pgd", "--set", "pgd.steps=1", "--repeats", "2", "--votes", "3", *own)
    certified = rush_bench("certify", *own, "--draws", "500", "--n0", "20", "--json")
    assert certified.exit_code == 0, certified.output
    honest = rush_bench("attack", *pgd, "--out", "results", "--json")
    assert honest.exit_code == 0, honest.output
    assert json.loads(honest.stdout)["contradictions"] == []
    lying()
    for out in ("results", "elsewhere"):
        result = rush_bench("attack", *pgd, "--seed", "1", "--json", "--out", out)
        found = json.loads(result.stdout)["contradictions"]
        if out == "elsewhere":  # no certificate lies there
            assert result.exit_code == 0 and found == []
        else:
            assert result.exit_code == 1 and found and "one of them has a bug" in result.stderr
    again = rush_bench("certify", *own, "--draws", "500", "--n0", "20")
    assert again.exit_code == 1 and "one of them has a bug" in again.stderr
    settled = settle(*own, "--votes", "3", "--json", only="T10", models=None)
    assert settled.exit_code == 1 and json.loads(settled.stdout)["contradictions"]
    assert "one of them has a bug" in settled.stderr
