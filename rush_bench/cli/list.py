"""`rush-bench list [KIND]`: names, each with one line. Imports no torch."""

from pathlib import Path

import click

from rush_bench.cli import catalogue, common, complete


@click.command()
@click.argument("kind", required=False, shell_complete=complete.words(lambda: list(catalogue.KINDS)))
@common.store
@common.results
@common.as_json
def command(kind: str | None, store: Path, results: Path, as_json: bool) -> None:
    """List the names of one KIND (defenses, datasets, suites, attacks, experiments, models, encoders, results), or of all."""
    found = {name: catalogue.rows(name, store, results) for name in ([kind] if kind else catalogue.KINDS)}
    if as_json:
        common.print_json([{"kind": name, **row} for name, rows in found.items() for row in rows])
        return
    for name, rows in found.items():
        common.print_rows(name, ["name", "what it is"], [[row["name"], row["summary"]] for row in rows])
