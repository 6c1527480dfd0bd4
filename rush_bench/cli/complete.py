"""Names that the shell completes, by `eval "$(_RUSH_BENCH_COMPLETE=bash_source rush-bench)"` (zsh_source, fish_source).

Imports no torch.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(*kinds: str, several: bool = False) -> Complete:
    """A completer for names of these kinds (see `rush-bench list`); `several`: parts between commas are completed each."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from rush_bench.cli import catalogue

        store, results = Path(context.params.get("store") or "models"), _results(context)
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        rows = [row for kind in kinds for row in catalogue.rows(kind, store, results)]
        found = {row["name"]: row["summary"] for row in rows if row["name"].startswith(last)}
        return [CompletionItem(before + comma + name, help=text) for name, text in found.items()]

    return complete


def words(known: Callable[[], list[str]], several: bool = False) -> Complete:
    """A completer for fixed words."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        return [CompletionItem(before + comma + word) for word in known() if word.startswith(last)]

    return complete


models = names("models", several=True)
model = names("models")
recipe = names("defenses")
suite = names("suites")
dataset = names("datasets")
attacks = names("attacks", several=True)


def defense(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Defences that a results folder has records of."""
    from rush_bench.files import read_json

    found: dict[str, None] = {}
    for path in _results(context).glob("runs/*/cell.json"):
        with contextlib.suppress(Exception):  # a half-written cell is no name
            found |= {str(labels["defense"]): None for labels in read_json(path)["labels"]}
    return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]


def _results(context: click.Context) -> Path:
    from rush_bench.packs import opened

    given = context.params.get("results") or "results"
    return opened(Path(given[0] if isinstance(given, tuple) else given)).folder
