"""`rush-bench settle`: one call of `rush_bench.settle`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from rush_bench.cli import common, complete

F = TypeVar("F", bound=Callable[..., Any])
OPTIONS = (
    click.argument("patterns", metavar="[MODELS]", required=False, shell_complete=complete.models),
    common.model,
    common.noise,
    click.option("--votes", type=click.IntRange(min=1), help="Votes of the smoothed --model.  [default: 64]"),
    common.name,
    common.label,
    click.option("--dataset", help="Images: a name, path/to/file.npz or a folder.  [default: what each model was trained on]"),
    common.size,
    click.option("--budget", default="standard", show_default=True, help="quick (a CPU), standard, or full (the protocol)."),
    click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True, help="Norm of the threat."),
    click.option("--eps", default="8/255", show_default=True, help="Radius of the threat, in pixel units."),
    click.option("--only", metavar="T1,T10", help="Only these experiments.  [default: all]"),
    click.option("--n", "count", default=None, help="Images: a fixed stratified subset, or `all`.  [default: by budget]"),
    click.option("--repeats", type=click.IntRange(min=1), help="Fresh predictions K per image.  [default: by votes]"),
    click.option(
        "--chunk",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="Images per chunk, which is stored as one file.",
    ),
    common.shard,
    common.folder_option("--out", "results", "Results folder; records go to settle/ in it."),
    common.store,
    common.data_dir,
    common.seed,
    common.device,
    common.precision,
    common.memory,
    common.max_minutes,
    click.option("--plan", "plan_only", is_flag=True, help="Print what it would cost, and stop."),
)


def options(function: F) -> F:
    """The options that `settle` and `audit` share."""
    for decorate in reversed(OPTIONS):
        function = decorate(function)
    return function


@click.command()
@options
@common.as_json
def command(as_json: bool, **asked: Any) -> None:
    """Run the experiments T0 to T16 (`rush-bench docs protocol`) on models of the store (rush@64,'acl*') or --model.

    \b
    rush-bench settle rush@64 --dataset cifar10 --budget quick
    rush-bench settle rush@64 --dataset cifar10 --only T1,T15 --plan

    It prints the predicted cost before it starts, and the measured one after the first chunk of each experiment.
    Running the same command again, from any number of processes, finishes the work.
    """
    given = arguments(asked, "settle")
    with common.quiet_stdout():
        from rush_bench.api.settle import settle

        run = settle(**given)
        for path in run.paths:
            click.echo(f"wrote {path}", err=True)
    if as_json:
        state = {
            "failed": run.failed,
            "complete": run.complete,
            "contradictions": [str(contradiction) for contradiction in run.contradictions],
        }
        common.print_json({**state, "defenses": run.to_dicts()})
    elif not asked["plan_only"]:
        common.print_rich(*run.tables())
    if not asked["plan_only"]:
        common.finish(run, asked["shard"], "tables wait")


def arguments(asked: dict[str, Any], verb: str) -> dict[str, Any]:
    """What `rush_bench.settle` and `rush_bench.audit` are called with."""
    from rush_bench.settings import parse_number

    defenses, eps = common.defenses_of(asked, asked["patterns"], verb), parse_number(asked["eps"])
    from rush_bench.evaluation.work import parse_shard

    given = {key: asked[key] for key in ("budget", "norm", "out", "seed", "repeats", "chunk", "max_minutes")}
    given |= {"only": asked["only"].split(",")} if asked["only"] else {}
    given |= {"defenses": defenses, "data": asked["dataset"], "eps": eps, "shard": parse_shard(asked["shard"])}
    given |= {"precision": common.stated("precision", asked), "before": lambda planned: not asked["plan_only"]}
    return {**given, **common.by_name(asked)}
