"""`rush-bench audit`: one call of `rush_bench.audit`."""

from typing import Any

import click

from rush_bench.cli import common
from rush_bench.cli.settle import arguments, options
from rush_bench.errors import DOES_NOT_STAND, BadInput, WorkLeft


@click.command()
@options
@click.option(
    "--claim",
    help="Claimed accuracy under attack, in percent, or a model_info FILE.json of RobustBench.  "
    "[default: published, else the replay's]",
)
@common.as_json
def command(as_json: bool, claim: str | None, **asked: Any) -> None:
    """Audit the claim of models of the store (rush@64) or of --model: a verdict with its reasons (`rush-bench docs verdict`).

    \b
    rush-bench audit rush@64 --dataset cifar10 --budget quick
    rush-bench audit rush@64 --dataset cifar10 --claim 77.8

    It runs the missing experiments of `rush-bench settle`, then its probes. Running the same command again, from
    any number of processes, finishes the work. Exit code 5: a claim does not stand
    (weakened, refuted, cannot say).
    """
    if asked["only"]:
        raise BadInput("audit needs every experiment; for some of them use rush-bench settle --only")
    given = arguments(asked, "audit")
    with common.quiet_stdout():
        from rush_bench.api.audit import audit

        run = audit(claim=claim, **given)
        for path in run.paths:
            click.echo(f"wrote {path}", err=True)
    if as_json:
        state = {"failed": run.failed, "contradictions": [str(contradiction) for contradiction in run.settled.contradictions]}
        common.print_json({**state, "audits": [contradiction.to_dict() for contradiction in run.audits]})
    else:
        common.print_rich(*run.tables())
    if asked["plan_only"]:
        return
    common.finish(run.settled, asked["shard"], "tables wait")
    if run.settled.complete and not run.complete:
        raise WorkLeft("stopped with probes left; the same command continues")
    if fallen := [f"{name} ({word})" for name, word in run.words.items() if word not in (None, "stands")]:
        click.echo(f"not said to stand: {', '.join(fallen)}", err=True)
        raise click.exceptions.Exit(DOES_NOT_STAND)
