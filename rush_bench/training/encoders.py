"""Pre-trainings are kept apart from models: a run that would repeat one takes the kept encoder instead.

Encoders lie in `<store>/encoders/<name>/` in the format of a model, card and all, where no attack looks for models. The
weights are `encoder.*`; `head.*` and `carried/<what>/*` beside them are for later stages.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from rush_bench.files import digest
from rush_bench.settings import to_dict
from rush_bench.store import CARRIED, ENCODERS, model_names, read_card, read_weights, save_model
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import Context, Plan, Recipe

# what decides the weights that a pre-training gives
PRETRAINING_CODE = ("datasets", "networks", "recipes", "training", "features.py", "noise.py", "threats.py")


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a store, of a model or of an encoder: by the network's own names, and what is carried for later stages."""

    card: dict[str, Any]
    sha256: str
    tensors: dict[str, Tensor]
    carried: dict[str, dict[str, Tensor]]

    def weights(self, head: bool) -> dict[str, Tensor]:
        """`encoder.*`, and with `head` what else the network has."""
        return {key: value for key, value in self.tensors.items() if head or key.startswith("encoder.")}


def read_stored_weights(folder: Path, name: str, weights_name: str = "model") -> StoredWeights:
    """A folder's card and weights. BadInput where the weights are not those of the card."""
    card, tensors, carried = read_card(folder, name), {}, dict[str, dict[str, Tensor]]()
    for key, value in read_weights(folder, name, weights_name).items():
        if key.startswith(CARRIED):
            _, what, rest = key.split("/", 2)
            carried.setdefault(what, {})[rest] = value
        else:
            tensors[key] = value
    return StoredWeights(card, card["sha256"][weights_name], tensors, carried)


@dataclass(frozen=True)
class SharedPretraining:
    """The pre-training of a run, which other runs may share: its number of stages, and all that decides its weights."""

    stages: int
    key: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def find(self) -> "StoredWeights | None":
        """The same pre-training, if it was done before."""
        folder = self.folder.parent
        return read_stored_weights(folder, self.name) if self.name in model_names(folder) else None

    def save(self, context: Context, card: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Save it, unless another run did so in the meantime."""
        if self.name in model_names(self.folder.parent):
            return
        carried = {f"{CARRIED}{what}/{key}": v for what, part in context.carried.items() for key, v in part.items()}
        keys = ("recipe", "dataset", "pretrain_dataset", "preset", "seed", "network", "extra_data")
        about = {"name": self.name, **{key: card[key] for key in keys}, "votes": [], **self.key, **results}
        save_model(self.folder, about, {**context.network.state_dict(), **carried})


def shared_pretraining(
    system: Recipe, plans: list[Plan], settings: RunSettings, card: Mapping[str, Any], store: Path
) -> SharedPretraining | None:
    """The pre-training of a run: its stages up to the first that sees labels; None where there are none.

    Its identity is all that decides its weights: the settings except `system.finetuning_settings`, network, data, seed, code.
    """
    count = next((number for number, plan in enumerate(plans) if plan.labelled), 0)
    if count == 0:
        return None
    files = {
        key: value
        for key, value in card["data"].get("files", {}).items()
        if key.split(".")[0] not in system.finetuning_settings
    }
    digests = {key: value for key, value in card["data"]["digest"].items() if key in ("pretrain", "train", "val")}
    key = {
        "stages": [plan.name for plan in plans[:count]],
        "settings": {key: value for key, value in to_dict(settings).items() if key not in system.finetuning_settings},
        "data": {"digest": digests} | ({"files": files} if files else {}),
        "code": code_digest(system.plans.__module__),
    }
    name_digest = digest([key, card["recipe"], card["network"], card["seed"]])
    return SharedPretraining(count, key, store / ENCODERS / f"{card['recipe']}-{card['pretrain_dataset']}-{name_digest[:12]}")


def code_digest(module: str) -> str:
    """SHA-256 of the code that pre-trains (`PRETRAINING_CODE` and a plug-in's module), without comments and docstrings."""
    root = Path(__file__).parents[1]
    files = [
        file
        for part in PRETRAINING_CODE
        for file in ([root / part] if part.endswith(".py") else sorted((root / part).glob("*.py")))
    ]
    plugin_file = getattr(sys.modules[module], "__file__", None)
    files += [Path(plugin_file)] if plugin_file and Path(plugin_file) not in files else []
    return digest([_code_without_comments(file) for file in files])


@cache
def _code_without_comments(file: Path) -> str:
    return ast.unparse(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return tree
