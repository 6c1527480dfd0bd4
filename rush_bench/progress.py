"""Progress of long work on stderr: a rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """`with Bar("attack", total=10) as bar: bar.advance("clean 98 %")`; call it where the text is on the host already."""

    def __init__(self, title: str, total: int, done: int = 0, *, every: float = 10.0) -> None:
        self.title, self.total, self.done, self.every = title, total, done, every
        self.begun = self.shown = time.monotonic()
        self.started_at = done
        self.rich: Progress | None = None
        if sys.stderr.isatty():
            self.rich = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self.task = self.rich.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> "Bar":
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.rich:
            self.rich.stop()

    def advance(self, text: str = "", steps: int = 1, title: str | None = None) -> None:
        """`steps` more are done; `text` is the latest figure, `title` a new name for what goes on now."""
        self.done += steps
        self.title = title or self.title
        if self.rich:
            self.rich.update(self.task, completed=self.done, text=text, description=self.title)
            return
        now = time.monotonic()
        if now - self.shown >= self.every or self.done >= self.total:
            self.shown = now
            made = max(self.done - self.started_at, 1)
            left = (now - self.begun) / made * (self.total - self.done)
            print(
                f"{self.title}: {self.done}/{self.total}, {left:.0f} s left  {text}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.rich:
            self.rich.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)
