"""What a user sees while training: a bar on a terminal, else a plain line now and then. All of it on stderr."""

import sys
from time import monotonic
from typing import Any, TextIO

LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Stage, epoch, loss and time left. The loop calls it where it has read the loss anyway: no further host sync."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.bar: Any = None
        self.numbers: dict[str, float] = {}
        self.last_line = 0.0

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(file=self.stream))
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def note(self, text: str) -> None:
        """One line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def start(self, stage: str, epochs: int, total: int, done: int) -> None:
        """A stage of `total` steps begins, or goes on after `done` of them."""
        self.stage, self.epochs, self.total, self.first = stage, epochs, total, done
        self.began, self.numbers = monotonic(), {}
        if self.bar is not None:
            for task in list(self.bar.task_ids):
                self.bar.remove_task(task)
            self.task = self.bar.add_task(stage, total=total, completed=done, text="")

    def measured(self, numbers: dict[str, float]) -> None:
        """Validation numbers, shown from now on."""
        self.numbers = numbers

    def update(self, epoch: int, done: int, loss: float) -> None:
        """`done` steps of the stage are behind us, the last with this loss."""
        now = monotonic()
        extra = "".join(f"  {key} {100 * value:.1f} %" for key, value in self.numbers.items())
        text = f"epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}{extra}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        elif now - self.last_line >= LINE_EVERY:
            left = (now - self.began) / max(1, done - self.first) * (self.total - done)
            self.note(f"{self.stage}  {text}  {left / 60:.1f} min left")
            self.last_line = now
