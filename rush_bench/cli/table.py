"""`rush-bench table`: one call of `rush_bench.table`, written and printed."""

from pathlib import Path

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput

INFO = "robustbench"  # a model_info file a row


@click.command()
@click.option("--style", default="plain", show_default=True, help="plain: everything measured; paper: Table 1.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    multiple=True,
    default=("results",),
    show_default=True,
    help="Folder that holds the runs, or a pack; repeatable, for one table of all.",
)
@common.folder_option("--out", None, "Folder for table.csv, table.md, table.tex.  [default: that of the first --results]")
@common.store
@click.option(
    "--columns", metavar="NAMES", help="Columns to show, in this order: defense,clean,worst.  [default: all measured]"
)
@click.option(
    "--only", multiple=True, metavar="COLUMN=PATTERNS", help="Rows to show: 'defense=rush*,acl*', dataset=digits; repeatable."
)
@click.option("--sort", metavar="COLUMN", help="Sort rows by a column; -worst from the highest down.")
@click.option(
    "--format", "formats", default="csv,md,tex", show_default=True, help="Which files to write; robustbench: model_info."
)
@click.option("--caption", help="Caption of table.tex, in LaTeX.")
@click.option("--label", help="Label of table.tex.")
@common.as_json
def command(
    style: str,
    results: tuple[Path, ...],
    out: Path | None,
    store: Path,
    columns: str | None,
    only: tuple[str, ...],
    sort: str | None,
    formats: str,
    caption: str | None,
    label: str | None,
    as_json: bool,
) -> None:
    """Write and print the table of everything measured, from the records.

    Cards of the models in --store add the cost of training; trainings that differ only in their seed are one row, their mean,
    and a line each in the CSV. Columns that do not fit the terminal are named below the table.

    `--style paper` lays out Table 1 of the RUSH paper: published numbers beside measured ones. Numbers computed
    from a record are kept in runs/.index.json until its files or the code change; without that file all records are read.
    """
    from rush_bench.report.tables import check_formats, check_style

    check_style(style)
    parts = common.parts(formats)
    wanted = check_formats([part for part in parts if part != INFO])
    if INFO in parts and (columns or only or sort):
        raise BadInput(f"--format {INFO} writes every row whole; leave out --columns, --only and --sort, or write it apart")
    from rush_bench.api.table import load_results, table
    from rush_bench.packs import opened
    from rush_bench.report.model_info import write_model_info
    from rush_bench.report.rows import rows
    from rush_bench.settings import parse_assignments

    fitting: dict[str, list[str]] = {}
    for text in only:
        for column, patterns in parse_assignments([text], "--only").items():
            fitting.setdefault(column, []).extend(common.parts(patterns))
    shown = table(results, style, store=store, columns=common.parts(columns), only=fitting, sort=sort)
    folder = out or opened(results[0]).beside
    paths = write_model_info(rows(load_results(*results)), folder) if INFO in parts else []
    for path in (*paths, *shown.write(folder, wanted, caption=caption, label=label)):
        click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(shown.frame.to_json(orient="records", indent=2))
    else:
        common.print_rich(shown)
