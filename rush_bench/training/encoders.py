"""The pre-training of a run as a thing of its own: kept once, and found again by a run that would train the same one.

Encoders lie in `<store>/encoders/<name>/` in the format of a model, card and all, where no attack looks for models. The
weights are `encoder.*`; a pre-training leaves `head.*` and `carried/<what>/*` for later stages beside them.
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
CODE = ("datasets", "networks", "recipes", "training", "features.py", "noise.py", "threats.py")


@dataclass(frozen=True)
class Stored:
    """Weights of a store, of a model or of an encoder: by the network's own names, and what is carried for later stages."""

    card: dict[str, Any]
    sha256: str
    tensors: dict[str, Tensor]
    carried: dict[str, dict[str, Tensor]]

    def weights(self, head: bool) -> dict[str, Tensor]:
        """`encoder.*`, and with `head` what else the network has."""
        return {key: value for key, value in self.tensors.items() if head or key.startswith("encoder.")}


def read_stored(home: Path, name: str, which: str = "model") -> Stored:
    """A folder's card and weights. BadInput where the weights are not those of the card."""
    card, tensors, carried = read_card(home, name), {}, dict[str, dict[str, Tensor]]()
    for key, value in read_weights(home, name, which).items():
        if key.startswith(CARRIED):
            _, what, rest = key.split("/", 2)
            carried.setdefault(what, {})[rest] = value
        else:
            tensors[key] = value
    return Stored(card, card["sha256"][which], tensors, carried)


@dataclass(frozen=True)
class Shared:
    """The pre-training of a run as a thing of its own: how many stages it is, and all that decides its weights."""

    stages: int
    key: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def find(self) -> "Stored | None":
        """The same pre-training, if it was done before."""
        home = self.folder.parent
        return read_stored(home, self.name) if self.name in model_names(home) else None

    def keep(self, context: Context, card: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Save it, unless another run did so in the meantime."""
        if self.name in model_names(self.folder.parent):
            return
        carried = {f"{CARRIED}{what}/{key}": v for what, part in context.carried.items() for key, v in part.items()}
        keys = ("recipe", "dataset", "pretrain_dataset", "preset", "seed", "network", "extra_data")
        about = {"name": self.name, **{key: card[key] for key in keys}, "votes": [], **self.key, **results}
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
    root = Path(__file__).parents[1]
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
