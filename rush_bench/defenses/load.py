"""Defences by name, from the model store."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rush_bench.defenses import zoo
from rush_bench.defenses.base import Defense
from rush_bench.defenses.purify import purifier_from
from rush_bench.defenses.randomised import Average, Randomised, transform_from
from rush_bench.defenses.samplers import StreamTransform
from rush_bench.defenses.smoothed import Deterministic, Network, Smoothed
from rush_bench.errors import BadInput, RushBenchError, unknown_name
from rush_bench.networks import Classifier, build
from rush_bench.networks.specs import image_shape
from rush_bench.noise import Noise, noise_from
from rush_bench.registry import match
from rush_bench.settings import MOST, parse_count
from rush_bench.store import model_names, read_card, read_cards, read_weights


def listed(store: Path, dataset: str | None = None) -> dict[str, dict[str, Any]]:
    """`name@m` (or `name` where deterministic) to card, of every model in the store, or of those for a data set."""
    rows: dict[str, dict[str, Any]] = {}
    for name, card in read_cards(store).items():
        if dataset in (None, card["dataset"]):
            rows |= {f"{name}@{votes}" if votes else name: card for votes in card["votes"]}
    return rows


def resolve(patterns: Iterable[str], store: Path, dataset: str | None = None) -> list[str]:
    """Names `name@m` that patterns choose: a model's name or its recipe's, wildcards, `@m` for any m, or `all`.

    Without `@m` a randomised model is taken at each of its listed votes. A model whose card has a `transform` is as it
    stands listed, and `@m` averages m random transforms. No match is a BadInput with a suggestion.
    Names of RobustBench's zoo, `robustbench:cifar10/Linf/NAME`, stand for themselves.
    """
    patterns = list(patterns)
    if all(pattern.startswith(zoo.PREFIX) for pattern in patterns):
        return [zoo.check_dataset(pattern, dataset) for pattern in dict.fromkeys(patterns)]
    for name in {pattern.partition("@")[0].partition(":")[0] for pattern in patterns} & set(model_names(store)):
        read_card(store, name)  # one that is asked for by its very name is not left out
    rows = listed(store, dataset)
    where = f" for {dataset}" if dataset else ""
    if not rows:
        raise BadInput(
            f"no models in {store}{where}; train one first: rush-bench train rush --dataset {dataset or 'cifar10'}; "
            "for a network of your own: --model PKG:BUILD"
        )
    chosen: list[str] = []
    for pattern in patterns:
        if pattern.startswith(zoo.PREFIX):
            chosen.append(zoo.check_dataset(pattern, dataset))
            continue
        wanted, at, votes = pattern.partition("@")
        wanted, colon, which = wanted.partition(":")
        hits = [row for row, card in rows.items() if _matches(wanted, row.split("@")[0], card["recipe"])]
        if not hits:
            known = {row.split("@")[0] for row in rows} | {card["recipe"] for card in rows.values()}
            raise unknown_name(f"model in {store}{where}", pattern, known)
        if at:
            if not 1 <= parse_count(votes, -1) <= MOST:
                raise BadInput(f"{pattern!r}: after @ comes a number of votes, such as rush@64")
            hits = [f"{hit.split('@')[0]}@{votes}" for hit in hits if "@" in hit or rows[hit].get("transform")]
            if not hits:
                raise BadInput(f"{pattern!r}: that model is deterministic, it takes no @votes")
        if colon:
            hits = [":".join((hit.split("@")[0], which)) + hit[len(hit.split("@")[0]) :] for hit in hits]
        chosen += [hit for hit in hits if hit not in chosen]
    return list(dict.fromkeys(chosen))


def _matches(pattern: str, name: str, recipe: str) -> bool:
    try:
        return bool(match("model", [pattern], [name, recipe]))
    except BadInput:
        return False


def load_defense(
    name: str,
    *,
    store: Path | str = "models",
    device: torch.device | str = "cpu",
    noise: Noise | None = None,
    **options: Any,
) -> Defense:
    """A model of the store as a defence: `rush-cifar10@64`; `rush-cifar10:best@64` for the best validation epoch.

    `rocl-cifar10@30`, of a card with a `transform`, is the network behind it, the logits of 30 draws averaged.
    `robustbench:cifar10/Linf/NAME` is one of RobustBench's zoo, kept in the store's folder `robustbench`.

    `store` is the folder of the models; `device` where the network computes. `noise` replaces the model's own law (an
    ablation); `options` go to Smoothed or Deterministic (precision, memory).
    Errors: BadInput for a wrong name (with a suggestion) or a damaged file, RushBenchError for weights that do not fit.

    Examples:
        >>> import rush_bench as rb
        >>> rb.load_defense("tiny@16", store=store)
        Smoothed(tiny@16, Uniform(scale=0.3), 16 votes, 1x8x8 to 10 classes)
    """
    if name.startswith(zoo.PREFIX):
        if noise is not None:
            raise BadInput(
                f"{name} is deterministic; to smooth it, load it in a function of your own: --model PKG:BUILD --noise"
            )
        return zoo.load(name, folder=Path(store) / "robustbench", device=device, **options)
    names = [name] if name in listed(Path(store)) else resolve([name], Path(store))
    if len(names) > 1:
        raise BadInput(f"{name!r} is more than one model: {', '.join(names)}; name one of them")
    full, _, votes = names[0].partition("@")
    model, _, which = full.partition(":")
    card = read_card(Path(store), model)
    network = build(card["network"])
    try:
        network.load_state_dict(read_weights(Path(store), model, which or "model"))
    except RuntimeError as error:
        raise RushBenchError(f"the weights of {model!r} do not fit the network of its card: {error}") from error
    start, law = card.get("from"), noise or (noise_from(card["noise"]) if votes else None)
    about = {key: card.get(key) for key in ("recipe", "dataset", "pretrain_dataset", "protocol", "extra_data", "preset")}
    about |= {
        "model": full,
        "architecture": architecture(card["network"]),
        "budget": budget(card),
        "sha256": card["sha256"][which or "model"],
    }
    if start is not None:
        about["protocol"] = f"{card['protocol']} from {start['name']}"
    front = stored_transform(model, store=store, device=device) if votes and law is None and card.get("transform") else None
    return of_network(network, law, int(votes or 0), front, name=names[0], device=device, about=about, **options)


def of_network(
    network: Classifier, law: Noise | None, votes: int, front: tuple[StreamTransform, Average] | None = None, **options: Any
) -> Network:
    """One of our networks as a defence: smoothed where there is a law, behind a transform where `front` has one."""
    options["shape"] = image_shape(network.spec)
    network.eval()
    if front is not None:
        return Randomised(network, transform=front[0], votes=votes, average=front[1], **options)
    return Smoothed(network, noise=law, votes=votes, **options) if law else Deterministic(network, **options)


def stored_transform(
    model: str, *, store: Path | str = "models", device: torch.device | str = "cpu"
) -> tuple[StreamTransform, Average]:
    """The transform before the network of a stored model, which other networks may use too, and how its draws are averaged.

    RoCL's views average logits; a purifier, whose weights lie beside the model's, votes. RushBenchError for weights that do
    not fit.
    """
    card = read_card(Path(store), model)
    spec = card.get("transform")
    if spec is None:
        raise BadInput(f"model {model!r} has no transform in front of it; name one that has, such as purify-digits")
    weights = read_weights(Path(store), model, "transform") if spec["name"] == "purify" else None
    try:
        return front_of(card, weights, device)
    except RuntimeError as error:
        raise RushBenchError(f"the purifier of {model!r} does not fit its card: {error}") from error


def front_of(
    card: Mapping[str, Any], weights: Mapping[str, Tensor] | None, device: torch.device | str = "cpu"
) -> tuple[StreamTransform, Average]:
    """What a card has in front of its network, and how its draws are averaged; a purifier without weights is untrained."""
    spec = card["transform"]
    if spec["name"] != "purify":
        return transform_from(spec), "logits"
    return purifier_from(spec, card["network"]["channels"], weights).to(device), "vote"


def architecture(spec: dict[str, Any]) -> str:
    """What a network is, in a table: `resnet18`, `3 x resnet18`, `resnet18 + wrn-32-10`."""
    if spec["name"] == "ensemble":
        kinds = Counter(architecture(member) for member in spec["members"])
        return " + ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())
    return spec["name"] if spec.get("members", 1) == 1 else f"{spec['members']} x {spec['name']}"


def budget(card: dict[str, Any]) -> str | None:
    """What training took, for a table: `14 + 3 epochs of 45000 images`, the stages in order; None where the card has none."""
    epochs = " + ".join(str(count) for count in card.get("epochs_done", {}).values())
    counts = [count for name, count in card.get("data", {}).items() if name.startswith("n_") and name != "n_val"]
    return f"{epochs} epochs of {max(counts)} images" if epochs and counts else None


def load_defenses(
    patterns: Iterable[str], *, store: Path | str = "models", dataset: str | None = None, **options: Any
) -> list[Defense]:
    """Every model of the store that the patterns choose (see `resolve`) for a data set; `all` takes each."""
    return [load_defense(name, store=store, **options) for name in resolve(patterns, Path(store), dataset)]
