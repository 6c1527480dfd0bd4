"""`make_ensemble`: several finished models of the store as one, whose prediction is the mean of their probabilities.

Chen et al. 2020b fine-tune three networks and average their softmax (sources S2.11). The new model holds the members' weights
itself: it is attacked, certified and shown as any other, and stays what it is when a member is deleted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.networks.classifier import ensemble
from rush_bench.networks.specs import resolve
from rush_bench.store import model_names, read_card, read_weights, save_model

ALIKE = ("dataset", "noise")  # keys of a card that members must share


def make_ensemble(models: Sequence[str], *, name: str, store: str | Path = "models") -> Path:
    """The folder of the new model, whose card names its members with their digests. The same call again changes nothing.

    models: names in the store, at least two, `NAME:best` for a best epoch. BadInput for fewer, for one named twice, for members
    of other data sets, images or noise laws, and where `name` is another model.
    """
    home = Path(store)
    pairs = [(model, which or "model") for model, _, which in (text.partition(":") for text in models)]
    if len(pairs) < 2 or len(set(pairs)) < len(pairs):
        raise BadInput(f"an ensemble has at least two models, each once; not {', '.join(models) or 'none'}")
    if not name or Path(name).name != name:
        raise BadInput(f"model name {name!r} must be a plain folder name; the folder above it is --store")
    cards = [read_card(home, model) for model, _ in pairs]
    specs = [resolve(card["network"]) for card in cards]
    for model, card, spec in zip(models, cards, specs, strict=True):
        differing = [key for key in ALIKE if card.get(key) != cards[0].get(key)]
        differing += [key for key in ("classes", "channels", "size") if spec[key] != specs[0][key]]
        if differing:
            raise BadInput(f"{model} and {models[0]} differ in {', '.join(differing)}; an ensemble's members agree in that")
    networks = []
    for (model, which), spec in zip(pairs, specs, strict=True):
        networks.append(build(spec))
        networks[-1].load_state_dict(read_weights(home, model, which))
    card = ensemble_card(name, pairs, cards, {"name": "ensemble", "members": specs})
    if name in model_names(home) and read_card(home, name).get("members") != card["members"]:
        raise BadInput(f"{store} has another model named {name!r}; choose another --name, or delete its folder")
    if name not in model_names(home):
        save_model(home / name, card, ensemble(networks, card["network"]).state_dict())
    return home / name


def ensemble_card(name: str, pairs: list[tuple[str, str]], cards: list[dict[str, Any]], spec: dict[str, Any]) -> dict[str, Any]:
    """What is known of the ensemble: what its members have in common, and who they are."""

    def joint(key: str) -> str | None:
        return " + ".join(dict.fromkeys(str(card[key]) for card in cards if card.get(key))) or None

    return {
        "name": name,
        "recipe": "ensemble",
        "dataset": cards[0]["dataset"],
        "pretrain_dataset": joint("pretrain_dataset"),
        "preset": joint("preset"),
        "seed": None,
        "network": resolve(spec),
        "noise": cards[0].get("noise"),
        "votes": cards[0]["votes"] if all(card["votes"] == cards[0]["votes"] for card in cards) else [0],
        "protocol": joint("protocol"),
        "protocol_in_words": joint("protocol_in_words"),
        "extra_data": joint("extra_data"),
        "members": [
            {"name": model, "weights": which, "recipe": card["recipe"], "sha256": card["sha256"][which]}
            for (model, which), card in zip(pairs, cards, strict=True)
        ],
        "settings": {},
        "data": {},
    }
