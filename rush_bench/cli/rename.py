"""`rush-bench rename OLD NEW`: one call of `rush_bench.api.files.rename`."""

from pathlib import Path

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("old", shell_complete=complete.model)
@click.argument("new")
@common.store
@common.results
def command(old: str, new: str, store: Path, results: Path) -> None:
    """Rename the model OLD of the store, and the defence OLD in the records, to NEW."""
    from rush_bench.api.files import rename

    in_store, cells = rename(old, new, store=store, results=results)
    click.echo(f"{old} is {new} now: {'the model, ' if in_store else ''}{cells} cells", err=True)
