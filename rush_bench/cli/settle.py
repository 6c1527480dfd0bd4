"""`rush-bench settle`: the experiments that settle a claim, on models of the store or a network of one's own."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    from rush_bench.audit.settle import Planned, SettleRun
    from rush_bench.datasets import Images
    from rush_bench.defenses import Defense

F = TypeVar("F", bound=Callable[..., Any])
OPTIONS = (
    click.argument("patterns", metavar="[MODELS]", required=False),
    click.option("--model", "target", metavar="PKG:BUILD", help="A network of your own: package.module:function."),
    click.option("--noise", metavar="LAW:SCALE", help="Smooth --model with uniform:0.3 or gaussian:0.25."),
    click.option("--votes", type=click.IntRange(min=1), help="Votes of the smoothed --model.  [default: 64]"),
    common.name,
    common.label,
    click.option("--dataset", help="Images: a name, path/to/file.npz or a folder.  [default: what each model was trained for]"),
    click.option("--size", type=click.IntRange(min=1), help="Side of the images in pixels.  [default: what the model takes]"),
    click.option("--budget", default="standard", show_default=True, help="quick (a CPU), standard, or full (the protocol)."),
    click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True, help="Norm of the threat."),
    click.option("--eps", default="8/255", show_default=True, help="Radius of the threat, in pixel units."),
    click.option("--only", metavar="T1,T10", help="These experiments alone.  [default: all]"),
    click.option("--n", "count", default=None, help="Images: a fixed stratified subset, or `all`.  [default: by budget]"),
    click.option("--repeats", type=click.IntRange(min=1), help="Fresh predictions K per image.  [default: by votes]"),
    click.option("--chunk", type=click.IntRange(min=1), default=100, show_default=True, help="Images kept as one file."),
    common.shard,
    common.folder_option("--out", "results", "Results folder; records go to settle/ in it."),
    common.store,
    common.data_dir,
    common.seed,
    common.device,
    click.option("--precision", default="auto", show_default=True, help="Of the search: float32, bfloat16, auto (by device)."),
    click.option("--memory", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="GiB a step may use."),
    common.max_minutes,
    click.option("--plan", "plan_only", is_flag=True, help="Say what it would cost, and stop."),
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
    """Run the experiments T0 to T16 (docs/protocol.md) on models of the store (rush@64,'acl*') or --model.

    \b
    rush-bench settle rush@64 --dataset cifar10 --budget quick
    rush-bench settle rush@64 --dataset cifar10 --only T1,T15 --plan

    What it will cost is said before it starts, and after the first chunk of each experiment what it does cost.
    Running the same command again, from any number of processes, finishes the work.
    """
    with common.quiet_stdout():
        run = settled(asked)
        from rush_bench.report import settle as report

        if not asked["plan_only"]:
            from rush_bench.report.settle_figures import write_figures

            for path in [*report.write(run.books, run.folder), *write_figures(run.books, run.folder)]:
                click.echo(f"wrote {path}", err=True)
    if as_json:
        said = {"failed": run.failed, "complete": run.complete, "contradictions": [str(one) for one in run.contradictions]}
        common.print_json({**said, "defenses": [report.plain(book) for book in run.books]})
    elif not asked["plan_only"]:
        for book in run.books:
            common.print_rows(report.title(book), *report.lay_out(book))
    if not asked["plan_only"]:
        common.finish(run, asked["shard"], "tables wait")


def settled(asked: dict[str, Any]) -> "SettleRun":
    """Load what was asked for and settle it; the books of all data sets together."""
    pairs, place = asked_for(asked)

    def before(planned: "list[Planned]") -> bool:
        if not announce(planned, asked["plan_only"]):
            return False
        common.keep_precision(asked["precision"], place["precision"], asked["out"])
        return True

    return settle_all(pairs, place, asked, before)


def asked_for(asked: dict[str, Any]) -> tuple["list[tuple[list[Defense], Images]]", dict[str, Any]]:
    """The defences with their images, and how they are to be worked with (device, precision, memory)."""
    from rush_bench.audit import settle as rooms
    from rush_bench.cli.attack import Loader, check_own, own, stored
    from rush_bench.devices import choose_device

    patterns, target, dataset = asked["patterns"], asked["target"], asked["dataset"]
    if (patterns is None) == (target is None):
        raise BadInput("say what to settle: rush-bench settle rush@64, or --model package.module:function")
    named = {"name": asked["name"], "about": asked["about"]}
    check_own(target, dataset, noise=asked["noise"], votes=asked["votes"], name=asked["name"], label=asked["about"])
    budget = rooms.budget_named(asked["budget"])
    images = Loader(asked["data_dir"], asked["count"], asked["size"], budget.images)
    where = choose_device(asked["device"])
    precision = common.choose_precision(asked["precision"], where, asked["out"])
    place: dict[str, Any] = {"device": where, "precision": precision, "memory": int(asked["memory"] * 2**30)}
    if target is not None:
        defenses, data = own(target, images.load(dataset, None), asked["noise"], asked["votes"], place, **named)
        pairs = [(defenses[-1:], data)]  # the smoothed one at its votes, not the single draw beside it
    else:
        pairs = stored(patterns.split(","), asked["store"], dataset, images, place)
    return pairs, place


def settle_all(
    pairs: "list[tuple[list[Defense], Images]]",
    place: dict[str, Any],
    asked: dict[str, Any],
    before: "Callable[[list[Planned]], bool]",
) -> "SettleRun":
    """Settle these defences as the options say; `before` hears each plan with its cost, and may call it off."""
    from rush_bench.audit import settle as rooms
    from rush_bench.evaluation.work import deadline_in, minutes_to, parse_shard
    from rush_bench.settings import parse_number

    deadline = deadline_in(asked["max_minutes"])
    whole = rooms.SettleRun([], {}, asked["out"] / rooms.FOLDER)
    for defenses, data in pairs:
        run = rooms.settle(
            defenses,
            data,
            budget=asked["budget"],
            norm=asked["norm"],
            eps=parse_number(asked["eps"]),
            only=asked["only"].split(",") if asked["only"] else None,
            store=asked["store"],
            out=asked["out"],
            seed=asked["seed"],
            repeats=asked["repeats"],
            chunk=asked["chunk"],
            shard=parse_shard(asked["shard"]),
            max_minutes=minutes_to(deadline),
            before=before,
            **place,
        )
        whole.books += run.books
        whole.pairs += run.pairs
        whole.failed |= run.failed
        whole.done = whole.done and run.done
        whole.contradictions += run.contradictions
    return whole


def announce(planned: "list[Planned]", plan_only: bool) -> bool:
    """Say on stderr what each experiment is expected to cost, from the rates measured on this machine a moment ago."""
    from rush_bench.audit.experiments import EXPERIMENTS

    for one in planned:
        total = sum(cost.seconds for cost in one.costs.values())
        click.echo(f"{one.defense.name}: about {total / 60:.1f} min for what is not done yet", err=True)
        for name, cost in one.costs.items():
            what = EXPERIMENTS[name].title
            rows = f"{cost.forwards:.3g} rows forward, {cost.backwards:.3g} back"
            click.echo(f"  {name:>3} {what}: {cost.jobs} cells, {rows}, about {cost.seconds:.0f} s", err=True)
        for norm, sampling in one.certificates:
            click.echo(f"  T12 certificates in {norm}: {sampling.draws} draws per image at most", err=True)
    return not plan_only
