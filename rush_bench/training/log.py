"""The curves of a training beside its model: JSON lines always, TensorBoard's events on request.

`log.jsonl` has a line per epoch: stage, epoch, loss, and the metrics of validation. Both are written from the history in the
checkpoint, so that a run that was killed and resumed leaves neither a gap nor a duplicate line.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, MissingPackage
from rush_bench.files import write_text

FILE, EVENTS = "log.jsonl", "tensorboard"


def check_kind(kind: str) -> None:
    """BadInput for a log of no known kind."""
    if kind not in ("", "tensorboard"):
        raise BadInput(f"--log {kind} is not known; give tensorboard (JSON lines are written always)")


class TrainingLog:
    """Writes the history of a training. `kind`: empty, or `tensorboard`."""

    def __init__(self, folder: Path, kind: str = "") -> None:
        self.folder, self.writer, self.entries_sent = folder, None, 0
        check_kind(kind)
        if kind:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackage("--log tensorboard needs it: pip install 'rush-bench[tensorboard]'") from error
            shutil.rmtree(folder / EVENTS, ignore_errors=True)  # written again from the history
            self.writer = SummaryWriter(folder / EVENTS)

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """After an epoch; `history` has an entry for each epoch so far, those of earlier runs of the command included."""
        write_text(self.folder / FILE, "".join(f"{json.dumps(entry)}\n" for entry in history))
        if self.writer is not None:
            for entry in history[self.entries_sent :]:
                for key in entry.keys() - {"stage", "epoch"}:
                    self.writer.add_scalar(f"{entry['stage']}/{key}", entry[key], entry["epoch"])
            self.entries_sent = len(history)
            self.writer.flush()

    def close(self) -> None:
        """After the last epoch."""
        if self.writer is not None:
            self.writer.close()
