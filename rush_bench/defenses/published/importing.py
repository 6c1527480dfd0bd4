"""`import_checkpoint`: a published checkpoint into the model store, with every key accounted for (sources S4.2)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rush_bench.datasets import load_dataset
from rush_bench.defenses.published.expected import expectation, measure_clean, measure_encoder
from rush_bench.defenses.published.families import INSIDE, RANDOMISED, SUPERVISED, Family, recognise
from rush_bench.defenses.published.normalisation import BY_NAME, Constants, by_recipe, check, in_file, parse, smoothadv_extra
from rush_bench.defenses.published.reading import Tensors, linear, read_checkpoint, read_head
from rush_bench.defenses.published.shapes import check_coverage, check_trained, spec_of
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import sha256_file
from rush_bench.networks import build
from rush_bench.networks.routes import CARRIED as ROUTES
from rush_bench.noise import Noise, noise_from
from rush_bench.places import data_folder, on_disk
from rush_bench.protocols import in_words
from rush_bench.registry import datasets
from rush_bench.store import CARRIED, ENCODERS, check_name, model_names, read_card, save_model

CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "digits": 10}
PUBLISHED = ("cifar10", "cifar100", "stl10")  # the sizes that checkpoints of these take follow from their stem
Kind = Literal["model", "encoder"]
ROUTE = 1  # of robust evaluation, for ACL and AdvCL alike (S4.2)
COLLAPSED = 1e-6


@dataclass(frozen=True)
class Imported:
    """What the store got: the model's or encoder's folder, its card, and what the user should know."""

    folder: Path
    card: dict[str, Any]
    notes: tuple[str, ...]


def import_checkpoint(
    file: str | Path,
    name: str,
    *,
    dataset: str,
    as_: Kind = "model",
    store: str | Path = "models",
    bn_route: int | None = None,
    head: str | Path | None = None,
    recipe: str | None = None,
    network: str | None = None,
    protocol: str | None = None,
    pretrain_dataset: str | None = None,
    extra_data: str | None = None,
    noise: str | None = None,
    normalise: str | None = None,
    expect_clean: float | str | None = None,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    keep: bool = True,
) -> Imported:
    """Map a checkpoint of a known family to our network and save it in the store, as model `name` or as an encoder.

    dataset: what the classifier was trained for, or the encoder pre-trained on; pretrain_dataset: what its encoder saw
    before, if another. store, data_dir: folders of models and data sets; device: where it is tried.
    as_: an encoder is kept without the file's classifier, in the store's folder `encoders`, for
    `train("finetune", from_=name)`.
    bn_route: which BatchNorm route becomes the model, default 1; only for files with several. head: file of the linear
    classifier, where the checkpoint has none. recipe, protocol, extra_data: what the file cannot say. network: its name, which
    must be that of the tensors, and what they cannot say, `resnet18,padding=2` (`networks.resolve`). noise: the law of
    a smoothed model, `gaussian:0.25`; it is then shown at 1 and 64 votes. normalise: a name in
    `normalisation.BY_NAME` or `m,m,m/s,s,s`, where the file does not state it. expect_clean: clean accuracy in [0,1] that
    500 test images must agree with, or `none`; default the manifest's, where the file is in it by name or digest.
    keep: False reads the file alone; nothing is measured or written.
    Raises BadInput for a file of no known family, any key that is missing or not accounted for, a wrong shape, an
    encoder or head that was never trained, another clean accuracy than expected, and a name that the store has for
    something else.

    Examples:
        >>> import torch, rush_bench as rb
        >>> torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
        >>> rb.import_checkpoint(folder / "foreign.pt", "foreign", dataset="digits", store=store)
        Traceback (most recent call last):
        rush_bench.errors.BadInput: ...
    """
    if as_ not in get_args(Kind):
        raise unknown_name("kind of import", as_, get_args(Kind))
    file, store, encoder = Path(file), Path(store), as_ == "encoder"
    home, other = (store / ENCODERS, store) if encoder else (store, store / ENCODERS)
    check_name(name)
    short = Path(dataset).stem if dataset.endswith(".npz") else datasets.get(dataset).name
    tensors, classifier, notes = read_checkpoint(file)
    family = recognise(tensors)
    label = choose_recipe(family, recipe)
    supervised = family.supervised or (family.choose and label in SUPERVISED)
    notes += [family.note] if family.note and (recipe is None or family.choose) else []
    own = {key: value for key, value in tensors.items() if not re.match(family.ignorable, key)}
    own = {key.removeprefix(family.prefix): value for key, value in own.items()}
    mean, std = choose_constants(own, family, recipe=label, dataset=short, file=file, wanted=normalise, notes=notes)
    found = take_head(own, family, classifier)
    if encoder:
        refuse_of_encoder(head=head, noise=noise, expect_clean=expect_clean)
        law, state = None, dict[str, Tensor]()
        notes += ["the file's classifier was left out"] if found is not None else []
    else:
        law = choose_noise(family, label, file, noise)
        state = head_state(found, family, head, short)
    own, route, count, routes = choose_route(own, bn_route, notes)
    state = renamed(own, family) | state
    constants = {"classes": len(state.get("head.weight", range(CLASSES.get(short, 10)))), "mean": mean, "std": std}
    spec = spec_of(state, {**family.network, **constants, **own_size(dataset, data_dir)}, network)
    net = build(spec)
    weights = {key: value for key, value in net.state_dict().items() if not (encoder and key.startswith("head."))}
    check_coverage(state, weights, family.title)
    net.load_state_dict({**net.state_dict(), **state}, strict=True)
    check_trained(state)
    if extra_data is None:
        extra_data = smoothadv_extra(file) if label == "smoothadv" else family.extra_data
    digest = sha256_file(file)
    source = {"family": family.title, "file": file.name, "sha256": digest, "routes": count, "bn_route": route}
    source |= {"head_sha256": sha256_file(Path(head)) if head else None}
    protocol = None if encoder else protocol or ("supervised" if supervised else family.protocol)
    card = {
        "name": name,
        "recipe": label,
        "dataset": short,
        "pretrain_dataset": pretrain_dataset or (None if supervised else short),
        "protocol": protocol,
        "protocol_in_words": in_words(protocol) if protocol else None,
        "extra_data": extra_data,
        "preset": "published",
        "network": spec,
        "noise": law.to_dict() if law else None,
        "votes": [1, 64] if law else [0],
        "settings": {},
        "data": {},
        "source": source,
        "notes": notes,
    }
    existing = read_card(home, name) if name in model_names(home) else card
    if any(existing.get(key) != card[key] for key in ("source", "network", "noise")) or name in model_names(other):
        raise BadInput(f"{store} has another model or encoder named {name!r}; choose another --name, or delete its folder")
    expected = None if encoder else expectation(file.name, digest, family.title, short, law, expect_clean)
    if keep:
        place: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "device": device}
        notes.append(measure_encoder(net, **place) if encoder else measure_clean(net, expected, noise=law, **place))
        carried = {f"{CARRIED}{ROUTES}/{key}": value for key, value in renamed(routes, family, "").items()} if encoder else {}
        save_model(home / name, card, {**state, **carried} if encoder else net.state_dict())
    return Imported(home / name, card, tuple(notes))


def own_size(dataset: str, data_dir: str | Path | None) -> dict[str, Any]:
    """The size of a data set's images, which a network takes as they are; nothing where published checkpoints are known."""
    if dataset in PUBLISHED or not on_disk(dataset, data_folder(data_dir)):
        return {}
    return {"size": load_dataset(dataset, "test", 1, data_dir=data_dir).size}


def refuse_of_encoder(**given: Any) -> None:
    """An encoder has neither a head nor what belongs to one."""
    for option, value in given.items():
        if value is not None:
            raise BadInput(f"--{option.replace('_', '-')} is for a model; leave it out with --as encoder")


def choose_recipe(family: Family, wanted: str | None) -> str:
    """The recipe that the card states: the family's own, or one of those that write the same keys."""
    if wanted is not None and wanted not in family.labels:
        raise unknown_name(f"recipe that writes the keys of {family.title}", wanted, family.labels)
    if wanted is None and family.choose:
        raise BadInput(
            f"{family.title}: the file does not say how it was trained, and {len(family.labels)} recipes write such keys; say "
            f"--recipe {', '.join(family.labels)}"
        )
    return wanted or family.name


def choose_constants(
    own: Tensors, family: Family, *, recipe: str, dataset: str, file: Path, wanted: str | None, notes: list[str]
) -> Constants:
    """Mean and std by channel: those that the file states (taken out of `own`), that the user says, or the family's."""
    stated = family.buffers or (INSIDE if INSIDE[0] in own else None)
    if stated is not None:
        mean, std = in_file(own, stated, family.title)
        if wanted is not None:
            raise BadInput(
                f"{family.title}: the file states its normalisation ({list(mean)}, {list(std)}); leave --normalise out"
            )
    elif wanted is not None:
        mean, std = parse(wanted)
    elif family.randomised:
        name, note = by_recipe(recipe, file)
        mean, std = BY_NAME[name]
        notes.append(note)
    elif family.unknown and recipe not in family.bare:
        raise BadInput(
            f"{family.title}: the file states no normalisation, and of {recipe} it is not known; say --normalise none, "
            "imagenet, cifar10, ... (the clean accuracy shows whether it is right)"
        )
    else:
        mean, std = family.constants.get(dataset, family.constants.get("", ((), ())))
        notes += [family.assumed] if family.assumed else []
    check(mean, std)
    return mean, std


def choose_noise(family: Family, recipe: str, file: Path, wanted: str | None) -> Noise | None:
    """The law under which the model is shown. The sigma of a smoothed one must be given: it is not in the file."""
    if wanted is None and (family.randomised or (family.choose and recipe in RANDOMISED)):
        named = re.search(r"noise_(\d+\.?\d*)", file.as_posix())
        hint = f" (its folder says {named[0]})" if named else ""
        sigma = named[1] if named else "SIGMA"
        raise BadInput(
            f"{family.title}: the file does not hold the noise that it was trained under{hint}; "
            f"say --noise gaussian:{sigma}, or --noise none for the network alone"
        )
    return noise_from(wanted)


def take_head(own: Tensors, family: Family, classifier: Tensors | None) -> tuple[Tensor, Tensor] | None:
    """The file's classifier, (K, D) and (K,), if it has one; it is taken out of `own`."""
    pairs = [[f"{name}.weight", f"{name}.bias"] for name in family.heads]
    inside = next(([own.pop(key) for key in keys] for keys in pairs if all(key in own for key in keys)), None)
    if inside is not None and len(inside[0]) in family.pretext:
        inside = None  # rotations, permutations
    if inside is None and classifier is not None:
        inside = list(linear(classifier, "the file's `classifier`"))
    return None if inside is None else (inside[0], inside[1])


def head_state(found: tuple[Tensor, Tensor] | None, family: Family, head: str | Path | None, dataset: str) -> Tensors:
    """The classifier of a model, by our names: the file's own or that of --head."""
    if found is not None and head is not None:
        raise BadInput(f"{family.title}: the file has its classifier already; leave --head out")
    if head is not None:
        found = read_head(Path(head))
    if found is None:
        raise BadInput(
            f"{family.title}: there is no classifier in this file; keep it as an encoder (--as encoder) and put a head on it "
            "(rush-bench train finetune --from NAME --protocol SLF), or give a linear one as --head"
        )
    weight, bias = found
    check_classes(weight, dataset)
    return {"head.weight": weight, "head.bias": bias}


def check_classes(weight: Tensor, dataset: str) -> None:
    """The classifier has as many classes as the data set."""
    classes = CLASSES.get(dataset)
    if weight.ndim != 2 or classes not in (None, len(weight)):
        wanted = f"{classes} classes" if classes else "a linear classifier (classes, features)"
        raise BadInput(f"the classifier is {tuple(weight.shape)}, but {dataset} has {wanted}; change --dataset")


def choose_route(own: Tensors, wanted: int | None, notes: list[str]) -> tuple[Tensors, int | None, int, Tensors]:
    """The tensors of one BatchNorm route beside those that all share; that route (None: only one), and how many there are.

    Last, where there are a clean and an attacked route and the model is the second: both, as a network with two routes
    names them, for fine-tuning that takes both (DynACL's AFF).
    """
    found = {key: re.search(r"\.bn_list\.(\d+)\.", key) for key in own}
    numbers = sorted({int(match[1]) for match in found.values() if match})
    if not numbers:
        if wanted is not None:
            raise BadInput("this file has one set of BatchNorms; leave --bn-route out")
        return {key.replace(".bn_list.", "."): value for key, value in own.items()}, None, 1, {}
    route = min(ROUTE, numbers[-1]) if wanted is None else wanted
    if route not in numbers:
        raise BadInput(
            f"there is no BatchNorm route {route}; this file has {', '.join(map(str, numbers))} (0: clean, 1: attacked)"
        )
    by_route = {number: {k: v for k, v in own.items() if (m := found[k]) and int(m[1]) == number} for number in numbers}
    for other in numbers:
        if other != route and route_gap(by_route[route], by_route[other]) < COLLAPSED:
            notes.append(f"BatchNorm routes {route} and {other} are equal: their training collapsed, or one was copied")
    if wanted is None:
        notes.append(f"BatchNorm route {route} of {', '.join(map(str, numbers))} was taken; --bn-route takes another")
    shared = {key: value for key, value in own.items() if found[key] is None}
    chosen = {key.replace(f".bn_list.{route}.", "."): value for key, value in by_route[route].items()}
    both = {re.sub(r"\.bn_list\.(\d+)\.", r".sets.\1.", key): value for key, value in own.items()}
    return shared | chosen, route, len(numbers), both if (route, numbers) == (1, [0, 1]) else {}


def route_gap(first: Tensors, second: Tensors) -> float:
    """The largest difference of any BatchNorm tensor of two routes; infinite where they do not have the same tensors."""
    first, second = (
        {re.sub(r"bn_list\.\d+", "bn_list", key): value for key, value in part.items()} for part in (first, second)
    )
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return math.inf
    gaps = [(first[key] - second[key]).abs().max() for key in first if first[key].is_floating_point()]
    return float(torch.stack(gaps).max()) if gaps else math.inf


def renamed(own: Tensors, family: Family, prefix: str = "encoder.") -> Tensors:
    """The family's names to ours, with `encoder.` before them."""
    plain = family.network.get("block") == "preact" and not any(".shortcut.1." in key for key in own)
    state: Tensors = {}
    for key, value in own.items():
        for pattern, new in family.rename:
            key = re.sub(pattern, new, key)
        state[f"{prefix}{key.replace('.shortcut.0.', '.shortcut.') if plain else key}"] = value
    return state
