"""`rush-bench merge FOLDER ...`: one call of `rush_bench.api.files.merge`."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("sources", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.folder_option("--into", "results", "Results folder to copy into.")
def command(sources: tuple[Path, ...], into: Path) -> None:
    """Copy the records of other results FOLDERs, or packs, into one: records of attacks, audits, certificates, corruptions.

    Existing files stay. Records of different code under one key are refused.
    """
    from rush_bench.api.files import merge

    click.echo(f"{merge(sources, into)} chunks copied into {into}", err=True)
