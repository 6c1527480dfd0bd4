"""`rush-bench report`: one HTML file of all that a results folder holds."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("results", type=click.Path(path_type=Path), default="results")
@common.store
@common.data_dir
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file to write.  [default: report.html in RESULTS, for a pack in the folder of its name]",
)
@click.option("--title", help="Title of the page.  [default: the folder's name]")
@click.option("--reference", metavar="MODEL", help="Reference model of mCE under corruptions; without it, there is no mCE.")
def command(
    results: Path, store: Path, data_dir: Path | None, out: Path | None, title: str | None, reference: str | None
) -> None:
    """Write one HTML file of everything in RESULTS, a folder or a pack (default: results).

    It has tables, figures, images, certificates and verdicts, and needs no internet connection and no other file. Every number
    shows its full value and links to the record that it was computed from. Cards and learning curves of the models are
    included if --store has them.
    """
    from rush_bench.report.page import write_page

    with common.quiet_stdout():
        path = write_page(results, out, store=store, title=title, reference=reference, data_dir=data_dir)
    click.echo(path)
