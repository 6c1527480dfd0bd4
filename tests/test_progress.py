"""The one progress display: a bar on a terminal, lines elsewhere, no more of them than asked for."""

import io
import re

import pytest

from rush_bench import progress
from rush_bench.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_at_the_end_with_the_time_left(clock):
    stream = io.StringIO()
    with Bar("attack", 100, 40, stream=stream) as bar:  # 40 were there already: the pace is that of the others
        for step in range(60):
            clock[0] += 4
            bar.advance(f"{step} %", title="pgd" if step > 30 else None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "attack: 43/100, 4 min left  2 %"
    assert lines[-2:] == ["pgd: 97/100, 12 s left  56 %", "pgd: 100/100, 0 s left  59 %"]
    assert len(lines) == 20


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_quiet_one_shows_notes_alone(clock, stream):
    with Bar("certify", 3, quiet=True, stream=stream) as bar:
        bar.note("failed: one")
        for _ in range(3):
            clock[0] += 100
            bar.advance()
    assert stream.getvalue() == "failed: one\n"


@pytest.mark.parametrize("name", ["[bold]/x", "resume[0]"])
def test_a_bar_on_a_terminal_shows_text_as_it_is(name):
    stream = Terminal()
    with Bar(name, 2, stream=stream) as bar:
        bar.advance(f"in {name}")
        bar.note(f"note of {name}")
    text = stream.getvalue()
    assert "\x1b[" in text and f"in {name}" in text and f"note of {name}" in text and "1/2" in text


def test_a_narrow_line_keeps_its_numbers(clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    with Bar("smoothadv-c10-tiny@1 square linf8-quick with pgd-published", 12, 1, stream=stream) as bar:
        bar.advance("84.7% right in the last chunk")
    *_, first, second = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).rstrip().splitlines()
    assert re.fullmatch(r"smoothadv-c10-tiny@1 square linf8.*… 2/12 \d:\d\d:\d\d left \S+", first.strip()) and len(first) <= 80
    assert second.strip() == "84.7% right in the last chunk"


def test_stages_follow_one_another_on_one_bar():
    stream = Terminal()
    with Bar(stream=stream) as bar:
        for stage in ("pretrain", "finetune"):
            bar.begin(stage, 2)
            bar.show(2, "loss 1.0")
            assert bar.rich is not None and [task.description for task in bar.rich.tasks] == [stage]
    assert bar.rich is None
