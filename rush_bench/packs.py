"""A results folder as one file: a zip of its records, tables, figures, audits and benchmark files, and the models' cards.

Readers take it in place of the folder, and what they read is the very files, with their own checks. Left out are weights,
stored x' (unless asked for: they are most of a folder) and what a reader makes again. No torch is imported.

    pack.json                format, what made it, and when each file was last written
    records.csv              a row per image of every record, for readers without rush-bench; nothing here reads it
    cards/<name>/card.json   the card of every model whose weights were measured
    runs/..., audit/..., *   the folder's files, at their places
"""

import atexit
import json
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from os import utime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rush_bench.errors import BadInput
from rush_bench.files import write_atomic
from rush_bench.store import cards_measured
from rush_bench.version import __version__

if TYPE_CHECKING:
    from rush_bench.records import CellResult

FORMAT = 1
ABOUT, RECORDS, CARDS = "pack.json", "records.csv", "cards"
LABELS = ("defense", "dataset", "split", "norm", "eps", "suite", "attack", "experiment", "trial", "corruption", "severity")
COLUMNS = ("index", "label", "correct", "repeats", "radius")
ATTACKED = "adversarial-*.npy"
LEFT_OUT = ("models", "jobs", "*.safetensors", "*.lock", "*.log", "*.part*", "*.zip", ".*", "report.html", ABOUT, RECORDS)
SINCE = (1980, 1, 1, 0, 0, 0)  # a zip's own times have no zone: `pack.json` has them
PACKAGES = ("numpy", "scipy", "pandas", "torch", "torchvision")


@dataclass(frozen=True)
class Opened:
    """A results folder as it is read. `cards`: its own store of cards, if any; `beside`: where answers go by default."""

    folder: Path
    cards: Path
    beside: Path


def pack(results: Path, out: Path | None = None, *, store: Path | None = None, adversarial: bool = False) -> Path:
    """Write the pack of a results folder to `out` (`<results>.zip`) and return its path. The same folder gives the same bytes.

    `store` has the models' cards; `adversarial`: with the stored x', which galleries need.
    Errors: BadInput where the folder holds no record or audit, or a damaged record.
    """
    from rush_bench.records import load_results  # pandas, which a reader of names does without
    from rush_bench.records.curate import ROOMS

    results = Path(results)
    out = Path(out) if out is not None else results.resolve().with_name(f"{results.resolve().name}.zip")
    cells = {room: load_results(results / room) for room in ROOMS}
    if not any(cells.values()) and not any((results / "audit").glob("*.json")):
        raise BadInput(f"no record under {results}; name the folder that was an --out of rush-bench (it holds runs/)")
    left_out = (*LEFT_OUT, *(() if adversarial else (ATTACKED,)))
    files = {path.relative_to(results).as_posix(): path for path in _files(results, left_out)}
    if store is not None:
        measured = {str(cell.labels.get("sha256")) for room in cells.values() for cell in room}
        files |= {f"{CARDS}/{name}/card.json": store / name / "card.json" for name in cards_measured(store, measured)}
    about = {"format": FORMAT, "made_by": _environment()}
    about["modified"] = {name: path.stat().st_mtime_ns for name, path in sorted(files.items())}
    content = {ABOUT: json.dumps(about, indent=1).encode(), RECORDS: _flat(cells)}
    write_atomic(out, lambda path: _write(path, content | {name: path.read_bytes() for name, path in sorted(files.items())}))
    return out


def unpack(path: Path, out: Path | None = None) -> tuple[Path, int]:
    """Extract a pack into a folder (of the pack's name), to add to it; returns the folder and its number of new files.

    What is there already stays.
    Errors: BadInput for a file that is no pack, RushBenchError for a folder that cannot be written to.
    """
    read = opened(path)
    if not Path(path).is_file():
        raise BadInput(f"{path} is no pack; make one with rush-bench pack")
    into, gained = Path(out) if out is not None else read.beside, 0
    for file in _files(read.folder, ()):
        if not (target := into / file.relative_to(read.folder)).exists():
            write_atomic(target, partial(shutil.copy2, file))
            gained += 1
    return into, gained


def opened(results: Path) -> Opened:
    """A results folder, or a pack, whose files stay unpacked while this process lives. BadInput for a file that is no pack."""
    results = Path(results)
    if not results.is_file():
        return Opened(results, results / CARDS, results)
    folder = _unpacked(results.resolve(), results.stat().st_mtime_ns)
    return Opened(folder, folder / CARDS, results.with_suffix("") if results.suffix else results.parent)


def refuse_pack(results: Path) -> None:
    """BadInput for a pack where records are to be changed."""
    if results.is_file():
        raise BadInput(f"{results} is a pack, which is read only; `rush-bench unpack {results}` makes a folder of it")


def pack_hint(results: Path) -> str:
    """What to do about a folder without records beside which a pack lies; empty where none does."""
    packed = results.with_name(f"{results.name}.zip")
    return f"; {packed} is its pack: name that to read it, `rush-bench unpack {packed}` to go on from it" * packed.is_file()


@cache
def _unpacked(path: Path, _: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"rush-bench-{path.stem[:60]}-"))  # messages name it
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


def _flat(cells: Mapping[str, Sequence["CellResult"]]) -> bytes:
    """A row per image of every record as CSV: which record it is of, and COLUMNS as far as it has them."""
    import pandas as pd

    frames = [
        cell.frame.reindex(columns=COLUMNS).assign(
            **{key: cell.labels.get(key) for key in LABELS},
            seed=cell.identity["seed"],
            record=(PurePosixPath(room) / "runs" / cell.folder.name).as_posix(),
        )
        for room, found in cells.items()
        for cell in found
    ]
    order = ["record", *LABELS, "seed", *COLUMNS]
    return pd.DataFrame(pd.concat(frames) if frames else [], columns=order).to_csv(index=False).encode()


def _write(path: Path, content: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, each in content.items():
            entry = zipfile.ZipInfo(name, SINCE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, each)


def _environment() -> dict[str, str]:
    found = {"rush_bench": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
