"""`rush-bench run FILE`: one call of `rush_bench.bench.run.run`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    from rush_bench.bench.plan import Planned


@click.command()
@click.argument("file", required=False)
@click.option("--list", "list_shipped", is_flag=True, help="List the shipped benchmarks.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what is done, what is missing and what it would cost, and stop.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, each of one thread.")
@click.option("--on", metavar="CLUSTER:N", help="N processes as jobs of submitit: slurm:8, or local:4 on this machine.")
@click.option(
    "--ask",
    "asked",
    multiple=True,
    metavar="KEY=VALUE",
    help="Resources of each job of --on: timeout_min=60, gpus_per_node=1.",
)
@common.folder_option("--out", None, "Folder for records, tables and figures.  [default: the file's]")
@common.folder_option("--store", None, "Folder of the models.  [default: the file's, else models]")
@common.data_dir
@common.device
@common.max_minutes
@click.option("--worker", is_flag=True, hidden=True)
@common.as_json
def command(
    file: str | None,
    list_shipped: bool,
    plan_only: bool,
    workers: int,
    on: str | None,
    asked: tuple[str, ...],
    out: Path | None,
    store: Path | None,
    data_dir: Path | None,
    device: str,
    max_minutes: float | None,
    worker: bool,
    as_json: bool,
) -> None:
    """Run a benchmark FILE (TOML), or a shipped one by its name: train, attack, write the tables (`rush-bench docs run`).

    \b
    rush-bench run demo
    rush-bench run table1.toml --plan
    rush-bench run table1.toml --workers 2

    It first prints a plan: what is done, what is missing and what the rest costs. Running the same command again, from any
    number of processes, finishes the work. Each job is a command of rush-bench, which finds the same results.
    """
    if list_shipped or file is None:
        if file is not None:
            raise BadInput("--list names what is shipped; leave the file out")
        from rush_bench.bench.file import read, shipped

        rows = [{"name": name, "title": read(path).title} for name, path in shipped().items()]
        if as_json:
            common.print_json(rows)
        else:
            common.print_rows("benchmarks", ["name", "what it is"], [[row["name"], row["title"]] for row in rows])
        return
    if on is not None and workers > 1:
        raise BadInput("--on says how many processes there are; leave --workers out")
    if asked and on is None:
        raise BadInput("--ask is for the jobs of --on; give it too")
    if workers > 1 and "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = "1"
    from rush_bench.bench.run import run

    def hear(planned: "list[Planned]") -> bool:
        if not worker:
            show(planned, err=as_json or not plan_only)
        return not plan_only

    found = run(
        file,
        out=out,
        store=store,
        data_dir=data_dir,
        device=device,
        workers=workers,
        on=on,
        asked=asked,
        max_minutes=max_minutes,
        priced=not worker,
        quiet=as_json,
        before=hear,
    )
    if as_json:
        common.print_json(found.to_dict())
    if plan_only:
        return
    for name, why in found.failed.items():
        click.echo(f"failed: {name}: {why}", err=True)
    if found.left:
        click.echo(f"stopped with {len(found.left)} jobs left; the same command continues", err=True)
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)
    click.echo(f"done: {found.place.out}", err=True)


def show(planned: "list[Planned]", err: bool) -> None:
    """The plan as a table, why what is impossible is so, and the sum."""
    from rush_bench.bench.run import minutes_text
    from rush_bench.progress import amount

    unfinished = [planned_job for planned_job in planned if planned_job.state in ("in progress", "missing")]
    rows = []
    for planned_job in planned:
        cost = [amount(planned_job.passes), minutes_text(planned_job.seconds)] if planned_job in unfinished else ["", ""]
        rows.append([planned_job.job.name, planned_job.state, *cost])
    common.print_rows("plan", ["job", "state", "passes", "time here"], rows, err=err)
    impossible = [planned_job for planned_job in planned if planned_job.why]
    for why in dict.fromkeys(planned_job.why for planned_job in impossible):
        names = [planned_job.job.name for planned_job in impossible if planned_job.why == why]
        click.echo(f"impossible: {', '.join(names)}: {why}", err=True)
    known = [planned_job for planned_job in unfinished if planned_job.seconds == planned_job.seconds]
    more = f", and {len(unfinished) - len(known)} of unknown time" if len(known) < len(unfinished) else ""
    total = (
        amount(sum(planned_job.passes for planned_job in known)),
        minutes_text(sum(planned_job.seconds for planned_job in known)),
    )
    click.echo(f"{len(unfinished)} of {len(planned)} jobs to do: about {total[0]} passes, {total[1]} here{more}", err=err)
