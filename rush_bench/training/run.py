"""`train`: from a recipe's name to a finished model in the store."""

import io
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.datasets import Images
from rush_bench.deadline import Deadline
from rush_bench.devices import keep_freed_memory
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.noise import check_seed
from rush_bench.progress import Bar
from rush_bench.store import save_model
from rush_bench.training.checkpoint import CheckpointFile, identity
from rush_bench.training.encoders import shared_pretraining
from rush_bench.training.initial_weights import (
    InitialWeights,
)
from rush_bench.training.loop import Loop, Position
from rush_bench.training.options import RunSettings
from rush_bench.training.prepare import prepare
from rush_bench.training.processes import process_group
from rush_bench.training.seeds import derive
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
    deadline = Deadline.after(max_minutes)
    keep_freed_memory()
    seed = check_seed(seed)
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
            loop = Loop(file, seed, torch_device, progress, deadline, processes, log)
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


def summary(history: list[dict[str, Any]]) -> str:
    """The last epoch's numbers in a line."""
    percentages = [f"{key} {100 * value:.1f} %" for key, value in history[-1].items() if key in ("clean", "noisy", "knn")]
    return f"validation {', '.join(percentages)}" if percentages else f"loss {history[-1]['loss']:.4f}"
