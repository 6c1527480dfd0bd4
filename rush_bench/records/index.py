"""What was found in the cells' folders, kept with the state of their files, so that a table of many cells reads few of them.

`<results>/runs/.index.json` holds, by folder: a digest of its files' names, inodes, sizes and times of change; what cell.json
says; how many chunks are done; and what was made of the arrays (`CellResult.remembered`). It counts only for the very code that
wrote it, so that no number of older code is shown, and only while no file was written, replaced, cut, moved or touched: any of
these changes a time that nobody can set back. What it cannot see is a disk that loses bits without the file system noticing;
those are found when a chunk is read. Without the file all is read again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rush_bench.errors import RushBenchError
from rush_bench.files import write_text

RECENT = 2.0  # seconds: a file that changed so lately might change again within one tick of the file system's clock


class Index:
    """The index of one folder of cells; one that is missing, damaged or of other code is empty."""

    def __init__(self, runs: Path) -> None:
        self.path, self.changed = runs / ".index.json", False
        self.before, self.now = _read(self.path), dict[str, dict[str, Any]]()

    def entry(self, folder: Path, look: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `look(folder)` gave, JSON-able, when its files were as they are now."""
        files, changed = _state(folder)
        found = self.before.get(folder.name)
        if found is None or found["files"] != files:
            found = {"files": files, **look(folder), "made": {}}
            self.changed = True
        if changed < time.time() - RECENT:
            self.now[folder.name] = found
        return found

    def save(self) -> None:
        """Write it, if there is anything new and the folder may be written to."""
        if self.changed:
            with contextlib.suppress(RushBenchError):
                body = json.dumps(self.now)
                write_text(self.path, f"{_code()} {hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
            self.changed = False


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        head, body = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return json.loads(body) if head == f"{_code()} {hashlib.sha256(body.encode()).hexdigest()}" else {}


def _state(folder: Path) -> tuple[str, float]:
    """A digest that changes when a file of the cell does, and when the last of them did (seconds since 1970)."""
    stamps, last = [], 0
    for file in os.scandir(folder):
        if file.name == "cell.json" or file.name.startswith(("chunk-", "adversarial-")):
            stat = file.stat()
            stamps.append((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            last = max(last, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr(sorted(stamps)).encode()).hexdigest(), last / 1e9


@cache
def _code() -> str:
    """Of all that has a part in a number: this package's source, numpy and scipy."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    for package in ("numpy", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(version(package).encode())
    return digest.hexdigest()
