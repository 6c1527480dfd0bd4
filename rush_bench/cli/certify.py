"""`rush-bench certify`: one call of `rush_bench.certify`; or certificates read back and compared with a table."""

from pathlib import Path
from typing import Any

import click

from rush_bench.cli import common, complete
from rush_bench.errors import BadInput


@click.command()
@click.argument("patterns", metavar="[MODELS]", required=False, shell_complete=complete.models)
@common.model
@common.noise
@common.name
@common.label
@click.option("--dataset", help="Images to certify: a name, or path/to/file.npz.  [default: what each model was trained on]")
@common.size
@click.option("--n", "count", help="Images: a fixed stratified subset, or `all`.  [default: 500]")
@click.option(
    "--mode", default="fixed", show_default=True, help="fixed, staged (stops early) or target (one radius, yes or no)."
)
@click.option("--norm", help="l2 for Gaussian noise, l1 or linf for uniform, l1 for Laplace.  [default: the first of the law]")
@click.option(
    "--radius", "radii", multiple=True, metavar="R", help="Radius to report (fixed), or to decide (staged, target); repeatable."
)
@click.option("--n0", "selection", type=int, default=100, show_default=True, help="Draws that select the class.")
@click.option("--draws", "--N", type=int, default=100_000, show_default=True, help="Draws that bound its probability.")
@click.option("--alpha", default="0.001", show_default=True, help="Chance that an image's certificate is wrong.")
@click.option("--give-up-level", default="0.05", show_default=True, help="staged, target: level at which a radius is given up.")
@common.shard
@common.folder_option("--out", "results", "Results folder; certificates go to certificates/ in it.")
@common.store
@common.data_dir
@common.seed
@common.device
@common.memory
@common.max_minutes
@click.option(
    "--read", multiple=True, metavar="PATH", type=click.Path(path_type=Path), help="Read certificates instead; repeatable."
)
@click.option(
    "--table", "reference", type=click.Path(path_type=Path), help="With --read: a table of best models to compare with."
)
@common.as_json
def command(
    patterns: str | None, shard: str, read: tuple[Path, ...], reference: Path | None, as_json: bool, **asked: Any
) -> None:
    """Certify smoothed models of the store (MODELS: all, or rush,'noise*'), or your own network (--model, --noise).

    \b
    rush-bench certify noise_sup --dataset cifar10 --mode staged --radius 0.25 --radius 0.5
    rush-bench certify --read FOLDER --table radii_to_best_models.tsv

    Running the same command again, from any number of processes, finishes the work.
    """
    radii = sampling(asked)["radii"]
    if read:
        if patterns or asked["target"]:
            raise BadInput("--read reads certificates that are there; leave out the models")
        show_read(list(read), reference, radii, as_json)
        return
    if reference:
        raise BadInput("--table goes with --read: which certificates is it to be compared with?")
    defenses = common.defenses_of(asked, patterns, "certify")
    with common.quiet_stdout():
        from rush_bench.api.certify import certify
        from rush_bench.evaluation.work import parse_shard

        given = {key: asked[key] for key in ("norm", "out", "seed", "max_minutes")}
        run = certify(defenses, asked["dataset"], shard=parse_shard(shard), **given, **sampling(asked), **common.by_name(asked))
    if as_json:
        common.print_json(
            {"certificates": run.summaries(), "contradictions": [str(contradiction) for contradiction in run.contradictions]}
        )
    elif any(result.complete for result in run.results):
        common.print_rich(run.table())
    common.finish(run, shard, "certificates wait")


def sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """The settings of sampling, numbers as numbers."""
    from rush_bench.settings import parse_number

    found: dict[str, Any] = {key: asked[key] for key in ("mode", "selection", "draws")}
    found |= {key: parse_number(asked[key]) for key in ("alpha", "give_up_level")}
    return found | {"radii": tuple(parse_number(radius) for radius in asked["radii"])}


def show_read(places: list[Path], reference: Path | None, radii: tuple[float, ...], as_json: bool) -> None:
    """Certificates read back: their table, and line by line a reference table; exit code 1 where a line differs."""
    from rush_bench.certificates.tsv import read_folder
    from rush_bench.report import certificates

    sets = read_folder(places)
    at = radii or certificates.DEFAULT_RADII
    compared = certificates.compare(sets, reference) if reference else None
    if as_json:
        lines = None if compared is None else compared.to_dict(orient="records")
        common.print_json({"certificates": {k: certificates.summary(v, at) for k, v in sets.items()}, "table": lines})
    else:
        common.print_rich(certificates.table(sets, at))
        if compared is not None:
            common.print_frame("best certified accuracy, beside the reference table", compared)
    if compared is not None:
        differ = int((~compared["same"]).sum())
        click.echo(f"{len(compared)} lines compared with {reference}, {differ} differ", err=True)
        if differ:
            raise click.exceptions.Exit(1)
