"""`rush-bench docs [PAGE]`: the documentation that comes with the package."""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import click

from rush_bench.cli import common, complete
from rush_bench.errors import BadInput, unknown_name

INSTALLED = Path(__file__).parents[1] / "docs"  # in a wheel; a checkout has them beside the package
FOLDER = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2] / "docs"


def pages() -> dict[str, Path]:
    """Every page by its name; BadInput where they were not installed."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.md"))}
    if not found:
        raise BadInput(f"no documentation in {FOLDER}; install the package again")
    return found


@click.command()
@click.argument("page", required=False, shell_complete=complete.words(lambda: list(pages())))
@click.option("--path", is_flag=True, help="Print only the path of the file.")
def command(page: str | None, path: bool) -> None:
    """Read a PAGE of the documentation, such as `verdict` or `protocol`; without one, list them all."""
    known: dict[str, Path] = pages()
    if page is None:
        common.print_rows("pages", ["name", "what it is"], [[name, title(file)] for name, file in known.items()])
        return
    if page not in known:
        raise unknown_name("page", page, known)
    if path:
        click.echo(known[page])
        return
    text = readable(known[page].read_text(encoding="utf-8"))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        os.environ.setdefault("LESS", "-R")  # else it shows colours as codes
        console = Console()
        with console.pager(styles=True):
            console.print(Markdown(text))
    else:
        click.echo(text)


def readable(text: str) -> str:
    """A page for a terminal: where the site puts docstrings and help texts, what shows them."""
    commands = "`rush-bench --help` and `rush-bench NAME --help` show them.\n"
    text = re.sub(r"^::: mkdocs-click\n(    .*\n?)*", commands, text, flags=re.MULTILINE)
    return re.sub(r"^::: (rush_bench\S*)\n?(    .*\n?)*", _shown_by, text, flags=re.MULTILINE)


def _shown_by(directive: re.Match[str]) -> str:
    """A public name with the first sentence of its docstring."""
    import rush_bench

    name = directive[1]
    module, _, last = name.rpartition(".")
    found = getattr(rush_bench if module == "rush_bench" else importlib.import_module(module), last)
    said = " ".join((inspect.getdoc(found) or "").partition("\n\n")[0].split())
    return f"- `{f'rb.{last}' if module == 'rush_bench' else name}`: {said} (`help({name})`)\n"


def title(file: Path) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else file.stem
