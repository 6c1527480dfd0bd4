"""How processes share chunks: each takes what is free, comes back for what another holds, and stops when its time is up."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

from rush_bench.evaluation.records import Cell, CellStore
from rush_bench.progress import Bar


class HasCell(Protocol):
    """A job: whatever else it holds, its chunks are those of a cell."""

    @property
    def cell(self) -> Cell: ...


Job = TypeVar("Job", bound=HasCell)
Item = TypeVar("Item")
Status = Literal["ready", "wait", "drop"]


def in_turn(
    store: CellStore,
    chunks: Iterable[tuple[Job, int]],
    bar: Bar,
    deadline: float | None,
    status: Callable[[Job, int], Status] = lambda job, c: "ready",
) -> Iterator[tuple[Job, int]]:
    """The (job, chunk) that are missing, as `take_turns` hands them out; the caller writes it and advances the bar.

    `status` says of each whether it can be made, must wait for another, or is given up.
    """
    return take_turns(
        chunks,
        bar,
        deadline,
        there=lambda item: store.has(item[0].cell, item[1]),
        lock=lambda item: store.lock(item[0].cell, item[1]),
        status=lambda item: status(*item),
    )


def take_turns(
    items: Iterable[Item],
    bar: Bar,
    deadline: float | None,
    *,
    there: Callable[[Item], bool],
    lock: Callable[[Item], AbstractContextManager[bool]],
    status: Callable[[Item], Status] = lambda item: "ready",
) -> Iterator[Item]:
    """The items that are not `there`, one at a time and locked while it is out.

    Ends when nothing is left or, between items, when `time.monotonic()` has passed the deadline.
    """
    left = [item for item in items if not there(item)]
    while left:
        waiting = []
        for item in left:
            now = status(item)
            if now == "wait":
                waiting.append(item)
            if now != "ready":
                continue
            if deadline is not None and time.monotonic() > deadline:
                return
            with lock(item) as held:
                if there(item):
                    bar.advance()
                elif held:
                    yield item
                else:  # another process is at it: come back when the rest is done
                    waiting.append(item)
        if len(waiting) == len(left):
            time.sleep(0.2)
        left = waiting


def bar_for(store: CellStore, title: str, chunks: list[tuple[Job, int]], quiet: bool) -> Bar:
    """A bar over these chunks, those that are there already counted as done; a quiet one speaks at its end alone."""
    done = sum(store.has(job.cell, c) for job, c in chunks)
    return Bar(title, len(chunks), done, every=float("inf") if quiet else 10.0)
