"""`rush-bench export DEFENSE`: one call of `rush_bench.export`."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("defense")
@click.option("--attack", metavar="NAME", help="One attack alone: clean, pgd, worst, ...  [default: all]")
@common.results
@common.folder_option("--out", "export", "Folder of the files.")
def command(defense: str, attack: str | None, results: Path, out: Path) -> None:
    """Write x' and predictions of DEFENSE as npz files, one a finished cell (`rush-bench docs records` says what is in them)."""
    from rush_bench.api.files import export

    for path in export(defense, results, attack=attack, out=out):
        click.echo(path)
