"""`rush-bench compare A B`: one call of `rush_bench.compare`."""

from pathlib import Path

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("first", metavar="A", shell_complete=complete.defense)
@click.argument("second", metavar="B", shell_complete=complete.defense)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    multiple=True,
    default=("results",),
    show_default=True,
    help="Folder that holds the runs, or a pack; repeatable.",
)
@click.option(
    "--seeds", is_flag=True, help="Compare means over all trainings that differ from A, or from B, in the seed alone."
)
@common.folder_option("--store", None, "Folder of the models, whose cards tell --seeds which those are.  [default: models]")
@common.as_json
def command(first: str, second: str, results: tuple[Path, ...], seeds: bool, store: Path | None, as_json: bool) -> None:
    """The accuracy of defence A minus that of B under each attack, paired over the images that both have.

    \b
    rush-bench compare rush-cifar10@64 noise_sup-cifar10@64
    rush-bench compare rush-cifar10@1 noise_sup-cifar10@1 --seeds
    """
    from rush_bench.api.compare import compare

    compared = compare(first, second, results, seeds=seeds, store=store)
    if as_json:
        common.print_json(common.records(compared.frame))
    else:
        common.print_rich(compared)
