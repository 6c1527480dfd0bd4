"""What the subcommands share: options, and how they print."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rush_bench.errors import BadInput, WorkLeft, failed_code, unknown_name

if TYPE_CHECKING:
    from rush_bench.audit.settle import SettleRun
    from rush_bench.evaluation.work import Run

PRECISION = "precision.json"  # of a results folder
F = TypeVar("F", bound=Callable[..., Any])


def folder_option(flag: str, default: str | None, text: str) -> Callable[[F], F]:
    """An option that takes a folder, made when it is first written to."""
    return click.option(flag, type=click.Path(path_type=Path), default=default, show_default=True, help=text)


store = folder_option("--store", "models", "Folder of the trained models.")
results = folder_option("--results", "results", "Folder that holds the runs.")
data_dir = folder_option("--data-dir", None, "Folder of the data sets (or the environment's RUSH_BENCH_DATA; default data).")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything that is random."
)
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, ...")
name = click.option("--name", metavar="NAME", help="What tables call the --model.  [default: package.module.function]")
label = click.option(
    "--label", "about", multiple=True, metavar="KEY=VALUE", help="What they say of it: protocol, extra_data or architecture."
)
max_minutes = click.option(
    "--max-minutes", type=click.FloatRange(min=0), help="Stop after this time, with exit code 3 where work is left."
)
shard = click.option("--shard", default="1/1", metavar="K/N", help="Take every N-th chunk, the K-th of them.")
assignments = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one setting; repeatable.")
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON on stdout, all else on stderr.")


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Long work prints nothing on stdout, whatever the libraries under it do: stdout is for the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """The answer as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_rich(*renderables: Any, err: bool = False) -> None:
    """Text or rich tables on stdout or stderr, all strings as they are; off a terminal nothing is cut to 80 columns."""
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


def choose_precision(name: str, device: Any, out: Path) -> str:
    """`auto` is bfloat16 where the device computes in it, and stays what it was when the results folder `out` was begun:
    another precision is another search with records of its own, so that unlike machines would not share their cells.

    Nothing is written: see `keep_precision`.
    """
    from rush_bench.devices import has_bfloat16

    if name not in ("auto", "float32", "bfloat16"):
        raise unknown_name("precision", name, ("auto", "float32", "bfloat16"))
    if name != "auto":
        return name
    if (kept := _kept_precision(out)) is not None:
        return kept
    # records from before this choice was kept: a CPU searched in float32
    begun = device.type == "cpu" and any((out / folder).exists() for folder in ("runs", "settle"))
    return "bfloat16" if has_bfloat16(device) and not begun else "float32"


def keep_precision(name: str, chosen: str, out: Path) -> None:
    """Write down what `auto` is in this results folder, before its first cell is opened.

    BadInput where another machine has begun it otherwise in the meantime.
    """
    from rush_bench.files import flock, write_json

    if name != "auto":
        return
    path = out / PRECISION
    with flock(path.with_suffix(".lock"), wait=True):
        if (kept := _kept_precision(out)) is None:
            write_json(path, {"auto": chosen})
        elif kept != chosen:
            raise BadInput(f"another process has begun {out} in {kept}; the same command again goes on so")


def _kept_precision(out: Path) -> str | None:
    from rush_bench.files import read_json

    path = out / PRECISION
    if not path.exists():
        return None
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("auto") not in ("float32", "bfloat16"):
        raise BadInput(f"{path} is damaged; delete it, or give --precision float32 or bfloat16")
    return str(kept["auto"])
