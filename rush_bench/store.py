"""The model store: `models/<name>/` with safetensors weights and a card. Training writes it, defences read it.

model.safetensors   the last epoch's weights (what the papers report)
best.safetensors    the best epoch on the held-out validation split, where it is another one
transform.safetensors   weights of a transform before the network, if it has any (a purifier)
card.json           recipe, resolved settings, data digest, validation numbers, environment, SHA-256 of the files
"""

import json
import platform
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import digest, read_json, sha256_file, write_atomic, write_json

if TYPE_CHECKING:  # torch is imported by the functions that need it: names and cards are listed without it
    import torch
    from torch import Tensor

FORMAT = 1
CARRIED = "carried/"  # begins the names of weights beside an encoder's own, kept for later stages: carried/<what>/<key>
ENCODERS = "encoders"  # the folder of a store where encoders lie, each in the format of a model
NETWORK = {"name", "classes", "channels", "size"}
CARD = {"recipe": str, "dataset": str, "network": dict, "votes": list, "sha256": dict}  # what others read in a card


def save_model(
    folder: Path,
    card: dict[str, Any],
    state: "dict[str, Tensor]",
    best: "dict[str, Tensor] | None" = None,
    transform: "dict[str, Tensor] | None" = None,
) -> None:
    """Write weights and card of a trained model; `card` gains format, environment, the SHA-256 of each file and its own.

    `transform`: the weights of a transform before the network (a purifier).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files = {"model": state} | {k: x for k, x in (("best", best), ("transform", transform)) if x is not None}
    sha256 = {}
    for stem, tensors in files.items():
        path = folder / f"{stem}.safetensors"
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(path, partial(save_file, plain), fails=SafetensorError)
        sha256[stem] = sha256_file(path)
    card = {"format": FORMAT, **card, "environment": environment(next(iter(state.values())).device), "sha256": sha256}
    write_card(folder, card)


def check_name(name: str) -> str:
    """A model's name, or BadInput: one that no command could name again, as `name@votes`, `name:best`, in a list or pattern."""
    if not re.fullmatch(r"\w[\w.+=-]{0,99}", name) or name in ("all", ENCODERS):
        raise BadInput(
            f"model name {name!r} must be a plain folder name of at most 100 letters, digits and _ . + = -, beginning with a "
            f"letter or digit, and not `all` or `{ENCODERS}`; the folder above it is --store"
        )
    return name


def model_names(store: Path) -> list[str]:
    """Names of the finished models in a store, sorted (no torch work, no weights read)."""
    return sorted(path.parent.name for path in store.glob("*/card.json"))


def read_card(store: Path, name: str) -> dict[str, Any]:
    """The card of a model; a wrong name is a BadInput with a suggestion, so is a card that is none."""
    path = store / name / "card.json"
    if not path.is_file():
        raise unknown_name(f"model in {store}", name, model_names(store))
    card = read_json(path)
    whole = isinstance(card, dict) and all(isinstance(card.get(key), kind) for key, kind in CARD.items())
    if not whole or not card["network"].keys() >= NETWORK or not all(type(m) is int and m >= 0 for m in card["votes"]):
        raise BadInput(f"{path} is no card of a model; copy it again, or delete the folder and train again")
    stated = card.pop("digest", None)  # older cards have none
    if stated not in (None, digest(card)):
        raise BadInput(f"{path} was changed; copy it again, or delete the folder and train again")
    return card


def read_cards(store: Path) -> dict[str, dict[str, Any]]:
    """The cards of the finished models by name, sorted; a damaged one is left out, with a line on stderr, once."""
    cards = {}
    for name in model_names(store):
        try:
            cards[name] = read_card(store, name)
        except BadInput as error:
            _say(f"left out model {name}: {error}")
    return cards


def cards_measured(store: Path, digests: set[str]) -> dict[str, dict[str, Any]]:
    """The cards, by name, of the models with a file of weights of one of these SHA-256, as records name what they measured."""
    return {name: card for name, card in read_cards(store).items() if digests & set(card["sha256"].values())}


@cache
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def read_weights(store: Path, name: str, which: str = "model") -> "dict[str, Tensor]":
    """The weights of a model (`model`: last epoch, `best`), checked against the card's SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card, path = read_card(store, name), store / name / f"{which}.safetensors"
    if which not in card["sha256"]:
        raise BadInput(f"model {name!r} has no {which!r} weights; it has {', '.join(card['sha256'])}")
    try:
        if sha256_file(path) != card["sha256"][which]:
            raise BadInput(
                f"{path} does not match the SHA-256 in its card: it was cut or changed; "
                "copy it again, or delete the folder and train again"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error}); copy it again, or delete the folder and train again") from error


def rename_model(store: Path, old: str, new: str) -> None:
    """Call a model otherwise; BadInput for a name that is none or is taken."""
    card = read_card(store, old)
    if (store / check_name(new)).exists():
        raise BadInput(f"{store} has a model {new!r} already; choose another name")
    (store / old).rename(store / new)
    write_card(store / new, card | {"name": new})


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the card of a model, with its digest; the last file of a folder, which makes a model of it."""
    write_json(folder / "card.json", card | {"digest": digest(json.loads(json.dumps(card)))})


def remove_model(store: Path, name: str) -> None:
    """Delete a model with its weights; BadInput for a name that the store has not."""
    if name not in model_names(store):
        raise unknown_name(f"model in {store}", name, model_names(store))
    shutil.rmtree(store / name)


def environment(device: "torch.device") -> dict[str, str]:
    """What the numbers were made on: versions, processor, the device of the weights. No host name and no path."""
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
    }
