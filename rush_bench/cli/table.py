"""`rush-bench table`: read the records, write table.csv, .md and .tex, print it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput, unknown_name

if TYPE_CHECKING:
    from rush_bench.report.trainings import Training

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
@common.store
@click.option("--format", "formats", default=",".join(FORMATS), show_default=True, help="Which files to write.")
@common.as_json
def command(style: str, results: tuple[Path, ...], out: Path | None, store: Path, formats: str, as_json: bool) -> None:
    """Write and print the table of everything measured, from the records.

    Cards of the models in --store add what training cost; trainings that differ in their seed alone are one row, their mean,
    and a line each in the CSV.

    `--style paper` lays out Table 1 of the RUSH paper: published numbers beside what was measured here. What was made of a
    record is kept in runs/.index.json until its files or the code change; without that file all are read again.
    """
    if style not in STYLES:
        raise unknown_name("table style", style, STYLES)
    wanted = [part.strip() for part in formats.split(",") if part.strip()]
    for part in wanted:
        if part not in FORMATS:
            raise unknown_name("table format", part, FORMATS)
    from rush_bench.records import load_results
    from rush_bench.report import tables

    found = load_results(*results)
    if style == "plain" and not any(result.complete for result in found):
        places = ", ".join(map(str, results))
        raise BadInput(f"no finished cell under {places}; run `rush-bench attack` first, or point --results at its --out")
    frame = tables.table(found, style, trainings_of(store, {str(result.labels.get("sha256")) for result in found}))
    writers: dict[str, Callable[..., Any]] = {"csv": tables.to_csv, "md": tables.to_markdown, "tex": tables.to_latex}
    for part in wanted:
        path = (out or results[0]) / f"table.{part}"
        writers[part](frame, path)
        click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(frame.to_json(orient="records", indent=2))
    else:
        common.print_rich(tables.to_rich(frame))


def trainings_of(store: Path, measured: set[str]) -> "dict[str, Training]":
    """How the models came about that were measured, by the SHA-256 of their weights, as far as the store has their cards."""
    from rush_bench.store import read_cards

    cards = [card for card in read_cards(store).values() if measured & set(card["sha256"].values())]
    if not cards:
        return {}
    from rush_bench.report.cards import training_of

    return {digest: training_of(card) for card in cards for digest in card["sha256"].values()}
