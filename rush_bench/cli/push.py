"""`rush-bench push`: a model or a pack to the Hugging Face hub."""

from pathlib import Path

import click

from rush_bench.cli import common


@click.command()
@click.argument("what", metavar="MODEL|PACK")
@click.argument("url", metavar="hf://USER/NAME")
@common.store
def command(what: str, url: str, store: Path) -> None:
    """Upload a model of --store to hf://USER/NAME, or a pack (rush-bench pack) to hf://datasets/USER/NAME.

    Weights are stored as safetensors, the card as card.json and, in words, as the README. Needs `hf auth login` once.
    """
    from rush_bench.hub import push

    click.echo(push(what, url, store=store))
