"""`rush-bench export DEFENSE`: one call of `rush_bench.api.files.export`."""

from pathlib import Path

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("defense", shell_complete=complete.defense)
@click.option("--attack", metavar="NAME", help="Only this attack: clean, pgd, worst, ...  [default: all]")
@common.results
@common.folder_option("--out", "export", "Folder of the files.")
def command(defense: str, attack: str | None, results: Path, out: Path) -> None:
    """Write x' and predictions of DEFENSE as npz files, one per finished cell.

    Each has `index`, `label`, `predicted` (the class of most of `repeats` predictions), `correct`, `counts` by class, and `x`,
    the attacked images (float32 in [0, 1]), where the records still have them.
    """
    from rush_bench.api.files import export

    for path in export(defense, results, attack=attack, out=out):
        click.echo(path)
