"""`prepare`: what a training would be, from what is asked for: its settings, its images, its card. Nothing is trained."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rush_bench import registry
from rush_bench.datasets import Images, load_dataset
from rush_bench.datasets.color import gray
from rush_bench.datasets.loading import find_source
from rush_bench.errors import BadInput, unknown_name
from rush_bench.networks import resolve
from rush_bench.noise import check_seed, is_noise, noise_from
from rush_bench.protocols import in_words
from rush_bench.settings import override, parse_assignments, read_toml, to_dict
from rush_bench.store import check_name, read_card
from rush_bench.training.checkpoint import identity, refuse_different_run
from rush_bench.training.initial_weights import (
    InitialWeights,
    check_initial_weights,
    find_initial_weights,
    layers_of_start,
    name_of_start,
    network_of_start,
)
from rush_bench.training.optimisers import check_optimisation
from rush_bench.training.options import RunSettings, file_digests
from rush_bench.training.semi_supervised import label_splits
from rush_bench.training.stage import Recipe


@dataclass(frozen=True)
class PreparedTraining:
    """A training before its first step: what decides it, the card so far, and what the user should know."""

    system: Recipe
    settings: RunSettings
    defaults: RunSettings  # where nobody asks for others
    splits: dict[str, Images]
    start: InitialWeights | None
    card: dict[str, Any]
    notes: list[str]

    def finished(self, store: Path) -> bool:
        """Whether the store has this very model. BadInput where its folder holds another run."""
        folder = store / self.card["name"]
        if not (folder / "card.json").exists():
            return False
        stored = identity(read_card(store, self.card["name"]))
        refuse_different_run(stored, identity(self.card), folder, to_dict(self.defaults))
        return True


def prepare(
    recipe: str | Recipe,
    *,
    dataset: str,
    from_: str | Path | InitialWeights | None = None,
    protocol: str | None = None,
    noise: str | None = None,
    pretrain_on: str | None = None,
    preset: str = "short",
    config: str | Path | None = None,
    sets: Iterable[str] = (),
    name: str | None = None,
    store: str | Path = "models",
    data_dir: str | Path | None = None,
    seed: int = 0,
    n_train: int | None = None,
    fetch: Callable[..., Images] | None = None,
) -> PreparedTraining:
    """What `train` would run on the same arguments; nothing is trained.

    fetch: called in place of `load_dataset`. from_: `train`'s, or weights as found, of which the card alone is read here.
    BadInput as `train`'s, but for a folder that holds another run.
    """
    seed = check_seed(seed)
    for option, wanted in (("dataset", dataset), ("pretrain_on", pretrain_on)):
        if not isinstance(wanted, str | None):
            raise BadInput(f"{option} takes the name of a data set or a path as text, not {type(wanted).__name__}")
    if name is not None:
        check_name(name)
    system: Recipe = registry.recipes.load(recipe) if isinstance(recipe, str) else recipe
    layers = [read_toml(Path(config)) if config else {}, parse_assignments(sets)]
    asked = {"n_train": n_train, "noise": noise, "finetune.protocol": protocol}
    options = {key: value for key, value in asked.items() if value is not None}
    for key, value in options.items():
        if layers[-1].get(key, str(value)) != str(value):
            raise BadInput(f"{key} is asked for twice, as {value} and in --set {key}={layers[-1][key]}; leave one of them out")
    layers.append(options)
    if from_ is None or isinstance(from_, InitialWeights):
        start, notes = from_, list[str]()
    else:
        start, notes = find_initial_weights(from_, Path(store), dataset)
    layers = layers_of_start(system, system.card(resolve_settings(system, preset, None, layers))["protocol"], start, layers)
    provisional = resolve_settings(system, preset, None, layers)
    strict = any("n_train" in layer for layer in layers)
    splits = load_splits(system, provisional, dataset, pretrain_on or dataset, data_dir, strict, fetch)
    settings, defaults = (resolve_settings(system, preset, splits["train"].shape, part, dataset) for part in (layers, []))
    check_optimisation(settings, defaults)
    if start is not None:
        check_initial_weights(start, settings, splits["train"])
    settings = _fit_batches(system, settings, splits, notes.append)
    card = make_card(system, settings, splits, preset, seed, name, start)
    return PreparedTraining(system, settings, defaults, splits, start, card, notes)


def resolve_settings(
    system: Recipe, preset: str, shape: tuple[int, ...] | None, layers: Iterable[Mapping[str, Any]], dataset: str = ""
) -> RunSettings:
    """Defaults, what they are on this data set, preset, what suits the images' shape, then the user's layers."""
    if preset not in system.presets:
        raise unknown_name("preset", str(preset), system.presets)
    for_shape = system.adapt(preset, shape) if shape else {}
    published = [system.datasets.get(key, {}) for key in (dataset, f"{dataset}-{shape[1]}" if shape else "")]
    defaults = [*published, system.presets[preset], for_shape]
    settings = override(system.settings, *defaults, *layers)
    if dependent := system.dependent_defaults(settings):
        settings = override(system.settings, *defaults, dependent, *layers)
    if settings.noise != "none" and not is_noise(settings.noise):
        raise BadInput(f"noise={settings.noise} is no noise; write noise=none, or give its law a scale above 0")
    return settings


def trained_as_published(card: Mapping[str, Any]) -> bool:
    """Whether a model of the store was trained with the preset `paper` of its recipe, and none of its settings was another."""
    if card.get("preset") != "paper" or "from" in card or card["recipe"] not in registry.recipes.entries:
        return False
    network = card["network"]
    shape = (network["channels"], network["size"], network["size"])
    settings = to_dict(resolve_settings(registry.recipes.load(card["recipe"]), "paper", shape, [], card["dataset"]))
    return bool(json.loads(json.dumps(settings)) == card.get("settings"))


def load_splits(
    system: Recipe,
    settings: RunSettings,
    dataset: str,
    pretrain_on: str,
    data_dir: str | Path | None,
    strict: bool,
    fetch: Callable[..., Images] | None = None,
) -> dict[str, Images]:
    """The splits that the recipe's stages see, `train` and `val` of the target data set always among them.

    What is pre-trained on takes the target's size and channels. n_train is at most so many of each; `strict`, for one that
    the user gave: some split must have that many.
    """

    def load(source: str, split: str, size: int | Sequence[int] | None = settings.size) -> Images:
        get = fetch or load_dataset
        images = get(source, split, data_dir=data_dir, size=size)
        if split == "val" or settings.n_train is None or settings.n_train >= len(images):
            return images
        return get(source, split, settings.n_train, data_dir=data_dir, size=size)

    splits = {split: load(dataset, split) for split in ("train", "val")}
    if bool((splits["train"].labels < 0).any()):
        raise BadInput(
            f"data set {dataset!r} has no labels in its training split, which fine-tuning needs; "
            f"use it as --pretrain-on and give a labelled one as --dataset"
        )
    if any(plan.split == "pretrain" for plan in system.plans(settings)):
        channels, size = splits["train"].shape[0], splits["train"].size
        split = "pretrain" if find_source(pretrain_on).name == splits["train"].name else "transfer"
        splits["pretrain"] = with_channels(load(pretrain_on, split, size), channels)
    elif pretrain_on != dataset:
        raise BadInput(f"{system.name} has no pre-training stage; leave --pretrain-on out")
    if any(plan.split == "labelled" for plan in system.plans(settings)):
        splits |= label_splits(splits, settings.label_share, settings.semi.index)  # type: ignore[attr-defined]
    most = max(len(images) for split, images in splits.items() if split != "val")
    if strict and settings.n_train is not None and not 1 <= settings.n_train <= most:
        raise BadInput(f"n_train={settings.n_train}, but there are {most} training images; give 1 to {most}")
    return splits


def with_channels(images: Images, channels: int) -> Images:
    """The images with 1 or 3 channels: one value per pixel three times over, or three as their luma (ITU-R 601)."""
    if images.shape[0] == channels:
        return images
    if channels == 3:
        pixels = images.pixels.expand(-1, 3, -1, -1).contiguous()
    else:  # 1,000 images at a time: float32 of STL-10's 100,000 would be ten times what they take
        parts = [gray(part / 255) for part in images.pixels.split(1000)]
        pixels = torch.cat([(255 * part).round_().to(torch.uint8) for part in parts])
    return dataclasses.replace(images, pixels=pixels)


def make_card(
    system: Recipe,
    settings: RunSettings,
    splits: Mapping[str, Images],
    preset: str,
    seed: int,
    name: str | None,
    start: InitialWeights | None = None,
) -> dict[str, Any]:
    """What is known of the model before training it."""
    train_on, pretrained_on = splits["train"], splits.get("pretrain", splits["train"])
    options = {key: value for key, value in dataclasses.asdict(settings.network).items() if value}
    law, files, protocol_keys = noise_from(settings.noise), file_digests(settings), system.card(settings)
    network = resolve(options | {"classes": len(train_on.classes), "channels": train_on.shape[0], "size": train_on.size})
    origin: dict[str, Any] = {}
    name_by_default = default_name(system.name, train_on.name, pretrained_on.name)
    if start is not None:
        network = network_of_start(start, len(train_on.classes), train_on.size)
        head_kept = protocol_keys["protocol"] == "supervised" and start.fits(network, train_on.name)
        origin = {"from": start.about(head_kept)}
        name_by_default = name_of_start(system, protocol_keys["protocol"], start, train_on.name)
        known = dict.fromkeys([start.card.get("extra_data"), protocol_keys["extra_data"]])
        protocol_keys["extra_data"] = ", ".join(data for data in known if data) or None
    return {
        "name": check_name(name_by_default if name is None else name),
        "recipe": system.name,
        "dataset": train_on.name,
        "pretrain_dataset": start.pretrained_on if start is not None else pretrained_on.name if "pretrain" in splits else None,
        "preset": preset,
        "seed": seed,
        "network": network,
        "noise": law.to_dict() if law else None,
        **protocol_keys,
        "protocol_in_words": in_words(protocol_keys["protocol"]),
        **origin,
        "settings": to_dict(settings),
        "data": {
            "digest": {key: images.digest for key, images in sorted(splits.items())},
            **{f"n_{key}": len(images) for key, images in sorted(splits.items())},
            **({"files": files} if files else {}),
            **({"from": start.sha256} if start is not None else {}),
        },
    }


def default_name(recipe: str, dataset: str, pretrained_on: str) -> str:
    """`rush-cifar10`, or `rush-cifar10-to-stl10` for a transfer."""
    return f"{recipe}-{dataset}" if pretrained_on == dataset else f"{recipe}-{pretrained_on}-to-{dataset}"


def _fit_batches(
    system: Recipe, settings: RunSettings, splits: Mapping[str, Images], note: Callable[[str], None]
) -> RunSettings:
    """Batches no larger than the data; the card then states what ran."""
    for plan in system.plans(settings):
        count, batch = len(splits[plan.split]), plan.settings.batch_size
        if count < 2:
            raise BadInput(f"stage {plan.name!r} needs at least 2 images, {splits[plan.split].name} has {count}")
        if batch > count:
            note(f"{plan.name}.batch_size is {count}: there are no more images")
            settings = override(settings, {f"{plan.name}.batch_size": count})
    return settings
