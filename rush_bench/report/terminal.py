"""A layout on a terminal of any width: no number is folded, and what has no room is named.

By the room there is: all on a line; what is the same in every row above the table; intervals below their numbers; columns left
out, the least telling first; rows upright, a line per column.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Span, Text

from rush_bench.report.layout import Layout, drop_columns, flush_left, folded, header, lift_shared_columns, measured_blocks
from rush_bench.report.writers import cells_of

# left out in this order; what a row is and its worst case stay to the last
LEAST: tuple[str, ...] = (
    "training_passes",
    "setting",
    "published_setting",
    "budget",
    "extra_data",
    "architecture",
    "protocol",
    "aa_bank",
)
LEAST += ("apgd_bank", "measured_aa_bank", "measured_aa_fresh", "square", "measured_square", "apgd", "measured_apgd", "K", "n")
LEAST += ("measured_as", "threat", "worst_any10", "published_standard", "eot", "measured_eot", "aa", "measured_aa", "dataset")
LEAST += ("pgd", "measured_pgd", "published_pgd", "suite", "seed", "clean", "measured_standard", "published_aa")
LEAST += ("Weighs as", "Seconds", "Passes if")  # of findings and trials
WITHIN = LEAST.index("K")  # where others are left out
MOST = ("method", "worst", "measured_worst")
FOLDS = (48, 32, 24, 16)  # letters of a line of words, where they must be folded
BELOW = "Below each number its 95 % interval."
NAMES = ("defense", "dataset")  # which are chosen by these very letters: never folded


class Shown:
    """A layout that rich prints in the width that there is."""

    def __init__(self, layout: Layout, title: str = "") -> None:
        self.layout, self.title = measured_blocks(layout), title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fit(self.layout, self.title, options.max_width)


def fit(layout: Layout, title: str, width: int) -> RenderableType:
    """The fullest form of the table that is no wider than `width`."""

    def fits(table: list[Text]) -> bool:
        return table[0].cell_len <= width

    table = grid(layout)
    if fits(table):
        return _with_notes([_Lines(table)], layout, [title])
    layout, shared = lift_shared_columns(layout)
    above = [title, shared]
    if fits(table := grid(layout)):
        return _with_notes([_Lines(table)], layout, above)
    left_out: list[str] = []
    attacks = layout.columns if {"defense", "method"} & set(layout.columns) else ()
    others = [name for name in attacks if name not in (*LEAST, *NAMES, *MOST)]  # attacks that nobody foresaw
    for name in ("", *LEAST[:WITHIN], *others, *LEAST[WITHIN:]):
        if name and name not in layout.columns:
            continue
        if name:
            left_out.append(header(name))
            layout = drop_columns(layout, (name,))
        for fold in FOLDS:
            if fits(table := grid(layout, fold)):
                return _with_notes([_Lines(table)], layout, above, _no_room_for(left_out), BELOW)
    return _with_notes(one_line_per_column(layout), layout, above, _no_room_for(left_out))


def grid(layout: Layout, fold: int | None = None) -> list[Text]:
    """Its lines, all of one width; with `fold` intervals stand below their numbers and words are folded to that many letters.

    All is `Text`: no name is read as markup, whatever is in it. (rich's own table takes eight times as long.)
    """
    left = flush_left(layout)
    head = [folded(header(name), 12 if fold else 16).split("\n") for name in layout.columns]
    rows = {i: [cell.split("\n") for cell in _row(layout, i, fold)] for _, span in layout.blocks for i in span}
    columns = list(zip(head, *rows.values(), strict=True))
    columns[0] += tuple([heading] for heading, _ in layout.blocks)
    widths = [max(cell_len(line) for cell in column for line in cell) for column in columns]

    def line(words: Iterable[str]) -> str:
        padded = []
        for word, width, flush in zip(words, widths, left, strict=True):
            space = " " * (width - cell_len(word))
            padded.append(word + space if flush else space + word)
        return f" {'  '.join(padded)} "

    upwards = list(zip_longest(*(reversed(cell) for cell in head), fillvalue=""))
    blank = Text(line([""] * len(widths)))
    found = [blank, *(styled(line(words), "bold") for words in reversed(upwards)), Text(f" {'─' * (len(blank) - 2)} ")]
    for k, (heading, span) in enumerate(layout.blocks):
        if heading:
            found += [blank] * (k > 0) + [styled(line([heading, *[""] * (len(widths) - 1)]), "italic")]
        for i in span:
            lines = [Text(line(words)) for words in zip_longest(*rows[i], fillvalue="")]
            at = 1
            for c, (first, *_) in enumerate(rows[i]):
                space = widths[c] - cell_len(first)
                if (i, c) in layout.bold:
                    start = at if left[c] else at + space
                    lines[0].stylize("bold", start, start + len(first.split()[0]))
                at += len(first) + space + 2
            found += lines
    return [*found, blank]


def one_line_per_column(layout: Layout) -> Iterable[Text]:
    """Rows one below the other: its name, then a line per column."""
    heads = [header(name) for name in layout.columns]
    wide = max(map(len, heads))
    for heading, span in layout.blocks:
        if heading:
            yield Text(heading, style="italic")
        for i in span:
            first, *rest = cells_of(layout, i, str, "{}", " {}")
            yield Text("\n".join([first, *(f"  {h:{wide}}  {text}" for h, text in zip(heads[1:], rest, strict=True))]))


def _with_notes(table: Iterable[RenderableType], layout: Layout, above: Sequence[str], *below: str) -> Group:
    notes = [*(text for text in below if text), *(f"{mark}: {text}" if mark else text for mark, text in layout.notes)]
    parts: list[RenderableType] = [Text(text, style="bold") for text in above if text]
    return Group(*parts, *table, *(Text(text, style="dim") for text in notes))


class _Lines:
    """Lines that fit, each with its line feed. (rich would look for a place to fold each of them.)"""

    def __init__(self, lines: Iterable[Text]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line.render(console, "\n")


def styled(line: str, style: str) -> Text:
    """A line all of whose letters have a style."""
    return Text(line, spans=[Span(0, len(line), style)])


def _no_room_for(left_out: Sequence[str]) -> str:
    return f"No room for {', '.join(left_out)}: in a wider window, or in the files." if left_out else ""


def _row(layout: Layout, i: int, fold: int | None) -> list[str]:
    cells = cells_of(layout, i, str, "{}", " {}")
    if fold is None:
        return cells
    return [text if name in NAMES else _stacked(text, fold) for name, text in zip(layout.columns, cells, strict=True)]


def _stacked(text: str, fold: int) -> str:
    """A number above its interval; words folded between words."""
    number = re.fullmatch(r"([^\[\]]*\d[^\[\]]*) \[([-+\d.]+), ([-+\d.]+)\](.*)", text)
    if number is None:
        return folded(text, fold)
    ends = f"[{number[2]}, {number[3]}]" if number[3][0] in "+-" else f"{number[2]}–{number[3]}"
    return f"{number[1]}{number[4]}\n{ends}"
