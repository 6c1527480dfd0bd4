"""The network spec that a checkpoint's tensors ask for, and whether they fill it (sources S4.2)."""

import re
from collections.abc import Mapping
from typing import Any

from rush_bench.defenses.published.reading import Tensors
from rush_bench.errors import BadInput, unknown_name
from rush_bench.networks import NETWORKS, resolve

OWN = "use --model package.module:function"
SAID = ("padding", "size", "stem")
STRUCTURE = ("block", "blocks", "width", "stem_width", "stem_norm", "shortcut_norm", "final_norm", "shortcut")


def spec_of(state: Tensors, known: Mapping[str, Any], wanted: str | None = None) -> dict[str, Any]:
    """The full network spec of tensors named `encoder.*` and `head.*`: stem, kind of block, width, blocks, name.

    known: keys that no shape tells; `block` is `preact` for any pre-activation network. wanted: what the user says, the
    network's name, keys that no shape tells, or both: `resnet18,padding=2`.
    """
    name, stated = parse_network(wanted)
    stem, first = state.get("encoder.conv1.weight"), _last(state, "encoder.layer1.0.")
    if stem is None or stem.ndim != 4 or first is None:
        raise BadInput(f"not a ResNet that rush-bench can build: encoder.conv1 or encoder.layer1.0 is missing; {OWN}")
    kernel, bottleneck = stem.shape[2], "encoder.layer1.0.conv3.weight" in state
    if kernel not in (3, 7):
        raise BadInput(f"the stem's kernel is {kernel} x {kernel}; known are 3 (CIFAR) and 7 (ImageNet, 96 x 96 STL-10)")
    places = [(int(m[1]), int(m[2])) for key in state if (m := re.match(r"encoder\.layer(\d)\.(\d+)\.", key))]
    stages = max(stage for stage, k in places if k == 0 and f"encoder.layer{stage}.0.conv2.weight" in state)
    blocks = [1 + max((k for s, k in places if s == stage), default=0) for stage in range(1, stages + 1)]
    shape: dict[str, Any] = {"blocks": blocks, "width": first // (4 if bottleneck else 1)}
    if known.get("block") == "preact":
        three = (w := state.get("encoder.layer2.0.shortcut.weight")) is not None and w.shape[2] == 3
        shape |= {"block": "preact-bottleneck" if bottleneck else "preact", "stem_width": stem.shape[0]}
        shape |= {"stem_norm": "encoder.bn1.weight" in state, "final_norm": "encoder.bn.weight" in state}
        shape |= {"shortcut_norm": any(".shortcut.1." in key for key in state), "shortcut": "conv3x3" if three else "conv1x1"}
    elif bottleneck:
        shape["block"] = "bottleneck"
    large = kernel == 7
    rest = {"channels": stem.shape[1], "size": 96 if large else 32, "stem": "imagenet" if large else "cifar"}
    found = resolve({**rest, **known, **shape, **stated, "name": _name(shape)})
    if name not in (None, found["name"]):
        raise BadInput(f"--network {name}: the file's tensors are those of {found['name']}, blocks {found['blocks']}")
    return found


def parse_network(text: str | None) -> tuple[str | None, dict[str, Any]]:
    """`resnet18,padding=2,size=64` as the name (None: not given) and the keys."""
    name, keys = None, {}
    for part in text.split(",") if text is not None else ():
        key, given, value = (piece.strip() for piece in part.partition("="))
        if not given:
            if key not in NETWORKS:
                raise unknown_name("network", key, NETWORKS)
            name = key
        elif key in SAID:
            keys[key] = int(value) if value.isascii() and value.isdigit() else value
        else:
            raise unknown_name("network key that no tensor's shape tells", key, SAID)
    return name, keys


def _last(state: Tensors, block: str) -> int | None:
    """Channels that leave a block: those of its last convolution."""
    weights = [state.get(f"{block}conv{k}.weight") for k in (3, 2)]
    return next((weight.shape[0] for weight in weights if weight is not None), None)


def _name(shape: Mapping[str, Any]) -> str:
    """The network of that shape, or the one that leaves its shape to the spec."""

    def kind(spec: Mapping[str, Any]) -> list[Any]:
        return [spec.get(key, "basic" if key == "block" else None) for key in STRUCTURE]

    for name, spec in NETWORKS.items():
        if kind(spec) == kind(shape):
            return name
    block = shape.get("block", "basic")
    if block == "bottleneck":
        raise BadInput(f"a ResNet of bottlenecks with blocks {shape['blocks']}, width {shape['width']}: not known; {OWN}")
    if block == "preact-bottleneck":
        return "resnet50v2"
    return "resnet" if block == "basic" else "wrn" if shape["shortcut"] == "conv1x1" else "preact-resnet"


def check_coverage(state: Tensors, expected: Tensors, title: str) -> None:
    """S4.2: nothing missing, nothing left over, every shape right."""
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or extra or wrong:
        parts = (("missing", missing), ("not accounted for", extra), ("of another shape", wrong))
        found = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in parts if keys)
        raise BadInput(f"looks like {title}, but does not fit the network: {found}; nothing was imported")


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
    if "head.weight" in state and not bool(state["head.weight"].any()):
        raise BadInput("the classifier is all zeros, so it was never trained; fine-tune it first, or give one as --head")
