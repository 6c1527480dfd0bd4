"""`Table`: a frame of numbers that prints as the command line prints it, and writes itself as CSV, Markdown, LaTeX or HTML."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult

from rush_bench.files import write_text
from rush_bench.records import CellResult
from rush_bench.report import tables, writers
from rush_bench.report.layout import TEXT, Layout, choose, drop_columns, lay_out, lift_shared_columns, measured_blocks
from rush_bench.report.terminal import Shown
from rush_bench.report.trainings import Trainings

FACTS = ("threat", "published_setting", "measured_as", "training_passes", *TEXT)  # that a printed table has no room for


class Table:
    """What was measured, as a table. `frame` has every number, a row per defence; `print` and a notebook show the rest.

    Accuracies are percent; `<column>_low` and `<column>_high` are the ends of the 95 % interval.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        layout: Layout,
        *,
        narrow: Layout | None = None,
        printed: Layout | None = None,
        title: str = "",
        about: str = "",
    ) -> None:
        self.frame, self.whole, self.title = frame, layout, title
        self.narrow, self.printed, self.about = narrow or layout, printed or layout, about  # for a terminal, for a paper

    def __str__(self) -> str:
        console = Console(markup=False, emoji=False, color_system=None)
        with console.capture() as text:
            console.print(self, highlight=False)
        return text.get().rstrip()

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Shown(self.narrow, self.title)

    def _repr_html_(self) -> str:
        return writers.to_html(measured_blocks(self.whole))

    def __len__(self) -> int:
        return len(self.frame)

    def to_csv(self, path: Path | str) -> Path:
        """Write all columns, percentages to two decimals, radii and fractions in full, empty where there is none."""
        writers.to_csv(self.frame, Path(path))
        return Path(path)

    def to_markdown(self, path: Path | str | None = None) -> str:
        """GitHub Markdown, written to `path` if there is one."""
        return _written(writers.markdown(self.whole), path)

    def to_latex(self, path: Path | str | None = None, *, caption: str | None = None, label: str | None = None) -> str:
        """A LaTeX table with booktabs, caption and label, that fits a column of a two-column paper, or its page.

        `caption` and `label` are LaTeX. Its columns are names and accuracies; for others take `select` before. Written to
        `path` if there is one.
        """
        return _written(writers.latex(self.printed, caption, label, self.about), path)

    def select(self, columns: Sequence[str]) -> "Table":
        """The same with these columns alone, in this order: `["defense", "clean", "worst"]`. Intervals come with their numbers.

        BadInput for a column that the table has not.
        """
        layout = choose(self.whole, columns)
        parts = [part for name in columns for part in tables.parts_of(name) if part in self.frame]
        return Table(self.frame[parts], layout, title=self.title, about=self.about)

    def write(
        self,
        folder: Path | str,
        formats: Sequence[str] = tables.FORMATS,
        *,
        caption: str | None = None,
        label: str | None = None,
    ) -> list[Path]:
        """Write `table.csv`, `.md` and `.tex` into a folder; returns the paths. BadInput for another format.

        `caption` and `label` are those of the LaTeX file.
        """
        paths = []
        for name in tables.check_formats(formats):
            paths.append(Path(folder) / f"table.{name}")
            if name == "csv":
                self.to_csv(paths[-1])
            elif name == "md":
                self.to_markdown(paths[-1])
            else:
                self.to_latex(paths[-1], caption=caption, label=label)
        return paths


def measured(results: Iterable[CellResult], style: str = "plain", trainings: Trainings | None = None) -> Table:
    """The table of cells of attacks: see `rush_bench.report.tables.table` for its rows and columns."""
    return of_frame(tables.table(results, style, trainings))


def of_frame(frame: pd.DataFrame) -> Table:
    """The table of a frame that `rush_bench.report.tables.table` made."""
    whole = lay_out(frame)
    printed = drop_columns(whole, FACTS)
    return Table(frame, whole, narrow=lay_out(frame, narrow=True), printed=printed, about=lift_shared_columns(printed)[1])


def text_table(
    frame: pd.DataFrame, header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", notes: Sequence[str] = ()
) -> Table:
    """A table whose words are made already: header and rows as text, beside the frame of their numbers."""
    cells = [[str(cell) for cell in row] for row in rows]
    layout = Layout(list(header), cells, {}, set(), [("", range(len(cells)))], [("", note) for note in notes])
    return Table(frame, layout, title=title)


def _written(text: str, path: Path | str | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text
