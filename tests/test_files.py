"""Files that appear whole or not at all: modes, leftovers of the dead, full disks, file systems without locks."""

import errno
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest
import torch

from rush_bench.errors import RushBenchError
from rush_bench.files import ABANDONED, flock, release, write_atomic, write_text
from rush_bench.store import save_model


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
        save_model(tmp_path, {"name": "a"}, {"weight": torch.zeros(2)}, {"weight": torch.ones(2)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("a.txt", "best.safetensors", "card.json", "model.safetensors"), 0o666 & ~umask)


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    path = tmp_path / "a[1].txt"
    dead, alien = tmp_path / ".a[1]-0badcafe.part.txt", tmp_path / ".a[1]-notes.txt"
    for left in (dead, alien):
        left.write_text("half")

    def outer(temporary):
        temporary.write_text("outer")
        write_text(path, "inner")  # another process, in between
        assert temporary.exists()

    write_atomic(path, outer)
    assert path.read_text() == "outer" and sorted(tmp_path.iterdir()) == sorted([path, alien])


@pytest.mark.parametrize(("age", "stays"), [(0.0, True), (2 * ABANDONED, False)])
def test_without_locks_only_old_leftovers_go(tmp_path, unlocked, age, stays):
    unlocked(errno.ENOLCK)
    left = tmp_path / ".a-0badcafe.part.txt"
    left.write_text("half")
    os.utime(left, (time.time() - age,) * 2)
    write_text(tmp_path / "a.txt", "x")
    assert left.exists() == stays and (tmp_path / "a.txt").read_text() == "x"


def _hold(path, ready):
    with flock(path, wait=True):
        ready.set()
        time.sleep(60)


def test_a_lock_of_the_dead_is_free_and_one_of_the_living_is_not(tmp_path):
    path, context = tmp_path / "a.lock", multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(path, ready))
    process.start()
    assert ready.wait(30)
    release(path)
    with flock(path, wait=False) as held:
        assert held is False and path.exists()
    process.kill()
    process.join()
    assert path.exists()
    release(path)
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_without_locks_is_told_of_once(tmp_path, unlocked, capsys, code):
    unlocked(code)
    for name in ("a", "b"):
        with flock(tmp_path / name, wait=True) as held:
            assert held is None
    assert capsys.readouterr().err.count("no locks") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
    """No file grows beyond 64 KiB: writers meet what a full disk gives them, each in its own words."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _model(folder):
    save_model(folder, {"recipe": "r"}, {"weight": torch.zeros(100, 1000)})


def _checkpoint(folder):
    from rush_bench.training.checkpoint import CheckpointFile

    CheckpointFile(folder, {}).save({"weight": torch.zeros(100, 1000)})


@pytest.mark.parametrize("write", [_model, _checkpoint, lambda folder: write_text(folder / "a.txt", "x" * 10**6)])
def test_a_full_disk_is_our_own_error_and_leaves_what_was_there(tmp_path, full_disk, write):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full_disk()
    with pytest.raises(RushBenchError, match=r"cannot write .*free some space.*again to continue"):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    """The working folder was deleted: there is no place for `results` in it."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RushBenchError, match=r"cannot write results/a\.lock"), flock(Path("results/a.lock"), wait=False):
        pass
