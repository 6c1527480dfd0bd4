"""`rush-bench rm NAME`: one call of `rush_bench.api.files.rm`."""

from pathlib import Path

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("name", shell_complete=complete.model)
@common.store
@common.results
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(name: str, store: Path, results: Path, yes: bool) -> None:
    """Delete the model or encoder NAME and the records of the defence NAME, or the one record of that key.

    It prints what it would delete, and asks.
    """
    from rush_bench.api.files import found_to_remove, rm

    homes, cells = found_to_remove(name, store, results)
    for home in homes:
        click.echo(f"model {home}", err=True)
    if cells:
        click.echo(f"{len(cells)} cells in {results}", err=True)
    if not yes:
        click.confirm(f"delete {name}?", abort=True, err=True)
    rm(name, store=store, results=results)
