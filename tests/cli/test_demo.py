"""`demo`, shortened: what it leaves, and that it resumes."""

import struct
from pathlib import Path

import pandas as pd
import pytest

import rush_bench.training
from rush_bench.cli import demo

TINY = ["network.name=resnet", "network.blocks=1", "network.width=4", "n_train=64", "pretrain.epochs=1", "finetune.epochs=1"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with one epoch, twelve images and only the columns that the table and the pictures need."""
    real = rush_bench.training.train
    monkeypatch.setattr(rush_bench.training, "train", lambda recipe, **options: real(recipe, sets=TINY, **options))
    monkeypatch.setattr(demo, "COLUMNS", ("clean", "pgd"))
    monkeypatch.setattr(demo, "FEWER", {})
    monkeypatch.setattr(demo, "IMAGES", 12)


@pytest.mark.usefixtures("short")
def test_demo_stops_resumes_and_leaves_table_and_pictures(rush_bench) -> None:
    stopped = rush_bench("demo", "--max-minutes", "0")
    assert (stopped.exit_code, stopped.stdout) == (3, "") and "the same command" in stopped.stderr

    result = rush_bench("demo")
    assert result.exit_code == 0, result.output
    out = Path("results/demo")
    assert str(out) in result.stderr and "rush-digits@64" in result.stdout
    table = pd.read_csv(out / "table.csv")
    assert set(table["defense"]) == {"simclr-digits", "rush-digits@1", "rush-digits@64"}
    suites = {f"{name}-quick without eot, apgd, square" for name in ("linf8", "linf25.5")}
    assert set(table["suite"]) == suites and len(table) == 6
    assert table["pgd"].notna().all() and (table["n"] == 12).all()
    assert "rush-digits@64" in (out / "table.md").read_text()
    for name in ("robust_accuracy.png", "images.png"):
        content = (out / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and width > 400 and height > 300
    assert sorted(path.name for path in (out / "models").iterdir()) == ["encoders", "rush-digits", "simclr-digits"]

    written = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.npz")}
    assert len(written) == 15  # of three defences: one clean cell each, PGD and worst at two eps
    assert rush_bench("demo").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.npz")} == written


@pytest.mark.usefixtures("short")
def test_a_cell_that_fails_is_told(rush_bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from rush_bench.attacks.pgd import PGD

    monkeypatch.setattr(PGD, "run", lambda self, defense, images, labels, threat, stream: images * float("nan"))
    result = rush_bench("demo")
    assert result.exit_code == 1 and "pgd" in result.stderr and not Path("results/demo/table.csv").exists()
