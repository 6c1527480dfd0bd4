"""`rush-bench certify`: certify smoothed models, or read certificates back and compare them with a table."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd

    from rush_bench.certify.check import Comparison
    from rush_bench.records import CellResult

DEFAULT_N = 500


@click.command()
@click.argument("patterns", metavar="[MODELS]", required=False)
@click.option("--model", "target", metavar="PKG:BUILD", help="A network of your own, with --noise: package.module:function.")
@click.option("--noise", metavar="LAW:SCALE", help="Noise of --model: gaussian:0.25 or uniform:0.3.")
@common.name
@common.label
@click.option("--dataset", help="Images to certify: a name, or path/to/file.npz.  [default: what each model was trained for]")
@click.option("--size", type=click.IntRange(min=1), help="Side of the images in pixels.  [default: what the model takes]")
@click.option("--n", "count", help=f"Images: a fixed stratified subset, or `all`.  [default: {DEFAULT_N}]")
@click.option(
    "--mode", default="fixed", show_default=True, help="fixed, staged (stops early) or target (one radius, yes or no)."
)
@click.option("--norm", help="l2 for Gaussian noise, l1 or linf for uniform, l1 for Laplace.  [default: the first of the law]")
@click.option("--radius", "radii", multiple=True, metavar="R", help="Radius to report, to settle (staged) or decide (target).")
@click.option("--n0", "selection", type=int, default=100, show_default=True, help="Draws that select the class.")
@click.option("--draws", "--N", type=int, default=100_000, show_default=True, help="Draws that bound its probability.")
@click.option("--alpha", default="0.001", show_default=True, help="Chance that an image's certificate is wrong.")
@click.option("--hope", default="0.05", show_default=True, help="staged, target: level at which a radius is given up.")
@common.shard
@common.folder_option("--out", "results", "Results folder; certificates go to certificates/ in it.")
@common.store
@common.data_dir
@common.seed
@common.device
@click.option("--memory", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="GiB a pass may use.")
@common.max_minutes
@click.option(
    "--read", multiple=True, metavar="PATH", type=click.Path(path_type=Path), help="Read certificates instead; repeatable."
)
@click.option(
    "--table", "reference", type=click.Path(path_type=Path), help="With --read: a table of best models to compare with."
)
@common.as_json
def command(
    patterns: str | None,
    target: str | None,
    noise: str | None,
    name: str | None,
    about: tuple[str, ...],
    dataset: str | None,
    size: int | None,
    count: str | None,
    mode: str,
    norm: str | None,
    radii: tuple[str, ...],
    selection: int,
    draws: int,
    alpha: str,
    hope: str,
    shard: str,
    out: Path,
    store: Path,
    data_dir: Path | None,
    seed: int,
    device: str,
    memory: float,
    max_minutes: float | None,
    read: tuple[Path, ...],
    reference: Path | None,
    as_json: bool,
) -> None:
    """Certify smoothed models of the store (MODELS: all, or rush,'noise*'), or a network of your own (--model, --noise).

    \b
    rush-bench certify noise_sup --dataset cifar10 --mode staged --radius 0.25 --radius 0.5
    rush-bench certify --read FOLDER --table radii_to_best_models.tsv

    Running the same command again, from any number of processes, finishes the work.
    """
    from rush_bench.settings import parse_number

    wanted = tuple(parse_number(radius) for radius in radii)
    if read:
        if patterns or target:
            raise BadInput("--read reads certificates that are there; leave out the models")
        show_read(list(read), reference, wanted, as_json)
        return
    if reference:
        raise BadInput("--table goes with --read: which certificates is it to be compared with?")
    if (patterns is None) == (target is None):
        raise BadInput("say what to certify: rush-bench certify all, or --model package.module:function --noise gaussian:0.25")
    from rush_bench.cli.attack import Loader, check_own, own, stored

    check_own(target, dataset, noise=noise, name=name, label=about)
    from rush_bench.certify.sampling import Sampling

    settings = Sampling(mode, selection, draws, parse_number(alpha), wanted, parse_number(hope))  # type: ignore[arg-type]
    with common.quiet_stdout():
        from rush_bench.devices import choose_device
        from rush_bench.evaluation.certificates import certify
        from rush_bench.evaluation.work import Run, deadline_in, minutes_to, parse_shard

        images = Loader(data_dir, count, size, DEFAULT_N)
        options = {"device": choose_device(device), "memory": int(memory * 2**30)}
        if target is not None:
            assert dataset
            pairs = [own(target, images.load(dataset, None), noise, 1 if noise else None, options, name, about)]
        else:
            assert patterns
            pairs = stored(patterns.split(","), store, dataset, images, options)
        part, deadline = parse_shard(shard), deadline_in(max_minutes)
        whole = Run([], folder=out)
        for defenses, data in pairs:
            left = minutes_to(deadline)
            whole.extend(certify(defenses, data, settings, norm=norm, out=out, seed=seed, shard=part, max_minutes=left))
    whole.contradictions = show_results(whole.results, wanted, out, as_json)
    common.finish(whole, shard, "certificates wait")


def show_results(asked: "list[CellResult]", radii: tuple[float, ...], out: Path, as_json: bool) -> "list[Comparison]":
    """Print what was certified and draw the curve; returns the attacks that a certificate contradicts."""
    from rush_bench.certify.check import FOLDER, contradictions
    from rush_bench.certify.tsv import frame_of
    from rush_bench.records import load_results
    from rush_bench.report import certificates

    whole = [result for result in asked if result.complete]
    sets = {certificates.name_of(result): frame_of(result) for result in whole}
    at = radii or certificates.shared_radii(whole)
    if whole:
        norms = {str(result.labels["norm"]) for result in whole}
        certificates.figure(sets, out / FOLDER / "curve.png", norms.pop() if len(norms) == 1 else "radius")
    attacks = [*load_results(out), *load_results(out / "settle")]
    clash = contradictions(whole, {result.folder: result for result in attacks}.values())
    if as_json:
        found = [
            {key: result.labels.get(key) for key in ("defense", "dataset", "law", "scale", "norm", "alpha", "suite")}
            | {"folder": str(result.folder), "chunks": result.chunks, "chunks_done": result.chunks_done}
            | (certificates.summary(frame_of(result), at) if result.complete else {})
            for result in asked
        ]
        common.print_json({"certificates": found, "contradictions": [str(one) for one in clash]})
    elif whole:
        print_frame("certified accuracy (%)", certificates.table(sets, at))
    return clash


def show_read(places: list[Path], reference: Path | None, radii: tuple[float, ...], as_json: bool) -> None:
    """Certificates read back: their table, and line by line a reference table; exit code 1 where a line differs."""
    from rush_bench.certify.tsv import read_folder
    from rush_bench.report import certificates

    sets = read_folder(places)
    at = radii or certificates.DEFAULT_RADII
    compared = certificates.compare(sets, reference) if reference else None
    if as_json:
        lines = None if compared is None else compared.to_dict(orient="records")
        common.print_json({"certificates": {k: certificates.summary(v, at) for k, v in sets.items()}, "table": lines})
    else:
        print_frame("certified accuracy (%)", certificates.table(sets, at))
        if compared is not None:
            print_frame("best certified accuracy, beside the reference table", compared)
    if compared is not None:
        differ = int((~compared["same"]).sum())
        click.echo(f"{len(compared)} lines compared with {reference}, {differ} differ", err=True)
        if differ:
            raise click.exceptions.Exit(1)


def print_frame(title: str, frame: "pd.DataFrame") -> None:
    """A frame as a small table on stdout."""
    common.print_rows(title, [str(name) for name in frame.columns], [[str(v) for v in row] for row in frame.to_numpy()])
