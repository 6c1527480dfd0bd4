"""`rush-bench train NAME`: one call of `rush_bench.training.train`."""

import os
from pathlib import Path
from typing import Any

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("name", shell_complete=complete.recipe)
@click.option(
    "--dataset",
    required=True,
    help="Data set to train the classifier on: a name, or path/to/file.npz.",
    shell_complete=complete.dataset,
)
@click.option("--from", "from_", metavar="NAME|FILE", help="Encoder or model of the store, or checkpoint file, to start from.")
@click.option("--protocol", help="SLF, NSLF, ALF or AFF (`rush-bench docs finetuning`); short for --set finetune.protocol=...")
@click.option("--noise", help="Law of the noise, uniform:0.3, gaussian:0.25 or laplace:0.1; short for --set noise=...")
@click.option("--pretrain-on", help="What the encoder is pre-trained on.  [default: the data set itself]")
@click.option("--preset", default="short", show_default=True, help="paper, short, smoke or demo.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings.")
@common.assignments
@click.option("--name", "model", help="Name of the model.  [default: NAME-DATASET]")
@common.store
@common.data_dir
@common.seed
@common.device
@common.max_minutes
@click.option(
    "--log", default="", metavar="tensorboard", help="Also write the curves as TensorBoard's events; log.jsonl always has them."
)
@common.as_json
def command(name: str, model: str | None, as_json: bool, **options: Any) -> None:
    """Train the defence NAME (see `rush-bench list defenses`); the same command again continues where it stopped.

    `rush-bench train finetune --from ENCODER --protocol SLF` puts a head on any encoder (`rush-bench list encoders`), on a
    finished model's too; a supervised recipe with --from starts from such weights.

    `torchrun --nproc-per-node 4 -m rush_bench train ...` splits every step between four processes.

    Settings come from the preset, then the TOML file, then each --set (`rush-bench show NAME` prints them).
    """
    from rush_bench.registry import recipes

    recipes.get(name)  # a wrong name is refused at once, before torch is imported
    from rush_bench.training import train

    with common.quiet_stdout():
        folder = train(name, name=model, **options)
    if os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes the first speaks
    if as_json:
        from rush_bench.files import read_json

        common.print_json(read_json(folder / "card.json"))
    else:
        click.echo(f"trained: {folder}", err=True)
