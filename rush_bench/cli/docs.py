"""`rush-bench docs [PAGE]`: the documentation that comes with the package."""

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
    text = known[page].read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        console = Console()
        with console.pager(styles=True):
            console.print(Markdown(text))
    else:
        click.echo(text)


def title(file: Path) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else file.stem
