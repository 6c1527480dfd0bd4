"""Files that appear whole or not at all, and digests that name their content."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, RushBenchError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` beside `path`, flush it to disk and rename it into place.

    A kill at any moment leaves either the old file or the new one. A full disk or an unwritable folder is a
    RushBenchError that names the folder; nothing half-written stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RushBenchError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder, "
            "then run the same command again"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a file that is cut or damaged is a BadInput that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); delete it and run the command that made it again") from error


def pickled_labels(path: Path) -> BadInput:
    """The error for AdvCL's released pseudo-labels: a pickle runs what is in it, so that its owner has to convert it."""
    return BadInput(
        f"{path} is a pickle, which may run code when it is read; if you trust it (AdvCL's and A-InfoNCE's pseudo-labels are "
        "such files), convert it once and give labels.npz to --set pseudo_source=file --set pseudo_file=labels.npz:\n"
        f"    import pickle, numpy\n    numpy.savez('labels.npz', **pickle.load(open({str(path)!r}, 'rb')))"
    )


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
