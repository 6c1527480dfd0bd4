"""`import rush_bench` is light, and its names are the real ones."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import rush_bench as rb

NAMES = "as_images as_module attack Defense Deterministic Gaussian load_dataset load_defense"
NAMES += (
    " Randomised Smoothed table train Uniform audit certify compare corruptions figure import_checkpoint load_results settle"
)
NAMES += " Laplace"


def test_import_and_dir_need_no_torch() -> None:
    code = "import sys, rush_bench; dir(rush_bench), rush_bench.__version__; assert 'torch' not in sys.modules"
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}).returncode == 0


@pytest.mark.parametrize(
    ("before", "own", "expected"),
    [
        ("", {}, ("PASSIVE", "20000")),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ("", {"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
        ("import sys; sys.modules['torch'] = sys", {}, (None, None)),
    ],
)
def test_threads_hardly_spin_where_torch_is_not_there_yet(
    before: str, own: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    found = "(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    code = f"{before}\nimport os, rush_bench; assert {found} == {expected!r}"
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root, **own}).returncode == 0


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_loads_and_is_listed(name: str) -> None:
    assert name in dir(rb)
    assert callable(getattr(rb, name)) and getattr(rb, name).__name__ == name


def test_nothing_else_is_listed() -> None:
    assert sorted(rb.__all__) == sorted(NAMES.split())
    assert sorted(dir(rb)) == sorted([*NAMES.split(), "__version__"])


def test_a_wrong_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"'smooth'; it has .*Smoothed"):
        _ = rb.smooth  # type: ignore[attr-defined]


def test_version_is_that_of_the_package() -> None:
    try:
        installed = importlib.metadata.version("rush-bench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert rb.__version__ == installed
