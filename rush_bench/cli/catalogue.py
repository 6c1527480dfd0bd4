"""What there is, by kind, as plain rows: for `list` and `show`. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rush_bench import registry
from rush_bench.errors import BadInput, RushBenchError, unknown_name
from rush_bench.files import read_json
from rush_bench.packs import opened
from rush_bench.store import ENCODERS, model_names, read_card

Row = dict[str, Any]  # name, summary, and what else the kind has


def rows(kind: str, store: Path, results: Path) -> list[Row]:
    """Everything of one kind (see KINDS); a wrong kind is a BadInput with a suggestion."""
    return KINDS[plural(kind)](store, results)


def plural(kind: str) -> str:
    """A kind by its name in KINDS; `defences` and `recipes` are `defenses`. A wrong one is a BadInput."""
    kind = {"defences": "defenses", "recipes": "defenses"}.get(kind, kind)
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    return kind


def chunks_done(cell: Path) -> int:
    """How many chunks lie beside a cell.json."""
    return len(list(cell.parent.glob("chunk-*.npz")))


def model_summary(card: Row) -> str:
    """One line on a model: recipe, data, protocol, preset, noise."""
    source = card.get("pretrain_dataset")
    data = f"{source} -> {card['dataset']}" if source not in (None, card["dataset"]) else card["dataset"]
    noise = card.get("noise")
    law = f", noise {noise['law']}:{noise['scale']:g}" if noise else ""
    random = {
        "views": f"; {card['name']}@30 averages 30 random views",
        "purify": f"; {card['name']}@8 votes over 8 purified images",
    }
    views = random[card["transform"]["name"]] if card.get("transform") else ""
    start = f" from {card['from']['name']}" if card.get("from") else ""
    return f"{card['recipe']} on {data}, {card.get('protocol')}{start}, preset {card.get('preset')}{law}{views}"


def encoder_summary(card: Row) -> str:
    """One line on an encoder: who made it, on what data, and its network."""
    origin = card["source"]["family"] if card.get("source") else f"preset {card.get('preset')}, seed {card.get('seed')}"
    return f"{card['recipe']} on {card.get('pretrain_dataset') or card['dataset']}, {card['network']['name']}, {origin}"


def _registered(entries: registry.Registry) -> list[Row]:
    return [{"name": entry.name, "summary": entry.summary} for entry in entries.entries.values()]


def _suites() -> list[Row]:
    from rush_bench.attacks.suites import EXAMPLES

    return [{"name": name, "summary": summary} for name, summary in EXAMPLES.items()]


def _models(store: Path) -> list[Row]:
    """Models of a store. A card that cannot be read becomes a row with the error: one bad file does not hide the others."""
    found = []
    for name in model_names(store):
        try:
            card = read_card(store, name)
            row = {"name": name, "summary": model_summary(card)}
            found.append(row | {key: card[key] for key in ("recipe", "dataset", "votes")})
        except (BadInput, LookupError, TypeError, AttributeError) as error:
            found.append({"name": name, "summary": f"unreadable card: {error}"})
    return found


def _encoders(store: Path) -> list[Row]:
    """Encoders of a store, which are no models: a training starts from them (`train finetune --from NAME`)."""
    found = []
    for name in model_names(store / ENCODERS):
        try:
            found.append({"name": name, "summary": encoder_summary(read_card(store / ENCODERS, name))})
        except (BadInput, LookupError, TypeError, AttributeError) as error:
            found.append({"name": name, "summary": f"unreadable card: {error}"})
    return found


def _results(results: Path) -> list[Row]:
    """Cells under a results folder, from their cell.json alone."""
    found = []
    for path in sorted(opened(results).folder.glob("runs/*/cell.json")):
        name = path.parent.name
        try:
            cell = read_json(path)
            labels = cell["labels"][0]
            chunks = -(-labels["n"] // cell["identity"]["chunk"])
            where = f"{labels['dataset']}, n={labels['n']}, {chunks_done(path)} of {chunks} chunks done"
            found.append({"name": name, "summary": f"{labels['defense']} {labels['attack']} {labels['suite']}, {where}"})
        except (RushBenchError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            found.append({"name": name, "summary": f"unreadable record: {error}"})
    return found


def _experiments() -> list[Row]:
    from rush_bench.audits.experiments import EXPERIMENTS

    return [{"name": name, "summary": f"{experiment.title}: {experiment.reading}"} for name, experiment in EXPERIMENTS.items()]


KINDS: dict[str, Callable[[Path, Path], list[Row]]] = {
    "defenses": lambda store, results: _registered(registry.recipes),
    "datasets": lambda store, results: _registered(registry.datasets),
    "suites": lambda store, results: _suites(),
    "attacks": lambda store, results: _registered(registry.attacks),
    "experiments": lambda store, results: _experiments(),
    "models": lambda store, results: _models(store),
    "encoders": lambda store, results: _encoders(store),
    "results": lambda store, results: _results(results),
}
