"""`rush-bench show NAME`: everything about one name, as key and value, or as JSON."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import click

from rush_bench import registry
from rush_bench.cli import catalogue, common, complete, explain
from rush_bench.declared import declared
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import read_json
from rush_bench.packs import opened
from rush_bench.store import ENCODERS, read_card


@click.command()
@click.argument("name", shell_complete=complete.names(*catalogue.KINDS))
@click.option("--kind", help="Kind of NAME, if it has several: defense, dataset, suite, attack, model, encoder, result, ...")
@common.store
@common.results
@common.as_json
def command(name: str, kind: str | None, store: Path, results: Path, as_json: bool) -> None:
    """Describe NAME: a defence's settings by preset, a model's card, a suite's columns, an attack's settings, a cell.

    The `settings` shown for a model can be given to `train` again, by --set or as a TOML file.
    """
    if kind is not None:
        kind = catalogue.plural(kind if kind.endswith("s") or f"{kind}s" not in catalogue.KINDS else f"{kind}s")
    kinds = [kind] if kind else find(name, store, results)
    found = {"kind": kinds[0].removesuffix("s"), "name": name, **DESCRIBE[kinds[0]](name, store, results)}
    if kinds[1:]:
        click.echo(f"{name} is also the name of a {', '.join(k.removesuffix('s') for k in kinds[1:])}: --kind", err=True)
    if as_json:
        common.print_json(found)
        return
    presets, lines = found.pop("presets", None), found.pop("explained", {})
    own, title = found.pop("settings", None), f"{found.pop('kind')} {found.pop('name')}"
    common.print_rows(title, ["key", "value"], [[key, _text(value)] for key, value in flatten(found).items()])
    if own is not None:
        rows = [[key, _text(value), lines.get(key, "")] for key, value in flatten(own).items()]
        columns = ["key", "value", "what it is"][: 3 if lines else 2]
        common.print_rows("settings", columns, [row[: len(columns)] for row in rows])
    if presets:
        common.print_rows("settings", ["key", "value", "what it is"], by_preset(presets, lines))


def find(name: str, store: Path, results: Path) -> list[str]:
    """The kinds that have this name; a name that none has is a BadInput with the nearest of all."""
    known = {kind: [row["name"] for row in catalogue.rows(kind, store, results)] for kind in catalogue.KINDS}
    kinds = [kind for kind, names in known.items() if name in names]
    if not kinds:
        if name.startswith(("linf", "l2")):
            return ["suites"]
        raise unknown_name("name", name, (each for names in known.values() for each in names))
    return kinds


def defense(name: str, store: Path, results: Path) -> dict[str, Any]:
    """A recipe: its line, and the settings of each preset (what suits small grey images comes on top of them)."""
    from rush_bench.settings import override, to_dict

    entry = registry.recipes.get(name)
    recipe = registry.recipes.load(name)
    presets = {preset: to_dict(override(recipe.settings, layer)) for preset, layer in recipe.presets.items()}
    explained = explain.explained(recipe.settings)
    return {"summary": entry.summary, "module": entry.module, "presets": presets, "explained": explained}


def dataset(name: str, store: Path, results: Path) -> dict[str, Any]:
    """A data set: its line and where it comes from."""
    entry = registry.datasets.get(name)
    return {"summary": entry.summary, "module": entry.module}


def suite(name: str, store: Path, results: Path) -> dict[str, Any]:
    """A suite: its threat, and the settings of each column as they will run."""
    from rush_bench.attacks.suites import parse_suite

    parsed = parse_suite(name)
    columns = {column: _attack(column)[0] | settings for column, settings in parsed.columns.items()}
    return {"norm": parsed.norm, "eps": parsed.eps, "quick": parsed.quick, "columns": columns}


def attack(name: str, store: Path, results: Path) -> dict[str, Any]:
    """An attack: its line and its default settings."""
    settings, lines = _attack(name)
    return {"summary": registry.attacks.get(name).summary, "settings": settings, "explained": lines}


def experiment(name: str, store: Path, results: Path) -> dict[str, Any]:
    """An experiment of `settle`: what it asks, how it is read, and its trials on a vote of 64 by budget."""
    from rush_bench.audits.experiments import BUDGETS, EXPERIMENTS, Subject

    chosen, subject = EXPERIMENTS[name], Subject(draws=64, classes=10, norm="linf", eps=8 / 255)
    trials = {
        budget: {trial.name: f"{trial.attack} {trial.settings or ''}".strip() for trial in chosen.trials(subject, amount)}
        for budget, amount in BUDGETS.items()
    }
    return {"title": chosen.title, "reading": chosen.reading, "trials": trials}


def model(name: str, store: Path, results: Path) -> dict[str, Any]:
    """A model: its card."""
    return {key: value for key, value in read_card(store, name).items() if key != "name"}


def encoder(name: str, store: Path, results: Path) -> dict[str, Any]:
    """An encoder: its card."""
    return {key: value for key, value in read_card(store / ENCODERS, name).items() if key not in ("name", "history")}


def result(name: str, store: Path, results: Path) -> dict[str, Any]:
    """A cell of an evaluation: what it is, and how much of it is done."""
    folder = opened(results).folder
    path = folder / "runs" / name / "cell.json"
    if not path.is_file():
        known = [row["name"] for row in catalogue.rows("results", store, results)]
        raise unknown_name(f"result in {results}", name, known)
    return {**read_json(path), "chunks_done": catalogue.chunks_done(path), "accuracies": accuracies(name, folder)}


def accuracies(name: str, results: Path) -> dict[str, str]:
    """What a finished cell measured, in percent, by the column that shows it."""
    from rush_bench.records import load_results
    from rush_bench.records.statistics import Estimate
    from rush_bench.report.rows import summary
    from rush_bench.report.settle import percent

    found = [cell for cell in load_results(results) if cell.folder.name == name and cell.complete]
    return {key: percent(Estimate(*numbers)) for key, numbers in summary(found[0])["estimates"].items()} if found else {}


DESCRIBE: dict[str, Callable[[str, Path, Path], dict[str, Any]]] = {
    "defenses": defense,
    "datasets": dataset,
    "suites": suite,
    "attacks": attack,
    "experiments": experiment,
    "models": model,
    "encoders": encoder,
    "results": result,
}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, the form that --set takes."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        nested = isinstance(item, Mapping) and item
        flat |= flatten(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return flat


def by_preset(presets: Mapping[str, Mapping[str, Any]], explained: Mapping[str, str]) -> list[list[str]]:
    """One row per key: its value, by preset where they differ, and what it is."""
    flat = {name: flatten(settings) for name, settings in presets.items()}
    rows = []
    for key in next(iter(flat.values())):
        values = {name: _text(settings[key]) for name, settings in flat.items()}
        same = len(set(values.values())) == 1
        value = next(iter(values.values())) if same else ", ".join(f"{name} {text}" for name, text in values.items())
        rows.append([key, value, explained.get(key, "")])
    return rows


def _attack(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """An attack's settings, as they stand before a suite changes them, and a line for each."""
    entry = registry.attacks.get(name)
    if entry.entry_point is None:
        settings, comments = declared(entry)
        return settings, {key: explain.line(key, comments.get(key, "")) for key in settings}
    attack = registry.attacks.load(name)()
    settings = attack.settings()
    if not isinstance(settings, dict):
        raise BadInput(f"attack {name!r}: its settings() must give a dict")
    return settings, explain.explained(attack) if is_dataclass(attack) else {}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
