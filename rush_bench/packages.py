"""Whether an installed package is what it claims to be: two distributions can write into one folder."""

import base64
import hashlib
import importlib.metadata
from pathlib import Path


def overwritten(distribution: importlib.metadata.Distribution, package: str) -> str | None:
    """The first Python file of a package that is not as its own distribution installed it; None where all are."""
    for file in distribution.files or []:
        if file.hash is None or file.parts[0] != package or file.suffix != ".py":
            continue
        path = Path(str(file.locate()))
        found = hashlib.new(file.hash.mode, path.read_bytes()).digest() if path.is_file() else b""
        if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != file.hash.value:
            return str(file)
    return None


def shipped_by(distribution: str, package: str) -> bool:
    """Whether a distribution brings a folder of that name."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(file.parts[0] == package for file in files)
