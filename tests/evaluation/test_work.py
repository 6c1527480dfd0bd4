"""The loop, for each of the four kinds that it works off: guard, bad cell, shard, resume, deadline."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rush_bench.attacks.suites import parse_suite
from rush_bench.audits import run as audits
from rush_bench.audits.finding import Finding
from rush_bench.certificates import Sampling
from rush_bench.datasets import as_images
from rush_bench.datasets.corruptions import CorruptedImages, load_corrupted
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation import attack, certify, corruptions
from rush_bench.evaluation.work import Run
from rush_bench.threats import Threat

CIFAR = (3, 32, 32)


class Net(nn.Module):
    """Ten classes by the mean of a few pixels. `edit` is code without weights: what a user changes between two runs."""

    edit = staticmethod(lambda z: z)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 10, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(10 * torch.randn(10, 48, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: Tensor) -> Tensor:
        return type(self).edit(self.linear(images[:, :, ::8, ::8].flatten(1)))


class Broken(Net):
    """One whose predictions raise."""

    broken = False
    error: Exception = ZeroDivisionError("no such luck")

    def forward(self, images: Tensor) -> Tensor:
        if type(self).broken:
            raise type(self).error
        return super().forward(images)


@pytest.fixture(autouse=True)
def unedited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "edit", staticmethod(lambda z: z))
    monkeypatch.setattr(Broken, "broken", False)


@pytest.fixture
def corrupted(tmp_path: Path) -> CorruptedImages:
    folder, draw = tmp_path / "data" / "CIFAR-10-C", np.random.default_rng(0)
    folder.mkdir(parents=True)
    np.save(folder / "fog.npy", draw.integers(0, 256, (60, *CIFAR[1:], 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(12) % 10, 5))
    return load_corrupted("cifar10", ("fog",), data_dir=tmp_path / "data")


def smooth(net: type[Net], name: str, seed: int = 0) -> Smoothed:
    return Smoothed(net(seed).eval(), noise="gaussian:0.1", votes=2, name=name, shape=CIFAR)


@dataclass
class Kind:
    """`run(defenses, out, shard=, minutes=)` gives what failed and whether it is done; `found(out)` what lies there."""

    run: Callable[..., tuple[dict[str, str], bool]]
    found: Callable[[Path], dict[str, Any]]
    pieces: int  # files that one defence's cells come to


@pytest.fixture(params=["attack", "corruption", "certificate", "probe"])
def kind(request: pytest.FixtureRequest, corrupted: CorruptedImages, monkeypatch: pytest.MonkeyPatch) -> Kind:
    images = corrupted.images("fog", 1)
    data = as_images(images.pixels, images.labels, classes=list("abcdefghij"), name="noise")
    suite = parse_suite("linf8-quick", only=("clean", "pgd"), overrides={"pgd.steps": 1})

    def told(run: Run) -> tuple[dict[str, str], bool]:
        return run.failed, run.done

    def measure(call: Callable[..., Run], *args: Any) -> Callable[..., tuple[dict[str, str], bool]]:
        return lambda defenses, out, shard=(1, 1), minutes=None: told(
            call(defenses, *args, out=out, shard=shard, max_minutes=minutes, quiet=True, chunk=5)
        )

    def probe(
        defenses: list[Defense], out: Path, shard: tuple[int, int] = (1, 1), minutes: float | None = None
    ) -> tuple[dict[str, str], bool]:
        failed: dict[str, str] = {}
        deadline = Deadline.after(minutes)
        found = audits.probe(
            defenses, data, Threat("linf", 0.1), out, shard=shard, deadline=deadline, failed=failed, quiet=True
        )
        return failed, set(found) == {defense.name for defense in defenses}

    def look(name: str) -> Callable[..., list[Finding]]:
        def looked(defense: Defense, images: Tensor, *rest: Any) -> list[Finding]:
            clean = float(defense.predict(images, rest[-1]).probabilities.max())
            return [Finding(name, "w", clean, 0.0, "<=", "s", "pass")]

        return looked

    for name in ("flags", "truth", "indicators", "binarization"):
        monkeypatch.setattr(audits, name, look(name))

    def arrays(out: Path) -> dict[str, Any]:
        found = {}
        for path in out.rglob("chunk-*.npz"):
            with np.load(path) as file:
                found[f"{path.parent.name}/{path.name}"] = {k: file[k].tobytes() for k in file.files if k != "seconds"}
        return found

    return {
        "attack": Kind(measure(attack, suite, data), arrays, 3 * 3),
        "corruption": Kind(measure(corruptions.evaluate, corrupted), arrays, 5 * 3),
        "certificate": Kind(measure(certify, data, Sampling(draws=20, selection=5, alpha=0.1)), arrays, 3),
        "probe": Kind(probe, lambda out: {p.name: p.read_text() for p in out.glob("audit/probes/*.json")}, 4),
    }[request.param]


def test_the_same_call_again_makes_nothing(kind: Kind, tmp_path: Path) -> None:
    defense = smooth(Net, "net")
    assert kind.run([defense], tmp_path / "out") == ({}, True)
    assert len(kind.found(tmp_path / "out")) == kind.pieces
    passes, files = defense.passes.forwards, {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert kind.run([smooth(Net, "net"), defense][1:], tmp_path / "out") == ({}, True)
    assert defense.passes.forwards == passes
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == files


def test_other_code_of_the_same_weights_is_refused(kind: Kind, tmp_path: Path, monkeypatch) -> None:
    kind.run([smooth(Net, "net")], tmp_path / "out")
    before = kind.found(tmp_path / "out")
    for edit in (lambda z: z.flip(1), lambda z: z * 0.2, lambda z: z + z.detach() - z):
        monkeypatch.setattr(Net, "edit", staticmethod(edit))
        with pytest.raises(BadInput, match=r"net does not do what .net. did.*--out"):
            kind.run([smooth(Net, "net")], tmp_path / "out")
        assert kind.found(tmp_path / "out") == before
    assert kind.run([smooth(Net, "net")], tmp_path / "other") == ({}, True)


def test_a_defence_that_raises_fails_alone(kind: Kind, tmp_path: Path, monkeypatch) -> None:
    bad, good = smooth(Broken, "bad", seed=1), smooth(Net, "good")
    monkeypatch.setattr(Broken, "broken", True)
    failed, _ = kind.run([bad, good], tmp_path / "out")
    assert failed and all(label.startswith("bad ") for label in failed)
    assert all("no such luck" in reason or "needs bad" in reason for reason in failed.values())
    assert len(kind.found(tmp_path / "out")) == kind.pieces  # the good one's
    monkeypatch.setattr(Broken, "broken", False)
    assert kind.run([bad, good], tmp_path / "out")[0] == {}
    assert len(kind.found(tmp_path / "out")) == 2 * kind.pieces


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZeroDivisionError("no such luck"), "ZeroDivisionError: no such luck"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            "out of memory (CUDA out of memory); attack with a smaller --memory",
        ),
    ],
)
def test_old_numbers_of_a_defence_that_raises_now_are_not_given(kind: Kind, tmp_path: Path, monkeypatch, error, says) -> None:
    bad = smooth(Broken, "bad")
    kind.run([bad], tmp_path / "out")
    monkeypatch.setattr(Broken, "broken", True)
    monkeypatch.setattr(Broken, "error", error)
    failed, _ = kind.run([bad], tmp_path / "out")
    assert failed and all(says in reason for reason in failed.values())


def test_shards_and_stops_leave_the_same_bits(kind: Kind, tmp_path: Path) -> None:
    kind.run([smooth(Net, "net")], tmp_path / "whole")
    assert kind.run([smooth(Net, "net")], tmp_path / "parts", minutes=0)[1] is False
    assert kind.found(tmp_path / "parts") == {}
    for k in (2, 3, 1):
        failed, _ = kind.run([smooth(Net, "net")], tmp_path / "parts", shard=(k, 3))
        assert not failed
    assert kind.found(tmp_path / "parts") == kind.found(tmp_path / "whole")


def test_what_another_process_holds_is_waited_for(kind: Kind, tmp_path: Path, monkeypatch) -> None:
    """The first round finds every chunk held; while it waits, the other lets go."""
    from rush_bench.evaluation import work
    from rush_bench.records import sharing

    held, real = [True], sharing.flock

    def flock(path: Path, wait: bool) -> Any:
        if held[0] and not wait:
            import contextlib

            return contextlib.nullcontext(False)
        return real(path, wait)

    monkeypatch.setattr(sharing, "flock", flock)
    monkeypatch.setattr(audits, "flock", flock)
    monkeypatch.setattr(work.time, "sleep", lambda seconds: held.__setitem__(0, False))
    assert kind.run([smooth(Net, "net")], tmp_path / "out") == ({}, True)
    assert held == [False] and len(kind.found(tmp_path / "out")) == kind.pieces


@pytest.mark.parametrize(
    ("change", "says"), [({"shard": (3, 2)}, "k/n"), ({"twice": True}, "share a name"), ({"shape": True}, "takes images")]
)
def test_bad_input_is_refused_before_anything_is_written(kind: Kind, tmp_path: Path, change, says) -> None:
    change, defenses = dict(change), [smooth(Net, "net")]
    if change.pop("twice", None):
        defenses *= 2
    if change.pop("shape", None):
        defenses = [Smoothed(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), noise="gaussian:0.1", shape=(1, 8, 8))]
    with pytest.raises(BadInput, match=says):
        kind.run(defenses, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()
