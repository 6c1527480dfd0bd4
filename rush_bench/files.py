"""Files that appear whole or not at all, locks between processes, and digests that name content."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, RushBenchError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

ABANDONED = 24 * 3600.0  # seconds after which a half-written file is nobody's, where no lock can tell
TRIES = 100  # at a folder that others remove; one that cannot be made would be tried for ever


def write_atomic(path: Path, write: Callable[[Path], object], fails: type[Exception] = OSError) -> None:
    """Call `write(temporary path)` beside `path`, flush it to disk and rename it into place.

    A kill at any moment leaves either the old file or the new one; what it leaves beside it is swept by the next process that
    writes the same file. A full disk or an unwritable folder is a RushBenchError that names the file; nothing half-written
    stays. `fails`: what the writer raises instead of an OSError when the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary, handle = _temporary(path)
        try:
            write(temporary)
            if (mode := os.fstat(handle).st_mode) != temporary.stat().st_mode:
                temporary.chmod(stat.S_IMODE(mode))  # safetensors puts a file there that its owner alone may read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            os.close(handle)
    except (OSError, fails) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise RushBenchError(
            f"cannot write {path}: {why}; free some space or choose another folder, then run the same command again to continue"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, with the mode that the umask grants, locked while its handle is open: its writer lives."""
    while True:
        temporary = path.parent / f".{path.stem}-{secrets.token_hex(4)}.part{path.suffix}"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _try_lock(handle) is not False and _is_open_file(temporary, handle):
            return temporary, handle
        os.close(handle)  # swept between these two lines


def _sweep(path: Path) -> None:
    """Remove what dead writers of this file left; where there are no locks, what is a day old."""
    for left in path.parent.glob(f".{escape(path.stem)}-*.part{escape(path.suffix)}"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDWR)
            try:
                held = _try_lock(handle)
                if held or (held is None and time.time() - left.stat().st_mtime > ABANDONED):
                    left.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def flock(path: Path, wait: bool) -> Iterator[bool | None]:
    """An advisory lock on a file that exists while it is held: True held, False another's, None not supported here.

    The system frees it when its holder dies. If locks are not supported, a warning is printed once.
    """
    held, handle, tries = None, -1, TRIES
    while held is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            tries -= 1
            if isinstance(error, FileNotFoundError) and tries:  # another process tidied the folder away in between
                continue
            raise RushBenchError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
        held = _try_lock(handle, wait)
        if held is None:
            _say_unlocked()
            break
        if held and not _is_open_file(path, handle):  # its holder let go and removed it while we opened it: again
            os.close(handle)
            held = None
    try:
        yield held
    finally:
        if held is not False:
            path.unlink(missing_ok=True)
        os.close(handle)


def release(path: Path) -> None:
    """Remove the lock file of a process that died holding it."""
    if path.exists():
        with flock(path, wait=False):
            pass


def _try_lock(handle: int, wait: bool = False) -> bool | None:
    """True held, False another's, None not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@cache
def _say_unlocked() -> None:
    print(
        "this file system has no locks: several processes may do the same work twice (the records stay right); "
        "let one alone train a model",
        file=sys.stderr,
    )


def _is_open_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


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
    except (OSError, ValueError, RecursionError) as error:
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
