"""A cell: one (defence, attack, threat, images, seed) under its key, and how it is described on disk. No torch is imported."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.files import digest, read_json

FORMAT = 1
IDENTITY = ("format", "weights", "defense", "attack", "threat", "images", "seed", "repeats", "chunk")
MOST = 10**9  # images, draws: more is no record


@dataclass(frozen=True)
class Cell:
    """One cell. `identity` is hashed to the key; `labels` is what people read and never enters the key.

    identity, at least: format (FORMAT), weights (digest), defense (its settings: noise, votes, ...), attack (name and
    settings together), threat ({"norm", "eps"}, or None for clean), images (digest), seed, repeats (K), chunk (images
    in a chunk). Cells that agree in all but attack share a row of a table.

    labels, at least: defense ("rush-cifar10@64"), dataset, attack ("clean", "pgd", "eot", "aa", "apgd", "worst"),
    suite, deterministic, n. Besides, where known: model, recipe, votes, pretrain_dataset, protocol, extra_data,
    architecture, preset, budget.
    """

    identity: dict[str, Any]
    labels: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [k for k in IDENTITY if k not in self.identity]
        missing += [k for k in ("defense", "dataset", "attack", "suite", "deterministic", "n") if k not in self.labels]
        if missing:
            raise ValueError(f"a cell lacks {', '.join(missing)}")
        identity, threat = self.identity, self.identity["threat"]
        for name, value in (("n", self.labels["n"]), ("chunk", identity["chunk"]), ("repeats", identity["repeats"])):
            if type(value) is not int or not 1 <= value <= MOST:
                raise ValueError(f"a cell with {name} = {value!r}")
        if type(identity["seed"]) is not int or not 0 <= identity["seed"] < 2**63:
            raise ValueError(f"a cell with seed = {identity['seed']!r}")
        if not isinstance(identity["attack"], dict) or not isinstance(identity["defense"], dict):
            raise ValueError("a cell whose attack or defense is no table of settings")
        if threat is not None and not (isinstance(threat, dict) and {"norm", "eps"} <= threat.keys()):
            raise ValueError(f"a cell with threat = {threat!r}")

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the identity."""
        return digest(self.identity)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return math.ceil(self.labels["n"] / self.identity["chunk"])

    def rows(self, chunk: int) -> range:
        """Rows of the images that a chunk holds."""
        size = self.identity["chunk"]
        return range(self.labels["n"])[chunk * size : (chunk + 1) * size]


def description(cell: Cell, labels: list[dict[str, Any]]) -> dict[str, Any]:
    content = {"format": FORMAT, "key": cell.key, "identity": cell.identity, "labels": labels}
    return content | {"labels_digest": digest(labels)}  # the key covers the identity alone


def read_description(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise BadInput("it has no cell.json, so it is no record, or only half of one; delete it if it is in the way")
    found = read_json(path)
    identity, labels = (found.get(part) if isinstance(found, dict) else None for part in ("identity", "labels"))
    plain = isinstance(labels, list) and all(isinstance(about, dict) for about in labels)
    if not labels or not plain or not isinstance(identity, dict):
        raise BadInput(f"{path} is not a description of a cell; delete its folder and run the same command again")
    if found.get("format") != FORMAT:
        raise BadInput(f"{path} has format {found.get('format')}, this version reads {FORMAT}; run the same command again")
    if "labels_digest" in found and found["labels_digest"] != digest(labels):
        raise BadInput(f"{path} has labels that were changed; delete it and run the same command again")
    for about in labels:
        _check_labels(about)
    return identity, labels


def _check_labels(labels: dict[str, Any]) -> None:
    """ValueError unless what tables read is of the type that they take it for."""
    wanted: dict[str, tuple[type, ...]] = dict.fromkeys(("defense", "dataset", "attack", "suite", "norm", "split"), (str,))
    wanted |= {"n": (int,), "deterministic": (bool,), "eps": (int, float), "votes": (int, type(None)), "classes": (int,)}
    for key, kinds in wanted.items():
        if key in labels and (type(labels[key]) not in kinds or (key == "eps" and not math.isfinite(labels[key]))):
            raise ValueError(f"a cell whose label {key} is {labels[key]!r}")
