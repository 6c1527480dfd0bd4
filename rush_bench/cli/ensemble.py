"""`rush-bench ensemble MODEL MODEL ...`: one call of `rush_bench.defenses.ensemble.make_ensemble`."""

from pathlib import Path

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("models", nargs=-1, required=True, shell_complete=complete.model)
@click.option("--name", required=True, help="Name of the new model in the store.")
@common.store
@common.as_json
def command(models: tuple[str, ...], name: str, store: Path, as_json: bool) -> None:
    """Make one model of several finished ones: the mean of their probabilities (Chen et al. 2020b).

    MODEL: a name in the store, NAME:best for its best epoch. The members' weights are copied.

    \b
    rush-bench ensemble ssp_rotation-cifar10 ssp_jigsaw-cifar10 ssp_selfie-cifar10 --name chen
    rush-bench attack --models chen --suite linf8
    """
    from rush_bench.defenses.ensemble import make_ensemble
    from rush_bench.store import read_card

    folder = make_ensemble(models, name=name, store=store)
    if as_json:
        common.print_json(read_card(folder.parent, name))
    else:
        click.echo(f"{', '.join(models)} are model {name!r} now: {folder}", err=True)
