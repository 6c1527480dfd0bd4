"""Downloads that arrive whole or not at all."""

import contextlib
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput

PATIENCE = 60.0  # seconds without an answer; without it a firewall that drops packets blocks for ever


def fetch(name: str, folder: Path, wanted: str, download: Callable[[Path], Any], by_hand: str) -> None:
    """Call `download(temporary folder)` and move what it left under `wanted` to `folder / wanted`.

    `by_hand` says what a user without a network puts into the folder. Whatever goes wrong is one BadInput with that
    advice, and nothing half-written stays. Progress goes to stderr.
    """
    created = not folder.exists()
    patience = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary,
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            socket.setdefaulttimeout(PATIENCE)
            download(Path(temporary))
            shutil.move(Path(temporary) / wanted, folder / wanted)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError; torchvision raises RuntimeError
        raise BadInput(
            f"{name} is not in {folder} and could not be downloaded ({error}). Put {by_hand} into {folder}, "
            "or name the folder that has it with --data-dir or RUSH_BENCH_DATA"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
