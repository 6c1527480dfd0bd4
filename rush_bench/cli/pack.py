"""`rush-bench pack`: a results folder as one file."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False), default="results")
@common.store
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: RESULTS.zip]")
@click.option(
    "--adversarial", is_flag=True, help="Include the stored x', which galleries of images need; they are the largest part."
)
def command(results: Path, store: Path, out: Path | None, adversarial: bool) -> None:
    """Put RESULTS (default: results) into one file: records, tables, figures, audits, benchmark files, cards of models.

    table, compare, figure, report, list, show, export and merge read it like the folder. Weights are not in it.
    records.csv in it has a row per image of every record. `rush-bench unpack` makes a folder of it again.
    """
    from rush_bench.packs import pack

    path = pack(results, out, store=store, adversarial=adversarial)
    click.echo(f"{path.stat().st_size / 1e6:.1f} MB", err=True)
    click.echo(path)
