"""What the subcommands share: options, and how they print."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from rush_bench.errors import BadInput, WorkLeft, failed_code
from rush_bench.settings import parse_assignments
from rush_bench.settings import parts as parts

if TYPE_CHECKING:
    from rush_bench.api.named import ByName, Target
    from rush_bench.audits.settle import SettleRun
    from rush_bench.evaluation.work import Run

F = TypeVar("F", bound=Callable[..., Any])


def folder_option(flag: str, default: str | None, text: str) -> Callable[[F], F]:
    """An option that takes a folder, made when it is first written to."""
    return click.option(flag, type=click.Path(path_type=Path), default=default, show_default=True, help=text)


def _joined(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> str | None:
    return ",".join(given) if given else None


# Of what an option names several times nothing is dropped.
NAMES: dict[str, Any] = {"multiple": True, "callback": _joined}

store = folder_option("--store", "models", "Folder of the trained models.")
results = folder_option("--results", "results", "Folder that holds the runs; for reading, also a pack.")
data_dir = folder_option("--data-dir", None, "Folder of the data sets (or the environment's RUSH_BENCH_DATA; default data).")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything that is random."
)
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, ...")
name = click.option("--name", metavar="NAME", help="Name of --model in tables.  [default: package.module.function]")
label = click.option(
    "--label",
    "about",
    multiple=True,
    metavar="KEY=VALUE",
    help="Labels of --model in tables: protocol, extra_data, architecture.",
)
max_minutes = click.option(
    "--max-minutes", type=click.FloatRange(min=0), help="Stop after this time, with exit code 3 if work is left."
)
shard = click.option("--shard", default="1/1", metavar="K/N", help="Take every N-th chunk, starting with the K-th.")
assignments = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one setting; repeatable.")
model = click.option("--model", "target", metavar="PKG:BUILD", help="Your own network: package.module:function.")
noise = click.option("--noise", metavar="LAW:SCALE", help="Smooth --model with uniform:0.3, gaussian:0.25 or laplace:0.1.")
size = click.option("--size", type=click.IntRange(min=1), help="Side of the images in pixels.  [default: what the model takes]")
memory = click.option(
    "--memory", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="Memory per step, in GiB."
)
precision = click.option(
    "--precision", default="auto", show_default=True, help="Precision of the search: float32, bfloat16, auto (by device)."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, everything else to stderr.")


def by_name(asked: dict[str, Any]) -> "ByName":
    """How models and images are loaded, from a command's options.

    What is the default is left out: a network of the user's own need not follow it.
    """
    found: Any = {key: asked[key] for key in ("size", "store", "data_dir") if key in asked}
    memory = stated("memory", asked)
    found |= {"n": asked["count"], "device": stated("device", asked)}
    return cast("ByName", found | {"memory": None if memory is None else int(memory * 2**30)})


def stated(name: str, asked: dict[str, Any]) -> Any:
    """The value of an option that was given on the command line, else None."""
    source = click.get_current_context().get_parameter_source(name)
    return asked[name] if source is ParameterSource.COMMANDLINE else None


def defenses_of(asked: dict[str, Any], patterns: str | None, verb: str) -> "str | Target":
    """What is to be measured: patterns of names in the store, or --model with its options, which mean nothing without it."""
    target, votes = asked["target"], asked.get("votes")
    if (patterns is None) == (target is None):
        models = "--models all" if verb == "attack" else "rush@64"
        raise BadInput(f"say what to {verb}: rush-bench {verb} {models}, or --model package.module:function")
    named = {"noise": asked["noise"], "votes": votes, "name": asked["name"], "label": asked["about"]}
    given = [f"--{key}" for key, value in named.items() if value]
    if patterns is not None:
        if given:
            raise BadInput(
                f"{', '.join(given)} without --model: a model of the store has its own noise, name and labels; "
                "votes as in rush@64"
            )
        return patterns
    if not asked["dataset"]:
        raise BadInput("--model needs --dataset: which images is the network for?")
    if votes and not asked["noise"]:
        raise BadInput(
            "--votes needs --noise, without which every vote of a network is the same; a defence that the function of --model "
            "returns states its own votes"
        )
    return target_of(asked)


def target_of(asked: dict[str, Any]) -> "Target":
    """The network of --model, with its labels."""
    from rush_bench.api.named import Target

    labels = {
        key.replace("-", "_").replace(" ", "_"): text for key, text in parse_assignments(asked["about"], "--label").items()
    }
    # a certificate is of infinitely many votes: one form of the network is enough
    votes = asked["votes"] if "votes" in asked else 1 if asked["noise"] else None
    return Target(asked["target"], asked["noise"], votes, asked["name"], labels)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Long work prints nothing on stdout, whatever the libraries under it do: stdout is for the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """The answer as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def records(frame: Any) -> list[dict[str, Any]]:
    """A pandas frame as plain values, a dict per row; what is not there is None."""
    found: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return found


def print_rich(*renderables: Any, err: bool = False) -> None:
    """Text or rich tables on stdout or stderr, all strings unchanged; off a terminal nothing is cut to 80 columns."""
    from rich.console import Console

    # Names are the user's and findings hold `rush-bench[torchattacks]`: in no string is [v2] a style or :x: a picture.
    stream = sys.stderr if err else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 240, markup=False, emoji=False)
    for renderable in renderables:
        console.print(renderable, highlight=False)


def print_rows(title: str, header: list[str], rows: list[list[str]], err: bool = False) -> None:
    """A small table with a title."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(header):
        table.add_column(name, no_wrap=k == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_rich(table, err=err)


def print_frame(title: str, frame: Any) -> None:
    """A pandas frame of small numbers and words as a table."""
    print_rows(title, [str(name) for name in frame.columns], [[str(v) for v in row] for row in frame.to_numpy()])


def finish(run: "Run | SettleRun", shard: str, waits: str = "table waits") -> None:
    """The exit code of measuring, with its reason on stderr; returns where all that was asked of this shard is there.

    1 where a cell failed (4: each for want of a package) or an attack took more than a certificate leaves, 3 with work left.
    """
    refuse_contradictions(run.contradictions)
    if run.failed:
        raise click.exceptions.Exit(failed_code(run.failed))
    if not run.done:
        raise WorkLeft("stopped with work left; the same command continues")
    if not run.complete:
        click.echo(f"shard {shard} is done; the {waits} for the others", err=True)


def refuse_contradictions(found: Sequence[Any]) -> None:
    """Say every attack that took more than a certificate leaves on stderr, and end with exit code 1 where there is one."""
    for comparison in found:
        click.echo(f"error: certificate above attack, one of them has a bug: {comparison}", err=True)
    if found:
        raise click.exceptions.Exit(1)
