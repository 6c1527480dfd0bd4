"""Progress of long work, on stderr: a rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:  # a table takes its words from here, and no bar
    from rich.progress import Progress, ProgressColumn, Task

LINE_EVERY = 10.0  # seconds between plain lines
WIDE = 100  # columns of a terminal that has room for a bar beside the numbers


class Bar:
    """`with Bar("attack", total=10) as bar: bar.advance("clean 98 %")`; call it where the text is on the host already."""

    def __init__(
        self, title: str = "", total: int = 0, done: int = 0, *, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.stream, self.quiet = stream if stream is not None else sys.stderr, quiet  # a quiet one shows notes alone
        self.rich: Progress | None = None
        self.begin(title, total, done)

    def __enter__(self) -> Self:
        if self.stream.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(file=self.stream)
            self.rich = Progress(*_columns(console.width), console=console)
            self.rich.start()
            self.begin(self.title, self.total, self.done)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.rich:
            self.rich.stop()
            self.rich = None

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Work of `total` steps starts, or continues after `done` of them; it replaces the previous bar."""
        self.title, self.total, self.done, self.first = title, total, done, done
        self.begun = self.shown = time.monotonic()
        if self.rich:
            for task in list(self.rich.task_ids):
                self.rich.remove_task(task)
            if total:
                self.task = self.rich.add_task(title, total=total, completed=done, text="")

    def show(self, done: int, text: str = "", title: str | None = None) -> None:
        """`done` steps are finished; `text` is the latest figure, `title` a new name for the current work."""
        self.done, self.title = done, title or self.title
        if self.rich and self.total:
            self.rich.update(self.task, completed=done, text=text, description=self.title)
            return
        now = time.monotonic()
        if not self.quiet and (now - self.shown >= LINE_EVERY or done >= self.total):
            self.shown = now
            left = (now - self.begun) / max(done - self.first, 1) * (self.total - done)
            self.note(f"{self.title}: {done}/{self.total}, {duration(left)} left  {text}".rstrip())

    def advance(self, text: str = "", steps: int = 1, title: str | None = None) -> None:
        """`steps` more are done."""
        self.show(self.done + steps, text, title)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.rich:
            self.rich.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)


def _columns(width: int) -> "list[ProgressColumn]":
    """Of a line of so many letters. A narrow one has no bar, and what was measured below its numbers."""
    from rich import progress
    from rich.text import Text

    class Narrow(progress.ProgressColumn):
        def render(self, task: "Task") -> Text:
            times = [progress.TimeElapsedColumn().render(task), "left", progress.TimeRemainingColumn().render(task)]
            numbers = " ".join([f"{int(task.completed)}/{int(task.total or 0)}", *map(str, times)])
            title = Text(task.description, style="bold")
            title.truncate(width - len(numbers) - 1, overflow="ellipsis")
            below = Text(f"\n  {task.fields['text']}" if task.fields["text"] else "", no_wrap=True, overflow="ellipsis")
            return Text.assemble(title, " ", numbers, below, no_wrap=True, overflow="ellipsis")

    if width < WIDE:
        return [Narrow()]
    return [
        progress.TextColumn("{task.description}", style="bold", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}", markup=False),
    ]


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def amount(number: float) -> str:
    """A large number in three digits: `950`, `12.3 k`, `4.6 M`, `1.2 G`; a dash for NaN."""
    if number != number:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
