"""`rush-bench table`: read the records, write table.csv, .md and .tex, print it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput, unknown_name

STYLES = ("plain", "paper")
FORMATS = ("csv", "md", "tex")


@click.command()
@click.option("--style", default="plain", show_default=True, help="plain: all that was measured; paper: Table 1.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    multiple=True,
    default=("results",),
    show_default=True,
    help="Folder that holds the runs; repeatable: one table of them all.",
)
@common.folder_option("--out", None, "Folder for table.csv, table.md, table.tex.  [default: that of the first --results]")
@click.option("--format", "formats", default=",".join(FORMATS), show_default=True, help="Which files to write.")
@common.as_json
def command(style: str, results: tuple[Path, ...], out: Path | None, formats: str, as_json: bool) -> None:
    """Write and print the table of everything measured, from the records alone.

    `--style paper` lays out Table 1 of the RUSH paper: published numbers beside what was measured here. What was made of a
    record is kept in runs/.index.json until its files or the code change; without that file all are read again.
    """
    if style not in STYLES:
        raise unknown_name("table style", style, STYLES)
    wanted = [part.strip() for part in formats.split(",") if part.strip()]
    for part in wanted:
        if part not in FORMATS:
            raise unknown_name("table format", part, FORMATS)
    from rush_bench.evaluation.records import load_results
    from rush_bench.report import tables

    found = load_results(*results)
    if style == "plain" and not any(result.complete for result in found):
        places = ", ".join(map(str, results))
        raise BadInput(f"no finished cell under {places}; run `rush-bench attack` first, or point --results at its --out")
    frame = tables.table(found, style)
    writers: dict[str, Callable[..., Any]] = {"csv": tables.to_csv, "md": tables.to_markdown, "tex": tables.to_latex}
    for part in wanted:
        path = (out or results[0]) / f"table.{part}"
        writers[part](frame, path)
        click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(frame.to_json(orient="records", indent=2))
    else:
        common.print_rich(tables.to_rich(frame))
