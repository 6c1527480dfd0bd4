"""`rush-bench unpack`: a pack as a results folder again."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("pack", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@common.folder_option("--out", None, "Folder to lay it into.  [default: PACK without .zip]")
def command(pack: Path, out: Path | None) -> None:
    """Lay the files of PACK into a folder, where attack, audit and run go on from them. What is there already stays.

    To read a pack this is not needed: table, compare, figure, report, list, show, export and merge take it as it is.
    """
    from rush_bench.packs import unpack

    folder, gained = unpack(pack, out)
    click.echo(f"{gained} files laid into it; the others were there already" if gained else "all of it was there", err=True)
    click.echo(folder)
