"""`rush-bench unpack`: a pack as a results folder again."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("pack", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@common.folder_option("--out", None, "Folder to extract into.  [default: PACK without .zip]")
def command(pack: Path, out: Path | None) -> None:
    """Extract PACK into a folder, so that attack, audit and run can add to it. Existing files stay.

    Reading needs no unpacking: table, compare, figure, report, list, show, export and merge accept a pack.
    """
    from rush_bench.packs import unpack

    folder, gained = unpack(pack, out)
    click.echo(f"{gained} files laid into it; the others were there already" if gained else "all of it was there", err=True)
    click.echo(folder)
