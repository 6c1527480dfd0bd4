"""A deadline on a clock of its own."""

import pytest

from rush_bench import deadline as module
from rush_bench.deadline import NEVER, Deadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_it_passes_after_its_minutes_and_is_handed_on_as_it_is(clock: list[float]) -> None:
    deadline = Deadline.after(2)
    clock[0] += 90
    assert not deadline.over and deadline.minutes_left == pytest.approx(0.5)
    assert Deadline.after(deadline) == deadline
    clock[0] += 30
    assert deadline.over and deadline.minutes_left == 0
    clock[0] += 60
    assert deadline.over and deadline.minutes_left == 0


def test_without_minutes_there_is_none(clock: list[float]) -> None:
    clock[0] = 1e12
    assert Deadline.after(None) == NEVER and not NEVER.over and NEVER.minutes_left is None


def test_no_minutes_are_over_at_once(clock: list[float]) -> None:
    assert Deadline.after(0).over
