"""Pre-trained encoders: kept once, found again by a run that would train the same one, and started from by name or file.

They lie in `<store>/encoders/<name>/` in the format of a model, card and all, where no attack looks for models. The weights
are `encoder.*`; those that a pre-training here left have `head.*` and `carried/<what>/*` for later stages beside them.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import rush_bench
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import digest
from rush_bench.networks import resolve
from rush_bench.settings import to_dict
from rush_bench.store import ENCODERS, model_names, read_card, read_weights, save_model
from rush_bench.training.options import NetworkSettings, RunSettings
from rush_bench.training.stage import Context, Plan, Recipe

CARRIED = "carried/"
CODE = ("datasets", "networks", "recipes", "training", "noise.py")  # what decides the weights that a pre-training gives


@dataclass(frozen=True)
class Start:
    """Weights that a training starts from: an encoder of the store, or a model, whose head comes along.

    network: the full spec; encoder and head: tensors by the network's own names; carried: what its pre-training left for
    later stages; card: its own.
    """

    name: str
    kind: str  # encoder or model
    sha256: str
    card: Mapping[str, Any]
    encoder: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    carried: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def network(self) -> dict[str, Any]:
        """The spec of its network."""
        return self.card["network"]

    @property
    def pretrained_on(self) -> str:
        """The data set that its encoder learned from first."""
        return self.card.get("pretrain_dataset") or self.card["dataset"]

    def settings(self) -> dict[str, Any]:
        """Its network as a layer of settings, so that a card shows what ran."""
        known = to_dict(NetworkSettings())
        return {f"network.{key}": tuple(v) if isinstance(v := self.network[key], list) else v for key in known}

    def fits(self, network: Mapping[str, Any], dataset: str) -> bool:
        """Whether its head tells the classes of that network apart: a model of the same data set and as many classes."""
        return bool(self.head) and (self.card["dataset"], self.network["classes"]) == (dataset, network["classes"])

    def about(self, head: bool) -> dict[str, Any]:
        """Where it came from, for the card of the model that grows out of it."""
        keys = ("recipe", "protocol", "pretrain_dataset", "extra_data", "preset", "seed", "source")
        known = {key: self.card[key] for key in keys if self.card.get(key) is not None}
        return {"name": self.name, "kind": self.kind, "sha256": self.sha256, "head": "kept" if head else "new"} | known


def find_start(wanted: str | Path, store: Path, dataset: str) -> tuple[Start, list[str]]:
    """What `--from` names: an encoder or a model of the store (`NAME:best`: its best epoch), or a checkpoint file.

    A file is imported as an encoder first, under its own name and with the usual choices, which the notes state. BadInput
    for a name that is neither, or both.
    """
    notes: list[str] = []
    name, _, which = str(wanted).partition(":")
    encoders, models = model_names(store / ENCODERS), model_names(store)
    if name not in (*encoders, *models) and Path(wanted).is_file():
        from rush_bench.defenses.published import import_model  # defences stand on top of networks, not beside training

        done = import_model(wanted, Path(wanted).stem, as_="encoder", dataset=dataset, store=store)
        name, which, notes = done.card["name"], "", list(done.notes)
        encoders = [name]
    if name in encoders and name in models:
        raise BadInput(f"{store} has both a model and an encoder named {name!r}; rename the folder of one of them")
    if name not in (*encoders, *models):
        raise unknown_name(f"encoder or model in {store}, nor a file,", str(wanted), [*encoders, *models])
    home = store / ENCODERS if name in encoders else store
    card, which = read_card(home, name), which or "model"
    tensors = read_weights(home, name, which)
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
    for key, value in tensors.items():
        if not key.startswith(CARRIED):
            parts[key.partition(".")[0]][key] = value
    full = name if which == "model" else f"{name}:{which}"
    kind = "encoder" if name in encoders else "model"
    head = parts["head"] if kind == "model" else {}
    return Start(full, kind, card["sha256"][which], card, parts["encoder"], head, carried_of(tensors)), notes


def carried_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a pre-training left for later stages, out of an encoder's tensors."""
    carried: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(CARRIED):
            _, what, rest = key.split("/", 2)
            carried.setdefault(what, {})[rest] = value
    return carried


@dataclass(frozen=True)
class Shared:
    """The pre-training of a run as a thing of its own: how many stages it is, and all that decides its weights."""

    stages: int
    key: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def find(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The network's tensors, what later stages need, and the card of the same pre-training, if it was done before."""
        home = self.folder.parent
        if self.name not in model_names(home):
            return None
        tensors = read_weights(home, self.name)
        network = {key: value for key, value in tensors.items() if not key.startswith(CARRIED)}
        return network, carried_of(tensors), read_card(home, self.name)

    def keep(self, context: Context, card: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Save it, unless another run did so in the meantime."""
        if self.name in model_names(self.folder.parent):
            return
        carried = {f"{CARRIED}{what}/{key}": v for what, part in context.carried.items() for key, v in part.items()}
        keys = ("recipe", "dataset", "pretrain_dataset", "preset", "seed", "network", "extra_data")
        about = {"name": self.name, **{key: card[key] for key in keys}, **self.key, **results}
        save_model(self.folder, about, {**context.network.state_dict(), **carried})


def shared(system: Recipe, plans: list[Plan], settings: RunSettings, card: Mapping[str, Any], store: Path) -> Shared | None:
    """The pre-training of a run: its stages up to the first that sees labels; None where there are none.

    Its identity is all that decides its weights: settings but for `system.tuning`, network, data, seed, and the code.
    """
    count = next((number for number, plan in enumerate(plans) if plan.labelled), 0)
    if count == 0:
        return None
    files = {key: value for key, value in card["data"].get("files", {}).items() if key.split(".")[0] not in system.tuning}
    digests = {key: value for key, value in card["data"]["digest"].items() if key in ("pretrain", "train", "val")}
    key = {
        "stages": [plan.name for plan in plans[:count]],
        "settings": {key: value for key, value in to_dict(settings).items() if key not in system.tuning},
        "data": {"digest": digests} | ({"files": files} if files else {}),
        "code": code_digest(system.plans.__module__),
    }
    whole = digest([key, card["recipe"], card["network"], card["seed"]])
    return Shared(count, key, store / ENCODERS / f"{card['recipe']}-{card['pretrain_dataset']}-{whole[:12]}")


@cache
def code_digest(module: str) -> str:
    """SHA-256 of the code that pre-trains, comments and docstrings left out: of `CODE` and of a plug-in's own module."""
    root = Path(rush_bench.__file__).parent
    files = [file for part in CODE for file in ([root / part] if part.endswith(".py") else sorted((root / part).glob("*.py")))]
    own = getattr(sys.modules[module], "__file__", None)
    files += [Path(own)] if own and Path(own) not in files else []
    return digest([ast.unparse(_plain(ast.parse(file.read_text(encoding="utf-8")))) for file in files])


def _plain(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return tree


def started_network(start: Start, classes: int, size: int | tuple[int, int]) -> dict[str, Any]:
    """The spec of a network that starts there, for so many classes and images of that size."""
    return resolve({**start.network, "classes": classes, "size": size, "routes": 1})
