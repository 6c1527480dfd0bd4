"""`rush-bench pull`: a model or a pack from the Hugging Face hub."""

from pathlib import Path

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput


@click.command()
@click.argument("url", metavar="hf://USER/NAME")
@click.option("--name", help="Name of the model in the store.  [default: its card's name]")
@click.option("--out", type=click.Path(path_type=Path), help="File of a pack.  [default: NAME.zip]")
@common.store
def command(url: str, name: str | None, out: Path | None, store: Path) -> None:
    """Download a model of rush-bench from hf://USER/NAME into --store, or a pack from hf://datasets/USER/NAME.

    Weights are checked against the SHA-256 of their card, and read without running code.
    """
    from rush_bench.hub import place_of, pull

    refused = {"model": ("--out", out), "dataset": ("--name", name)}[place_of(url).kind]
    if refused[1] is not None:
        raise BadInput(f"{refused[0]} is not for {url}; leave it out")
    click.echo(pull(url, store=store, name=name, out=out))
