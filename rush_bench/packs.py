"""A results folder as one file: a zip of its records, tables, figures, audits and benchmark files, and the models' cards.

Readers take it in place of the folder, and what they read is the very files, with their own checks. Left out are weights,
stored x' (unless asked for: they are most of a folder) and what a reader makes again. No torch is imported.

    pack.json                format, what made it, and when each file was last written
    models/<name>/card.json  the card of every model whose weights were measured
    runs/..., audit/..., *   the folder's files, at their places
"""

import atexit
import json
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from os import utime
from pathlib import Path, PurePosixPath
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.files import write_atomic
from rush_bench.store import cards_measured
from rush_bench.version import __version__

FORMAT = 1
ABOUT, CARDS = "pack.json", "models"
ATTACKED = "adversarial-*.npy"
LEFT_OUT = ("jobs", "*.safetensors", "*.lock", "*.log", "*.part*", "*.zip", ".*", "report.html", ABOUT)
SINCE = (1980, 1, 1, 0, 0, 0)  # a zip's own times have no zone: `pack.json` has them
PACKAGES = ("numpy", "scipy", "pandas", "torch", "torchvision")


@dataclass(frozen=True)
class Opened:
    """A results folder as it is read. `cards`: the pack's own store of cards; `beside`: where answers go by default."""

    folder: Path
    cards: Path | None
    beside: Path


def pack(results: Path, out: Path | None = None, *, store: Path | None = None, adversarial: bool = False) -> Path:
    """Write the pack of a results folder to `out` (`<results>.zip`) and return its path. The same folder gives the same bytes.

    `store` has the models' cards; `adversarial`: with the stored x', which galleries need.
    Errors: BadInput where the folder holds no record or audit.
    """
    results = Path(results)
    out = Path(out) if out is not None else results.resolve().with_name(f"{results.resolve().name}.zip")
    left_out = (*LEFT_OUT, *(() if adversarial else (ATTACKED,)))
    files = {path.relative_to(results).as_posix(): path for path in _files(results, left_out)}
    files = {name: path for name, path in files.items() if not name.startswith(f"{CARDS}/")}
    if not any(name.endswith("cell.json") or name.startswith("audit/") for name in files):
        raise BadInput(f"no record under {results}; name the folder that was an --out of rush-bench (it holds runs/)")
    measured = {
        str(labels.get("sha256")) for name, path in files.items() if name.endswith("cell.json") for labels in _labels(path)
    }
    if store is not None:
        files |= {f"{CARDS}/{name}/card.json": store / name / "card.json" for name in cards_measured(store, measured)}
    about: dict[str, Any] = {"format": FORMAT, "made_by": _environment()}
    about["modified"] = {name: path.stat().st_mtime_ns for name, path in sorted(files.items())}
    write_atomic(out, lambda path: _write(path, about, files))
    return out


def opened(results: Path) -> Opened:
    """A results folder, or a pack, whose files stay unpacked while this process lives. BadInput for a file that is no pack."""
    results = Path(results)
    if not results.is_file():
        return Opened(results, None, results)
    folder = _unpacked(results.resolve(), results.stat().st_mtime_ns)
    return Opened(folder, folder / CARDS, results.parent)


@cache
def _unpacked(path: Path, _: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rush-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as file:
            about = json.loads(file.read(ABOUT))
            if about["format"] != FORMAT:
                raise BadInput(f"{path} is a pack of another version; {about['made_by']} made it")
            for name, modified in about["modified"].items():
                if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                    raise BadInput(f"{path} names a file outside of itself ({name}); it is no pack of rush-bench")
                file.extract(name, folder)  # checks its CRC
                utime(folder / name, ns=(modified, modified))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is no pack of rush-bench, or damaged ({error}); make it again by rush-bench pack") from error
    return folder


def _files(folder: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(PurePosixPath(part).match(pattern) for part in parts for pattern in left_out):
            yield path


def _labels(path: Path) -> list[dict[str, Any]]:
    """The labels of a cell; none of one that cannot be read, which whoever reads the pack is told."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(path: Path, about: dict[str, Any], files: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, content in [
            (ABOUT, json.dumps(about, indent=1).encode()),
            *((n, p.read_bytes()) for n, p in sorted(files.items())),
        ]:
            entry = zipfile.ZipInfo(name, SINCE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, content)


def _environment() -> dict[str, str]:
    found = {"rush_bench": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
