"""`rush-bench attack`: one call of `rush_bench.attack`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rush_bench.cli import common, complete

if TYPE_CHECKING:
    from rush_bench.api.attack import AttackRun
    from rush_bench.attacks.suites import Suite


@click.command()
@click.option(
    "--suite",
    default="linf8",
    show_default=True,
    help="linf8, l2-0.5, linf8-quick, ... (`rush-bench list suites`).",
    shell_complete=complete.suite,
)
@click.option(
    "--attacks",
    metavar="NAMES",
    **common.NAMES,
    help="Run these instead of the suite's: clean,pgd,square,eot-apgd, any of `rush-bench list attacks`.",
    shell_complete=complete.attacks,
)
@click.option(
    "--models",
    metavar="PATTERNS",
    **common.NAMES,
    help="Models of the store: all, or rush@64,'acl*' (model or recipe names).",
    shell_complete=complete.models,
)
@common.model
@common.noise
@click.option(
    "--votes",
    type=click.IntRange(min=1),
    help="Votes of the smoothed --model, which is also attacked with one vote.  [default: 64]",
)
@common.name
@common.label
@click.option(
    "--dataset",
    help="Images to attack: a name, path/to/file.npz or a folder.  [default: what each model was trained on]",
    shell_complete=complete.dataset,
)
@common.size
@click.option("--n", "count", help="Images: a fixed stratified subset, or `all`.  [default: 1000]")
@click.option("--repeats", type=click.IntRange(min=1), help="Fresh predictions K per image.  [default: by votes]")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=100, show_default=True, help="Images per chunk, which is stored as one file."
)
@common.shard
@common.folder_option("--out", "results", "Folder for the runs.")
@common.store
@common.data_dir
@common.seed
@common.device
@common.precision
@common.memory
@common.max_minutes
@common.assignments
@common.as_json
def command(models: str | None, shard: str, out: Path, as_json: bool, **asked: Any) -> None:
    """Attack models of the store (--models all), or your own network (--model mypackage.nets:build).

    Running the same command again, from any number of processes, finishes the work. Settings of an attack are given
    as --set pgd.steps=40 (`rush-bench show pgd`).
    """
    defenses = common.defenses_of(asked, models, "attack")
    suite = asked_suite(asked["suite"], asked["attacks"], asked["sets"])
    with common.quiet_stdout():
        from rush_bench.api.attack import attack
        from rush_bench.evaluation.work import parse_shard

        given = {key: asked[key] for key in ("seed", "repeats", "chunk", "max_minutes")}
        given |= {"out": out, "shard": parse_shard(shard), "precision": common.stated("precision", asked)}
        run = attack(defenses, suite, asked["dataset"], **given, **common.by_name(asked))
    if as_json:
        common.print_json(summary(run))
    else:
        common.print_rich(run.table())
    common.finish(run, shard)


def asked_suite(suite: str, attacks: str | None, sets: tuple[str, ...]) -> "Suite":
    """The suite with the attacks and settings that were asked for."""
    from rush_bench.attacks.suites import parse_suite
    from rush_bench.settings import parse_assignments

    return parse_suite(suite, common.parts(attacks), parse_assignments(sets))


def summary(run: "AttackRun") -> dict[str, Any]:
    """What --json prints: cells, failures and the table's rows."""
    shown = ("defense", "dataset", "suite", "attack", "n")
    cells = [
        {key: result.labels.get(key) for key in shown}
        | {"folder": str(result.folder), "chunks": result.chunks, "chunks_done": result.chunks_done}
        for result in run.results
    ]
    clash = [str(found) for found in run.contradictions]
    rows = common.records(run.table().frame)
    return {"failed": run.failed, "cells": cells, "table": rows, "contradictions": clash}
