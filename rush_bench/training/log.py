"""The curves of a training beside its model: JSON lines always, TensorBoard's events where they are asked for.

`log.jsonl` has a line per epoch: stage, epoch, loss, and what validation measured. Both are made from the history that the
checkpoint keeps, so that a run that was killed and goes on leaves neither a gap nor a line twice.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, MissingPackage
from rush_bench.files import write_text

FILE, EVENTS = "log.jsonl", "tensorboard"


class Log:
    """Hears of each epoch. `kind`: empty, or `tensorboard`."""

    def __init__(self, folder: Path, kind: str = "") -> None:
        self.folder, self.writer, self.told = folder, None, 0
        if kind not in ("", "tensorboard"):
            raise BadInput(f"--log {kind} is not known; give tensorboard (JSON lines are written always)")
        if kind:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackage("--log tensorboard needs it: pip install 'rush-bench[tensorboard]'") from error
            shutil.rmtree(folder / EVENTS, ignore_errors=True)  # made again from the history
            self.writer = SummaryWriter(folder / EVENTS)

    def epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """An epoch is over; `history` has all of them, those of earlier processes too."""
        write_text(self.folder / FILE, "".join(f"{json.dumps(entry)}\n" for entry in history))
        if self.writer is not None:
            for entry in history[self.told :]:
                for key in entry.keys() - {"stage", "epoch"}:
                    self.writer.add_scalar(f"{entry['stage']}/{key}", entry[key], entry["epoch"])
            self.told = len(history)
            self.writer.flush()

    def close(self) -> None:
        """Nothing more comes."""
        if self.writer is not None:
            self.writer.close()
