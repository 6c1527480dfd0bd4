"""Weights that a training starts from: `--from` an encoder of the store, a model, or a file of others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rush_bench.datasets import Images
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import sha256_file
from rush_bench.networks import resolve
from rush_bench.networks.routes import CARRIED as ROUTES
from rush_bench.settings import to_dict
from rush_bench.store import ENCODERS, model_names, read_card
from rush_bench.training.encoders import StoredWeights, read_stored_weights
from rush_bench.training.options import NetworkSettings
from rush_bench.training.stage import Recipe

NOT_STATED = "not stated"  # the data set of an encoder that came as a file and nobody has said more of


@dataclass(frozen=True)
class InitialWeights(StoredWeights):
    """Weights that a training starts from: an encoder of the store, or a model, whose head comes along."""

    name: str
    kind: str  # encoder or model

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
        same = (self.card["dataset"], self.network["classes"]) == (dataset, network["classes"])
        return self.kind == "model" and same

    def about(self, head: bool) -> dict[str, Any]:
        """Where it came from, for the card of the model that grows out of it."""
        keys = ("recipe", "protocol", "pretrain_dataset", "extra_data", "preset", "seed", "epochs_done", "source")
        known = {key: self.card[key] for key in keys if self.card.get(key) is not None}
        return {"name": self.name, "kind": self.kind, "sha256": self.sha256, "head": "kept" if head else "new"} | known


def find_initial_weights(wanted: str | Path, store: Path, dataset: str) -> tuple[InitialWeights, list[str]]:
    """What `--from` names: an encoder or a model of the store (`NAME:best`: its best epoch), or a checkpoint file.

    A file is imported as an encoder first, under its own name and with the usual choices, which the notes state, unless it
    was before. What its encoder was pre-trained on is in no file, and stays not stated. BadInput for a name that is neither, or
    both.
    """
    notes: list[str] = []
    name, _, weights_name = str(wanted).partition(":")
    encoders, models = model_names(store / ENCODERS), model_names(store)
    if name not in (*encoders, *models) and Path(wanted).is_file():
        name, weights_name = Path(wanted).stem, ""
        if not imported_before(Path(wanted), store):
            from rush_bench.defenses.published import import_checkpoint  # it stands on top of networks, not beside training

            told: dict[str, Any] = {"as_": "encoder", "dataset": dataset, "pretrain_dataset": NOT_STATED}
            notes = list(import_checkpoint(wanted, name, store=store, **told).notes)
            notes.append(
                f"{Path(wanted).name} does not say what its encoder was pre-trained on; to state it: "
                f"rush-bench import {wanted} --as encoder --name {name} --dataset NAME, then --from {name}"
            )
        encoders = [name]
    if name in encoders and name in models:
        raise BadInput(f"{store} has both a model and an encoder named {name!r}; rename the folder of one of them")
    if name not in (*encoders, *models):
        raise unknown_name(f"encoder or model in {store}, nor a file,", str(wanted), [*encoders, *models])
    kind, folder = ("encoder", store / ENCODERS) if name in encoders else ("model", store)
    stored = read_stored_weights(folder, name, weights_name or "model")
    return InitialWeights(
        stored.card, stored.sha256, stored.tensors, stored.carried, f"{name}:{weights_name}" if weights_name else name, kind
    ), notes


def imported_before(file: Path, store: Path) -> bool:
    """Whether the store has this very file as an encoder under its own name, of which more may be known than the file says."""
    home = store / ENCODERS
    if file.stem not in model_names(home):
        return False
    return bool((read_card(home, file.stem).get("source") or {}).get("sha256") == sha256_file(file))


def layers_of_start(
    system: Recipe, protocol: str, start: InitialWeights | None, layers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The layers of settings of a run that starts from an encoder: its network, and its size of images unless another is given.

    BadInput where the recipe starts from nothing, or from nothing else than an encoder, and for settings of the network.
    """
    if start is None:
        if system.needs_encoder:
            raise BadInput(
                f"{system.name} puts a head on an encoder; say which: --from NAME or FILE (rush-bench list encoders)"
            )
        return layers
    if not system.needs_encoder and protocol != "supervised":
        raise BadInput(
            f"{system.name} makes its own encoder; --from is for finetune ({system.name}'s stages after pre-training: "
            "rush-bench train finetune --from NAME --protocol ...) and for supervised recipes"
        )
    given = sorted({key for layer in layers for key in layer if key.startswith("network.")})
    if given:
        raise BadInput(f"the network is that of {start.name}; leave {', '.join(given)} out")
    return [{"size": start.network["size"]}, *layers, start.settings()]


def check_initial_weights(start: InitialWeights, settings: Any, train: Images) -> None:
    """BadInput where the images have other channels, or the fine-tuning wants BatchNorm routes that are not there."""
    channels = start.network["channels"]
    if train.shape[0] != channels:
        raise BadInput(f"{start.name} takes images of {channels} channels, {train.name} has {train.shape[0]}")
    two = getattr(getattr(settings, "aff", None), "routes", 1) == 2 and settings.finetune.protocol == "AFF"
    if two and ROUTES not in start.carried:
        raise BadInput(f"aff.routes=2 needs an encoder with both BatchNorm routes; {start.name} has one")


def network_of_start(start: InitialWeights, classes: int, size: int | tuple[int, int]) -> dict[str, Any]:
    """The spec of a network that starts there, for so many classes and images of that size."""
    return resolve({**start.network, "classes": classes, "size": size, "routes": 1})


def name_of_start(system: Recipe, protocol: str, start: InitialWeights, dataset: str) -> str:
    """`ENCODER-SLF`, or with the data set where it is another; for supervised recipes `RECIPE-DATASET-from-NAME`."""
    base = start.name.replace(":", "-")
    if not system.needs_encoder:
        return f"{system.name}-{dataset}-from-{base}"
    return f"{base}-{protocol}" + ("" if dataset == start.pretrained_on else f"-{dataset}")
