"""`rush-bench figure`: calls of `rush_bench.figure`, one a kind."""

from pathlib import Path

import click

from rush_bench.cli import common, complete

KINDS = ["eps", "draws", "waterfall", "attacks", "images", "cost"]


@click.command()
@click.argument("kinds", metavar="KIND[,KIND]", shell_complete=complete.words(lambda: KINDS, several=True))
@click.argument("results", type=click.Path(path_type=Path), default="results")
@common.folder_option("--out", None, "Folder of the figures.  [default: RESULTS, and settle/ in it]")
@click.option("--format", default="png", show_default=True, help="png, pdf or svg.")
@click.option("--defense", metavar="NAME", help="Draw only this defence; with images, show its predictions.")
@common.store
@common.data_dir
def command(
    kinds: str, results: Path, out: Path | None, format: str, defense: str | None, store: Path, data_dir: Path | None
) -> None:
    """Draw figures of RESULTS (default: results), from the records alone.

    \b
    eps        accuracy against the size of the perturbation
    draws      the effect of more draws, steps and votes (settle: T1, T3, T13)
    waterfall  the published evaluation corrected step by step (settle: T15)
    attacks    every attack of an audit beside the worst case
    images     clean and PGD-attacked images, with the prediction on each
    cost       the worst case against what training cost
    """
    from rush_bench.api.figure import figure

    for kind in common.parts(kinds):
        for path in figure(kind, results, out=out, format=format, defense=defense, store=store, data_dir=data_dir):
            click.echo(f"wrote {path}", err=True)
