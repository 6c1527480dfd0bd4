"""`train`: from a recipe's name to a finished model in the store."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench import registry
from rush_bench.datasets import Images, load_dataset
from rush_bench.datasets.color import gray
from rush_bench.datasets.loading import find_source
from rush_bench.devices import keep_freed_memory
from rush_bench.errors import BadInput, unknown_name
from rush_bench.networks import build, resolve
from rush_bench.noise import check_seed, noise_from
from rush_bench.progress import Bar
from rush_bench.protocols import in_words
from rush_bench.settings import override, parse_assignments, read_toml, to_dict
from rush_bench.store import check_name, read_card, save_model
from rush_bench.training.checkpoint import CheckpointFile, identity, refuse_different_run
from rush_bench.training.encoders import shared_pretraining
from rush_bench.training.initial_weights import (
    InitialWeights,
    check_initial_weights,
    find_initial_weights,
    layers_of_start,
    name_of_start,
    network_of_start,
)
from rush_bench.training.loop import Loop, Position
from rush_bench.training.options import RunSettings, file_digests
from rush_bench.training.processes import process_group
from rush_bench.training.seeds import derive
from rush_bench.training.semi_supervised import label_splits
from rush_bench.training.stage import Context, Recipe


def train(
    recipe: str | Recipe,
    *,
    dataset: str,
    from_: str | Path | None = None,
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
    device: str = "auto",
    max_minutes: float | None = None,
    n_train: int | None = None,
    log: str = "",
    report: Bar | None = None,
) -> Path:
    """Train a system and return its folder in the store, `<store>/<name>`.

    dataset: what the classifier learns; pretrain_on: what the first stage sees, if another data set (a transfer).
    from_: the encoder or model of the store (`NAME`, `NAME:best`), or the checkpoint file, whose weights it starts from: for
    the recipe `finetune`, which puts a head on an encoder, and for supervised ones, which keep a head of the same classes.
    Settings: the recipe's defaults, then preset, TOML file, `sets` ("pretrain.lr=0.1"), later ones last; n_train, noise and
    protocol (`finetune.protocol`) are short for settings. recipe: its name (`rush-bench list defenses`) or itself. config: a
    TOML file of settings. data_dir: folder of the data sets. seed: of everything that is random. device: auto, cpu, cuda,
    cuda:1. log: `tensorboard` for its events beside log.jsonl. report: where progress goes (default stderr).
    A pre-training that the store has from another run, equal in all that decides it, is not repeated.

    The same call again continues an interrupted run to the same weights (bit for bit on a CPU with the same number of
    threads), and does nothing on a finished one. Raises WorkLeft when `max_minutes` are over, after at least one step;
    BadInput for wrong names, settings, data, or a folder that holds another run; RushBenchError if the loss diverges.
    Under torchrun its processes train together, to the weights of one up to rounding (`training.processes`); any number of
    processes may resume an interrupted training.

    Examples:
        >>> import rush_bench as rb
        >>> sets = ["n_train=32", "size=8", "network.name=resnet", "network.blocks=1", "network.width=4", "train.epochs=1"]
        >>> folder = rb.train("noise_sup", dataset="digits", preset="smoke", sets=sets, store=store, name="trained")
        >>> sorted(path.name for path in folder.iterdir())
        ['card.json', 'log.jsonl', 'model.safetensors']
    """
    keep_freed_memory()
    given: dict[str, Any] = {"from_": from_, "protocol": protocol, "noise": noise, "pretrain_on": pretrain_on}
    given |= {"preset": preset, "config": config, "sets": sets, "name": name, "store": store, "seed": seed}
    with process_group(device) as (processes, torch_device):
        progress = (report or Bar()) if processes.first else Bar(stream=io.StringIO())
        with processes.first_process_goes_first():
            prepared = prepare(recipe, dataset=dataset, data_dir=data_dir, n_train=n_train, **given)
        if prepared.settings.compile and processes.count > 1:
            raise BadInput("compile=true is for one process: the parts of a batch meet inside the network; leave it out")
        for note in prepared.notes:
            progress.note(note)
        card, splits = prepared.card, prepared.splits
        folder = Path(store) / card["name"]
        file = CheckpointFile(folder, identity(card))
        finished = prepared.finished(Path(store))
        processes.require_same("runs", [identity(card), finished])
        if finished:
            if processes.first:
                file.remove()
            progress.note(f"{folder} is finished; nothing to do")
            return folder
        with file.lock() if processes.first else nullcontext(), progress:
            loop = Loop(file, seed, torch_device, progress, max_minutes, processes, log)
            data = {key: images.to(torch_device) for key, images in splits.items()}
            try:
                run_stages(prepared.system, prepared.settings, card, data, loop, folder, prepared.start)
            finally:
                if loop.log is not None:
                    loop.log.close()
            if processes.first:
                file.remove()
            progress.note(f"{folder} is finished: {summary(loop.position.history)}")
        return folder


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
    check_seed(seed)
    if name is not None:
        check_name(name)
    system: Recipe = registry.recipes.load(recipe) if isinstance(recipe, str) else recipe
    layers = [read_toml(Path(config)) if config else {}, parse_assignments(sets)]
    options = {"n_train": n_train, "noise": noise, "finetune.protocol": protocol}
    layers.append({key: value for key, value in options.items() if value is not None})
    if from_ is None or isinstance(from_, InitialWeights):
        start, notes = from_, list[str]()
    else:
        start, notes = find_initial_weights(from_, Path(store), dataset)
    layers = layers_of_start(system, system.card(resolve_settings(system, preset, None, layers))["protocol"], start, layers)
    provisional = resolve_settings(system, preset, None, layers)
    strict = any("n_train" in layer for layer in layers)
    splits = load_splits(system, provisional, dataset, pretrain_on or dataset, data_dir, strict, fetch)
    settings, defaults = (resolve_settings(system, preset, splits["train"].shape, part, dataset) for part in (layers, []))
    if start is not None:
        check_initial_weights(start, settings, splits["train"])
    settings = _fit_batches(system, settings, splits, notes.append)
    card = make_card(system, settings, splits, preset, seed, name, start)
    return PreparedTraining(system, settings, defaults, splits, start, card, notes)


def run_stages(
    system: Recipe,
    settings: RunSettings,
    card: dict[str, Any],
    splits: Mapping[str, Images],
    loop: Loop,
    folder: Path,
    start: InitialWeights | None = None,
) -> None:
    """Run every stage that is left, then write the model."""
    network = build(card["network"], derive(loop.seed, "network") % 2**32)
    if settings.channels_last and not channels_last_unsafe(network):
        network = network.to(memory_format=torch.channels_last)
    network = network.to(loop.device)
    if settings.compile:
        network.encoder.compile()
    context = Context(network, settings, splits, loop.seed, loop.carried)
    plans = system.plans(settings)
    pretraining = shared_pretraining(system, plans, settings, card, folder.parent)
    stored = pretraining.find() if pretraining is not None and loop.loaded is None and start is None else None
    loop.processes.require_same("encoders", stored and stored.sha256)
    if loop.loaded is None:  # else the checkpoint holds all of it
        if start is not None:
            load_weights(context, start.weights(head=card["from"]["head"] == "kept"), start.carried)
        elif pretraining is not None and stored is not None:
            load_weights(context, stored.weights(head=True), stored.carried)
            loop.continue_at(Position(stage=pretraining.stages, seconds=stored.card["seconds"], history=stored.card["history"]))
            loop.progress.note(f"pre-trained before, as {pretraining.folder}; its stages are not repeated")
    for number, plan in enumerate(plans):
        if loop.position.stage > number:
            continue  # the checkpoint holds the network as a later stage has it
        stage = plan.make(context)
        loop.run(number, plan, stage, splits[plan.split])
        if pretraining is not None and number + 1 == pretraining.stages and loop.processes.first:
            epochs = {earlier.name: earlier.settings.epochs for earlier in plans[: pretraining.stages]}
            position = loop.position
            pretraining.save(context, card, {"epochs_done": epochs, "history": position.history, "seconds": position.seconds})
    position = loop.position
    last_entry = position.history[-1]
    best_weights = loop.best_state if position.best and position.best["epoch"] != last_entry["epoch"] else None
    metrics = {key: value for entry in position.history for key, value in entry.items() if key not in ("stage", "epoch")}
    results = {
        "epochs_done": {plan.name: plan.settings.epochs for plan in plans},
        "validation": {**metrics, "best": position.best, "history": position.history},
        "seconds": round(position.seconds, 1),
    }
    if pretraining is not None:
        results["encoder"] = pretraining.name
    if loop.processes.first:
        save_model(folder, {**card, **results}, network.state_dict(), best_weights, loop.carried.get("transform"))


def load_weights(context: Context, weights: Mapping[str, Tensor], carried: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The network takes these weights, and keeps its own where there are none; later stages find what is carried."""
    network = context.network
    device = network.head.weight.device
    network.load_state_dict({**network.state_dict(), **weights})
    context.carried.update({what: {key: value.to(device) for key, value in part.items()} for what, part in carried.items()})


def channels_last_unsafe(network: nn.Module) -> bool:
    """Whether a convolution of the network writes beyond its memory in channels_last on some CPUs.

    oneDNN's kernel for the weights' gradient of a 1 x 1 convolution with a stride does, at 2 to 6 channels and AVX2 (found with
    torch 2.11 and 2.14 and malloc's own checks: the process dies later, anywhere).
    """
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return any(module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels < 8 for module in convolutions)


def resolve_settings(
    system: Recipe, preset: str, shape: tuple[int, ...] | None, layers: Iterable[Mapping[str, Any]], dataset: str = ""
) -> RunSettings:
    """Defaults, what they are on this data set, preset, what suits the images' shape, then the user's layers."""
    if preset not in system.presets:
        raise unknown_name("preset", preset, system.presets)
    for_shape = system.adapt(preset, shape) if shape else {}
    published = [system.datasets.get(key, {}) for key in (dataset, f"{dataset}-{shape[1]}" if shape else "")]
    defaults = [*published, system.presets[preset], for_shape]
    settings = override(system.settings, *defaults, *layers)
    if dependent := system.dependent_defaults(settings):
        settings = override(system.settings, *defaults, dependent, *layers)
    noise_from(settings.noise)
    return settings


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


def summary(history: list[dict[str, Any]]) -> str:
    """The last epoch's numbers in a line."""
    percentages = [f"{key} {100 * value:.1f} %" for key, value in history[-1].items() if key in ("clean", "noisy", "knn")]
    return f"validation {', '.join(percentages)}" if percentages else f"loss {history[-1]['loss']:.4f}"


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
