"""`rush-bench import FILE`: one call of `rush_bench.defenses.published.import_checkpoint`."""

from pathlib import Path
from typing import Any

import click

from rush_bench.cli import common


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the model in the store.")
@click.option("--dataset", required=True, help="Data set that it was trained on: a name, or path/to/file.npz.")
@click.option(
    "--as", "as_", type=click.Choice(["model", "encoder"]), default="model", show_default=True, help="encoder: no head."
)
@click.option("--bn-route", type=click.IntRange(min=0), help="BatchNorm route: 0 clean, 1 attacked.  [default: 1]")
@click.option("--head", type=click.Path(path_type=Path), help="File of the linear classifier (RoCL's _linear).")
@click.option("--recipe", help="Recipe, where several use the same keys: acl, dynacl, air, rcs, ...  [default: by the keys]")
@click.option(
    "--network", help="Network of the file: resnet18, resnet50, ...; with whatever no tensor shows: resnet18,padding=2."
)
@click.option("--protocol", help="SLF, ALF, AFF, ...; no file states it.  [default: by its family, where that leaves no doubt]")
@click.option("--pretrain-dataset", help="What the encoder was pre-trained on.  [default: the data set]")
@click.option("--extra-data", help="Training data beyond the data set.  [default: the family's]")
@click.option("--noise", help="Law of a smoothed model, gaussian:0.25, or none: needed for Cohen and SmoothAdv.")
@click.option(
    "--normalise",
    metavar="HOW",
    help="Normalisation, if the file does not state it: none, imagenet, cifar10, cifar100, deepmind, cohen, centre, "
    "halves, or m,m,m/s,s,s by channel.  [default: the family's]",
)
@click.option(
    "--expect-clean",
    metavar="PART",
    help="Clean accuracy that 500 test images must agree with, such as 0.84, or none.  [default: the published one, if known]",
)
@common.store
@common.data_dir
@common.device
@common.as_json
def command(file: Path, name: str, device: str, as_json: bool, **options: Any) -> None:
    """Bring published weights into the store: as a model, or with --as encoder for `train finetune --from`.

    It reads files of ACL, DynACL, AIR, RCS, AdvCL, A-InfoNCE, RoCL, DeACL, TRADES (WideResNet and kuangliu's ResNet),
    Chen 2020b, Cohen, SmoothAdv, Rebuffi 2021 and MadryLab's robustness; encoders of solo-learn and lightly, and plain ResNets
    (torchvision, timm, kuangliu).

    The family is recognised by the keys, and normalisation becomes part of the network. A file with keys that are not
    accounted for is refused. Files are read without running pickled code.
    """
    from rush_bench.defenses.published import import_checkpoint
    from rush_bench.devices import choose_device

    with common.quiet_stdout():
        done = import_checkpoint(file, name, device=choose_device(device), **options)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    source = done.card["source"]
    if as_json:
        common.print_json(done.card)
    else:
        click.echo(f"{source['family']} is {options['as_']} {name!r} now: {done.folder}", err=True)
