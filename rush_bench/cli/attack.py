"""`rush-bench attack`: load defences and images, attack them a data set at a time, print the table."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rush_bench.cli import common
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    from rush_bench.attacks.suites import Suite
    from rush_bench.datasets import Images
    from rush_bench.defenses import Defense
    from rush_bench.evaluation.work import Run

DEFAULT_N = 1000


@click.command()
@click.option("--suite", default="linf8", show_default=True, help="linf8, l2-0.5, linf8-quick, ... (`rush-bench list suites`).")
@click.option("--columns", metavar="NAMES", help="Attacks of the suite to run: clean,pgd,eot.  [default: all]")
@click.option("--models", metavar="PATTERNS", help="Models of the store: all, or rush@64,'acl*' (model or recipe names).")
@click.option("--model", "target", metavar="PKG:BUILD", help="A network of your own: package.module:function.")
@click.option("--noise", metavar="LAW:SCALE", help="Smooth --model with uniform:0.3 or gaussian:0.25.")
@click.option("--votes", type=click.IntRange(min=1), help="Votes of the smoothed --model, beside one.  [default: 64]")
@common.name
@common.label
@click.option(
    "--dataset", help="Images to attack: a name, path/to/file.npz or a folder.  [default: what each model was trained for]"
)
@click.option("--size", type=click.IntRange(min=1), help="Side of the images in pixels.  [default: what the model takes]")
@click.option("--n", "count", default=None, help=f"Images: a fixed stratified subset, or `all`.  [default: {DEFAULT_N}]")
@click.option("--repeats", type=click.IntRange(min=1), help="Fresh predictions K per image.  [default: by votes]")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=100, show_default=True, help="Images worked on at once, kept as one file."
)
@common.shard
@common.folder_option("--out", "results", "Folder for the runs.")
@common.store
@common.data_dir
@common.seed
@common.device
@click.option("--precision", default="auto", show_default=True, help="Of the search: float32, bfloat16, auto (by device).")
@click.option("--memory", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="GiB an attack step may use.")
@common.max_minutes
@common.assignments
@common.as_json
def command(
    suite: str,
    columns: str | None,
    models: str | None,
    target: str | None,
    noise: str | None,
    votes: int | None,
    name: str | None,
    about: tuple[str, ...],
    dataset: str | None,
    size: int | None,
    count: str | None,
    repeats: int | None,
    chunk: int,
    shard: str,
    out: Path,
    store: Path,
    data_dir: Path | None,
    seed: int,
    device: str,
    precision: str,
    memory: float,
    max_minutes: float | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Attack models of the store (--models all), or a network of your own (--model mypackage.nets:build).

    Running the same command again, from any number of processes, finishes the work. Settings of an attack are given
    as --set pgd.steps=40 (`rush-bench show pgd`).
    """
    if (models is None) == (target is None):
        raise BadInput("say what to attack: --models all, or --model package.module:function")
    check_own(target, dataset, noise=noise, votes=votes, name=name, label=about)
    parsed = asked_suite(suite, columns, sets)
    images = Loader(data_dir, count, size)
    with common.quiet_stdout():
        from rush_bench.devices import choose_device
        from rush_bench.evaluation import runner
        from rush_bench.evaluation.work import Run, deadline_in, minutes_to, parse_shard

        part, deadline = parse_shard(shard), deadline_in(max_minutes)
        where = choose_device(device)
        chosen = common.choose_precision(precision, where, out)
        options = {"device": where, "precision": chosen, "memory": int(memory * 2**30)}
        if target is not None:
            assert dataset
            pairs = [own(target, images.load(dataset, None), noise, votes, options, name, about)]
        else:
            assert models
            pairs = stored(models.split(","), store, dataset, images, options)
        common.keep_precision(precision, chosen, out)
        run = Run([], folder=out)
        for defenses, data in pairs:
            left = minutes_to(deadline)
            run.extend(
                runner.attack(
                    defenses, parsed, data, out=out, seed=seed, repeats=repeats, chunk=chunk, shard=part, max_minutes=left
                )
            )
        from rush_bench.report import tables

        frame = tables.table(run.results, "plain")
    if as_json:
        common.print_json(summary(run, frame))
    else:
        common.print_rich(tables.to_rich(frame))
    common.finish(run, shard)


def asked_suite(suite: str, columns: str | None, sets: tuple[str, ...]) -> "Suite":
    """The suite with the columns and settings that were asked for."""
    from rush_bench.attacks.suites import parse_suite
    from rush_bench.settings import parse_assignments

    only = tuple(part.strip() for part in (columns or "").split(",") if part.strip())
    return parse_suite(suite, only, parse_assignments(sets))


class Loader:
    """Test images by name, each data set and size once."""

    def __init__(self, data_dir: Path | None, count: str | None, size: int | None, default: int = DEFAULT_N) -> None:
        check_count(count)
        self.data_dir, self.count, self.size, self.default = data_dir, count, size, default
        self.loaded: dict[tuple[str, int | tuple[int, ...] | None], Images] = {}

    def load(self, name: str, size: tuple[int, ...] | None) -> "Images":
        """The subset that was asked for; `size` is what the model takes, unless --size says otherwise."""
        from rush_bench.datasets import load_dataset

        key = (name, self.size or size)
        if key not in self.loaded:
            place: dict[str, Any] = {"data_dir": self.data_dir, "size": key[1]}
            if self.count == "all":
                self.loaded[key] = load_dataset(name, "test", **place)
            else:
                # The default is so many or all there are, yet always in the order in which subsets nest.
                wanted = int(self.count) if self.count else min(self.default, len(load_dataset(name, "test", **place)))
                self.loaded[key] = load_dataset(name, "test", wanted, **place)
        return self.loaded[key]


def check_count(count: str | None) -> None:
    """Refuse an --n that is no number of images."""
    from rush_bench.settings import parse_count

    if count not in (None, "all") and parse_count(count, 0) < 1:
        raise BadInput(f"--n takes a number of images or `all`, not {count!r}")


def check_own(target: str | None, dataset: str | None, **options: Any) -> None:
    """Refuse options of --model without it, --votes without --noise, and --model without --dataset."""
    given = [f"--{key}" for key, value in options.items() if value]
    if target is None and given:
        raise BadInput(
            f"{', '.join(given)} without --model: a model of the store has its own noise, name and labels; votes as in rush@64"
        )
    if target is not None and not dataset:
        raise BadInput("--model needs --dataset: which images is the network for?")
    if options.get("votes") and not options.get("noise"):
        raise BadInput("--votes needs --noise: without noise every vote is the same")


def own(
    target: str,
    data: "Images",
    noise: str | None,
    votes: int | None,
    options: dict[str, Any],
    name: str | None,
    about: Iterable[str],
) -> tuple[list["Defense"], "Images"]:
    """The user's network, with the images it is to be attacked on; what the command line says of it holds or is refused."""
    from rush_bench.defenses import from_target
    from rush_bench.settings import parse_assignments

    source = click.get_current_context().get_parameter_source
    said = {key: value for key, value in options.items() if source(key) is ParameterSource.COMMANDLINE}
    labels = {key.replace("-", "_").replace(" ", "_"): text for key, text in parse_assignments(about).items()}
    return from_target(
        target, noise=noise, votes=votes, shape=data.shape, name=name, about=labels, defaults=options, **said
    ), data


def stored(
    patterns: list[str], store: Path, dataset: str | None, images: Loader, options: dict[str, Any]
) -> list[tuple[list["Defense"], "Images"]]:
    """Models of the store grouped by the images that they take: data set and size."""
    from rush_bench.datasets.loading import find_source
    from rush_bench.defenses import load_defenses
    from rush_bench.registry import datasets

    name = find_source(dataset).name if dataset else None  # a wrong name is told as such, not as "no models for it"
    groups: dict[tuple[str, tuple[int, ...]], list[Defense]] = {}
    for defense in load_defenses([p.strip() for p in patterns if p.strip()], store=store, dataset=name, **options):
        groups.setdefault((str(defense.labels()["dataset"]), defense.shape[1:]), []).append(defense)
    for trained_for, _ in groups:
        if not dataset and trained_for not in datasets.entries:
            raise BadInput(
                f"some models were trained for {trained_for!r}, which is no registered data set; "
                f"give its file: --dataset path/to/{trained_for}.npz"
            )
    return [(group, images.load(dataset or key[0], key[1])) for key, group in groups.items()]


def summary(run: "Run", frame: Any) -> dict[str, Any]:
    """What --json prints: cells, failures and the table's rows."""
    import json

    shown = ("defense", "dataset", "suite", "attack", "n")
    cells = [
        {key: result.labels.get(key) for key in shown}
        | {"folder": str(result.folder), "chunks": result.chunks, "chunks_done": result.chunks_done}
        for result in run.results
    ]
    clash = [str(found) for found in run.contradictions]
    return {"failed": run.failed, "cells": cells, "table": json.loads(frame.to_json(orient="records")), "contradictions": clash}
