"""`rush-bench doctor`: what is installed, usable and writable here. Imports are tried in processes of their own."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from rush_bench.cli import common
from rush_bench.packages import overwritten, shipped_by
from rush_bench.version import __version__

# That torchvision matches torch, it says itself where it loads its operators. Its models, which bring torch._dynamo, take two
# seconds more to import: the package stands there without its contents, and goes again for what is tried after it.
OPERATORS = """
import sys, types
from importlib.util import find_spec
bare = types.ModuleType("torchvision")
bare.__path__ = find_spec("torchvision").submodule_search_locations
sys.modules["torchvision"] = bare
from torchvision.extension import _assert_has_ops
_assert_has_ops()
for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
    del sys.modules[name]
"""
# What must work in two of the packages that are needed.
NEEDED = {"torchvision": OPERATORS, "pyautoattack": "import pyautoattack"}
# Optional packages: what must work in them, and the line that installs them.
# robustbench 1.1.1 imports `autoattack`, but what PyPI has is `pyautoattack`: the name is aliased first.
# torchattacks 3.5.1 ships an older robustbench at top level, which must not pass for the real one.
OPTIONAL = {
    "torchattacks": (
        "import torchattacks; torchattacks.PGDRS",
        "pip install 'rush-bench[torchattacks]'  (where its requests~=2.25.1 conflicts: "
        "pip install --no-deps torchattacks==3.5.1)",
    ),
    "robustbench": (
        "import sys, pyautoattack; sys.modules.setdefault('autoattack', pyautoattack); "
        "from robustbench.utils import load_model",
        "pip install 'rush-bench[robustbench]'",
    ),
    "submitit": ("import submitit", "pip install 'rush-bench[cluster]'"),
    "tensorboard": ("from torch.utils.tensorboard import SummaryWriter", "pip install 'rush-bench[tensorboard]'"),
    "huggingface-hub": ("import huggingface_hub", "pip install 'rush-bench[hub]'"),
}
WORKS, OPTIONAL_MISSING, BROKEN = "ok", "optional", "broken"
Attempt = Callable[[str], str | None]  # code -> None where it runs, else what is wrong


@dataclass(frozen=True)
class Check:
    """One line of the report: what, ok / optional / broken, and the finding with its fix."""

    what: str
    state: str
    finding: str


@click.command()
@common.store
@common.results
@common.data_dir
@common.as_json
def command(store: Path, results: Path, data_dir: Path | None, as_json: bool) -> None:
    """Versions, devices, optional packages, writable folders, data sets; exit code 1 where something is broken."""
    codes = NEEDED | {name: code for name, (code, _) in OPTIONAL.items()}
    found = together([code for name, code in codes.items() if installed(name)])
    attempt = try_import if found is None else lambda code: None
    checks = [
        Check("rush-bench", WORKS, f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        *(required(name, attempt) for name in requirements()),
        *(devices() if found is None else found),
        *(optional(name, *how, attempt) for name, how in OPTIONAL.items()),
        writable("models", store),
        writable("results", results),
        *datasets(data_dir),
    ]
    if as_json:
        common.print_json([asdict(check) for check in checks])
    else:
        common.print_rows("rush-bench doctor", ["what", "state", "finding"], [list(asdict(c).values()) for c in checks])
    if any(check.state == BROKEN for check in checks):
        raise click.exceptions.Exit(1)


def requirements() -> list[str]:
    """Names of the packages that rush-bench needs, from its own metadata."""
    try:
        lines = importlib.metadata.requires("rush-bench") or []
    except importlib.metadata.PackageNotFoundError:
        return ["torch", "torchvision", "numpy", "pyautoattack"]
    return [re.split(r"[ <>=!~;\[(]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def required(name: str, attempt: Attempt) -> Check:
    """A package that rush-bench needs: its version, and of two of them that they work beside this torch."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, BROKEN, "not installed; pip install rush-bench again")
    if name in NEEDED and (problem := attempt(NEEDED[name])):
        return Check(name, BROKEN, f"{version} does not work here: {problem}; pip install -c constraints.txt -e . again")
    return Check(name, WORKS, version)


def optional(name: str, code: str, install: str, attempt: Attempt) -> Check:
    """An optional package: is it there, is it what it claims to be, does the part that we use work?"""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        impostor = "; the folder of that name is torchattacks' older copy" if shipped_by("torchattacks", name) else ""
        return Check(name, OPTIONAL_MISSING, f"not installed{impostor}: {install}")
    changed = overwritten(distribution, name)
    if changed:
        return Check(
            name,
            OPTIONAL_MISSING,
            f"{distribution.version} was overwritten by another package ({changed} differs): "
            f"pip install --force-reinstall --no-deps {name}=={distribution.version}",
        )
    if problem := attempt(code):
        return Check(name, OPTIONAL_MISSING, f"{distribution.version} is installed but not usable: {problem}; {install}")
    return Check(name, WORKS, f"{distribution.version}, usable")


def installed(name: str) -> bool:
    """Whether a distribution is there, be it usable or not."""
    return next(iter(importlib.metadata.distributions(name=name)), None) is not None


def together(codes: Iterable[str]) -> list[Check] | None:
    """What `devices` finds in one fresh interpreter where all codes run, each of which imports torch; None where one fails."""
    tell = "import json; from rush_bench.cli import doctor; print(json.dumps([vars(c) for c in doctor.devices()]))"
    done = _run("\n".join([*codes, tell]))
    return [Check(**check) for check in json.loads(done.stdout.splitlines()[-1])] if done and done.returncode == 0 else None


def try_import(code: str, timeout: float = 120) -> str | None:
    """None where the code runs in a fresh interpreter, else the last line of its error."""
    done = _run(code, timeout)
    if done is None:
        return f"no answer in {timeout:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["died without a word"])[-1]


def _run(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None


def devices() -> list[Check]:
    """The processor and each accelerator, with bfloat16."""
    import torch

    from rush_bench.devices import has_bfloat16

    fast = _yes(has_bfloat16(torch.device("cpu")))
    checks = [Check("cpu", WORKS, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, bfloat16 {fast}")]
    for k in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(k).total_memory / 2**30
        bf16 = _yes(has_bfloat16(torch.device("cuda", k)))
        checks.append(Check(f"cuda:{k}", WORKS, f"{torch.cuda.get_device_name(k)}, {memory:.0f} GiB, bfloat16 {bf16}"))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", WORKS, "Apple GPU"))
    return checks


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def writable(what: str, folder: Path) -> Check:
    """Whether a file can be made in a folder, or in the nearest one above that exists; nothing stays."""
    near = folder.absolute()
    while not near.exists() and near != near.parent:
        near = near.parent
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        return Check(what, BROKEN, f"{folder} cannot be written ({error.strerror}); choose another folder")
    return Check(what, WORKS, f"{folder} can be written" + ("" if folder.exists() else " (not made yet)"))


def datasets(folder: Path | None) -> list[Check]:
    """Which data sets lie in the data folder; the others are downloaded on first use where there is a network."""
    from rush_bench.places import PLACES, data_folder, found

    folder = data_folder(folder)
    checks = [Check("digits", WORKS, "built in")]
    for name in PLACES:
        there = found(name, folder)
        absent = f"not in {folder}; downloaded on first use where there is a network"
        checks.append(Check(name, WORKS if there else OPTIONAL_MISSING, f"{there}" if there else absent))
    return checks
