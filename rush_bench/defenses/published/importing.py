"""`import_model`: a published checkpoint into the model store, with every key accounted for (recipes R4.2)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rush_bench.defenses.published.families import Family, recognise
from rush_bench.defenses.published.reading import Tensors, linear, read_checkpoint, read_head
from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import sha256_file
from rush_bench.networks import build
from rush_bench.networks import resolve as full_spec
from rush_bench.registry import datasets
from rush_bench.store import model_names, read_card, save_model

CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "digits": 10}
MEAN_PIXEL = 0.473  # of CIFAR-10's test set
ROUTE = 1  # of robust evaluation, for ACL and AdvCL alike (R4.2)
COLLAPSED = 1e-6


@dataclass(frozen=True)
class Imported:
    """What the store got: the model's folder, its card, and what the user should know."""

    folder: Path
    card: dict[str, Any]
    notes: tuple[str, ...]


def import_model(
    file: str | Path,
    name: str,
    *,
    dataset: str,
    store: str | Path = "models",
    bn_route: int | None = None,
    head: str | Path | None = None,
    recipe: str | None = None,
    protocol: str | None = None,
    pretrain_dataset: str | None = None,
    extra_data: str | None = None,
) -> Imported:
    """Map a checkpoint of a known family to our ResNet and save it as model `name` of the store.

    bn_route: which BatchNorm route becomes the model, default 1; only for files with several. head: file of the linear
    classifier, where the checkpoint has none. recipe, protocol, extra_data: what the file cannot say.
    Raises BadInput for a file of no known family, any key that is missing or not accounted for, a wrong shape, an
    encoder or head that was never trained, and a name that the store has for something else.
    """
    file, store = Path(file), Path(store)
    if not name or Path(name).name != name:
        raise BadInput(f"model name {name!r} must be a plain folder name; the folder above it is --store")
    short = Path(dataset).stem if dataset.endswith(".npz") else datasets.get(dataset).name
    tensors, classifier = read_checkpoint(file)
    family = recognise(tensors)
    labels = (family.name, *family.also)
    if recipe is not None and recipe not in labels:
        raise unknown_name(f"recipe that writes the keys of {family.title}", recipe, labels)
    notes = [family.note] if family.note and recipe is None else []
    own = {key: value for key, value in tensors.items() if not re.match(family.ignorable, key)}
    own = {key.removeprefix(family.prefix): value for key, value in own.items()}
    mean, std = constants(own, family)
    weight, bias = find_head(own, family, classifier, head)
    check_classes(weight, short)
    own, route, count = choose_route(own, bn_route, notes)
    state = {f"encoder.{_renamed(key)}": value for key, value in own.items()}
    state |= {"head.weight": weight, "head.bias": bias}
    spec = spec_of(state, {"classes": len(weight), "mean": mean, "std": std, "padding": family.padding})
    network = build(spec)
    check_coverage(state, network.state_dict(), family)
    network.load_state_dict(state, strict=True)
    check_trained(state)
    source = {"family": family.title, "file": file.name, "sha256": sha256_file(file), "routes": count, "bn_route": route}
    source |= {"head_sha256": sha256_file(Path(head)) if head else None}
    if name in model_names(store) and read_card(store, name).get("source") != source:
        raise BadInput(f"{store} has another model named {name!r}; choose another --name, or delete its folder")
    card = {
        "name": name,
        "recipe": recipe or family.name,
        "dataset": short,
        "pretrain_dataset": pretrain_dataset or (None if family.supervised else short),
        "protocol": protocol or family.protocol,
        "extra_data": family.extra_data if extra_data is None else extra_data,
        "preset": "published",
        "network": spec,
        "noise": None,
        "votes": [0],
        "settings": {},
        "data": {},
        "source": source,
        "notes": notes,
    }
    save_model(store / name, card, network.state_dict())
    return Imported(store / name, card, tuple(notes))


def constants(own: Tensors, family: Family) -> tuple[list[float], list[float]]:
    """Mean and std by channel: the file's own (taken out of `own`), or the family's fixed ones."""
    given = [own.pop(f"normalize.{key}", None) for key in ("mean", "std")]
    if family.buffers and None in given:
        raise BadInput(f"{family.title}: normalize.mean and normalize.std are missing, without which its inputs are unknown")
    mean, std = (
        list(fixed) if t is None else t.flatten().tolist() for t, fixed in zip(given, (family.mean, family.std), strict=True)
    )
    centre = [(MEAN_PIXEL - m) / s if s > 0 else math.inf for m, s in zip(mean, std, strict=True)]
    if any(not abs(value) <= 0.5 for value in centre):  # R4.2: a guard against 0..255 and against normalising twice
        raise BadInput(
            f"normalisation mean {mean}, std {std} moves a mean pixel to {centre}; these are not for images in [0,1]"
        )
    return mean, std


def find_head(own: Tensors, family: Family, classifier: Tensors | None, head: str | Path | None) -> tuple[Tensor, Tensor]:
    """The classifier, (K, D) and (K,), from the file or from --head; the file's is taken out of `own`."""
    keys = [f"{family.head}.weight", f"{family.head}.bias"]
    inside = [own.pop(key) for key in keys] if all(key in own for key in keys) else None
    if inside is None and classifier is not None:
        inside = list(linear(classifier, "the file's `classifier`"))
    if inside is not None and head is not None:
        raise BadInput(f"{family.title}: the file has its classifier already; leave --head out")
    if head is not None:
        return read_head(Path(head))
    if inside is None:
        raise BadInput(
            f"{family.title}: there is no classifier in this file; {family.finetune}, or give a linear one as --head"
        )
    return inside[0], inside[1]


def check_classes(weight: Tensor, dataset: str) -> None:
    """The classifier has as many classes as the data set."""
    classes = CLASSES.get(dataset)
    if weight.ndim != 2 or classes not in (None, len(weight)):
        wanted = f"{classes} classes" if classes else "a linear classifier (classes, features)"
        raise BadInput(f"the classifier is {tuple(weight.shape)}, but {dataset} has {wanted}; change --dataset")


def choose_route(own: Tensors, wanted: int | None, notes: list[str]) -> tuple[Tensors, int | None, int]:
    """The tensors of one BatchNorm route beside those that all share; that route (None: only one), and how many there are."""
    found = {key: re.search(r"\.bn_list\.(\d+)\.", key) for key in own}
    numbers = sorted({int(match[1]) for match in found.values() if match})
    if not numbers:
        if wanted is not None:
            raise BadInput("this file has one set of BatchNorms; leave --bn-route out")
        return {key.replace(".bn_list.", "."): value for key, value in own.items()}, None, 1
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
    return shared | chosen, route, len(numbers)


def route_gap(one: Tensors, other: Tensors) -> float:
    """The largest difference of any BatchNorm tensor of two routes; infinite where they do not have the same tensors."""
    first, second = ({re.sub(r"bn_list\.\d+", "bn_list", key): value for key, value in part.items()} for part in (one, other))
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return math.inf
    gaps = [(first[key] - second[key]).abs().max() for key in first if first[key].is_floating_point()]
    return float(torch.stack(gaps).max()) if gaps else math.inf


def spec_of(state: Tensors, known: dict[str, Any]) -> dict[str, Any]:
    """The full network spec that the tensors' shapes ask for: stem, width, blocks."""
    stem, channels = state.get("encoder.conv1.weight"), 0
    if stem is None or stem.ndim != 4 or any(".conv3." in key for key in state):
        raise BadInput(
            "not a ResNet of basic blocks (ResNet-50 and deeper have bottlenecks); use --model package.module:function"
        )
    width, channels, kernel = stem.shape[0], stem.shape[1], stem.shape[2]
    if kernel not in (3, 7):
        raise BadInput(f"the stem's kernel is {kernel} x {kernel}; known are 3 (CIFAR) and 7 (ImageNet, 96 x 96 STL-10)")
    places = [re.match(r"encoder\.layer(\d)\.(\d+)\.", key) for key in state]
    blocks = [1 + max((int(m[2]) for m in places if m and m[1] == str(k)), default=0) for k in range(1, 5)]
    names: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
    known |= {"name": names.get(tuple(blocks), "resnet") if width == 64 else "resnet", "blocks": blocks, "width": width}
    large = kernel == 7
    return full_spec({**known, "channels": channels, "size": 96 if large else 32, "stem": "imagenet" if large else "cifar"})


def check_coverage(state: Tensors, expected: Tensors, family: Family) -> None:
    """R4.2: nothing missing, nothing left over, every shape right."""
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or extra or wrong:
        parts = (("missing", missing), ("not accounted for", extra), ("of another shape", wrong))
        found = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in parts if keys)
        raise BadInput(f"looks like {family.title}, but does not fit the network: {found}; nothing was imported")


def check_trained(state: Tensors) -> None:
    """Refuse what no training has touched. AdvCL's fine-tuning writes such files: on one GPU it loads no key of the
    pre-trained network (`module.` before each, strict=False) and says nothing."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise BadInput(f"{len(bad)} tensors are not finite ({', '.join(bad[:3])}); nothing was imported")
    means = [value for key, value in state.items() if key.endswith("running_mean")]
    variances = [value for key, value in state.items() if key.endswith("running_var")]
    if all(not bool(m.any()) for m in means) and all(bool((v == 1).all()) for v in variances):
        raise BadInput(
            "every BatchNorm statistic is that of a network never trained (mean 0, variance 1): the pre-trained weights were "
            "not loaded when this file was made (AdvCL's fine-tuning does so on one GPU), or this route was never used"
        )
    if not bool(state["head.weight"].any()):
        raise BadInput("the classifier is all zeros, so it was never trained; fine-tune it first, or give one as --head")


def _renamed(key: str) -> str:
    """Both dialects (R1.2) to torchvision's names of a shortcut."""
    key = re.sub(r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample.", key)
    return key.replace(".downsample.conv.", ".downsample.0.").replace(".downsample.bn.", ".downsample.1.")
