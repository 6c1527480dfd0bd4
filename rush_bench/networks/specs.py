"""Networks by name, and `resolve`: from a few keys to a spec with every key stated."""

from collections.abc import Mapping
from typing import Any

from rush_bench.errors import BadInput, unknown_name
from rush_bench.networks.preact import ACTIVATIONS, SHORTCUTS

# What tells pre-activation networks apart (see `networks.preact`); these keys exist for them alone.
WIDE: dict[str, Any] = {"block": "preact", "stem_width": 16, "activation": "relu", "shortcut": "conv1x1", "same": False}
WIDE |= {"stem_norm": False, "shortcut_norm": False, "final_norm": True, "standardise": False}
# Free-m's (ashafahi/free_adv_train, after MadryLab's challenge): shortcuts without weights, every image standardised.
FREE = WIDE | {"activation": "leaky", "shortcut": "pool", "same": True, "standardise": True}
# Rebuffi et al. 2021 (sources S2.9); their WideResNets are WIDE with silu and same.
SILU = WIDE | {"stem_width": 64, "activation": "silu", "shortcut": "conv3x3", "same": True}
# Chen et al. 2020b (sources S2.11): BatchNorm after the stem and in the shortcuts, none at the end.
V2 = WIDE | {"block": "preact-bottleneck", "stem_width": 64, "stem_norm": True, "shortcut_norm": True, "final_norm": False}

# Named shapes; every other key of a spec overrides them. `resnet`, `wrn` and `preact-resnet` leave their shape to the spec.
# The counts are of parameters without head. WRN-d-k has (d - 4) / 6 blocks per stage and 16 k channels in the first.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": [2, 2, 2, 2], "width": 64},  # 11.17 M (sources S1.2)
    "resnet34": {"blocks": [3, 4, 6, 3], "width": 64},
    "resnet50": {"blocks": [3, 4, 6, 3], "width": 64, "block": "bottleneck"},  # 23.50 M (MadryLab; sources S2.16)
    "resnet101": {"blocks": [3, 4, 23, 3], "width": 64, "block": "bottleneck"},
    "resnet152": {"blocks": [3, 8, 36, 3], "width": 64, "block": "bottleneck"},
    "resnet110": {"blocks": [18, 18, 18], "width": 16},  # 1.73 M (Cohen, SmoothAdv; sources S2.7)
    "resnet": {"blocks": [2, 2, 2, 2], "width": 32},
    "tiny": {"blocks": [1, 1, 1, 1], "width": 16},  # the demo's: 0.30 M
    "wrn-28-10": WIDE | {"blocks": [4, 4, 4], "width": 160},  # 36.47 M (Zagoruyko and Komodakis 2016)
    "wrn-34-10": WIDE | {"blocks": [5, 5, 5], "width": 160},  # 46.15 M (TRADES)
    "wrn-34-20": WIDE | {"blocks": [5, 5, 5], "width": 320},
    "wrn-70-16": WIDE | {"blocks": [11, 11, 11], "width": 256},  # 266.79 M
    "wrn-106-16": WIDE | {"blocks": [17, 17, 17], "width": 256},
    "wrn-32-10": FREE | {"blocks": [5, 5, 5], "width": 160},  # Free-m's; 45.8 M
    "wrn": WIDE | {"blocks": [2, 2, 2], "width": 32},
    "preact-resnet18": SILU | {"blocks": [2, 2, 2, 2], "width": 64},  # 12.54 M
    "preact-resnet": SILU | {"blocks": [2, 2, 2, 2], "width": 32},
    "resnet50v2": V2 | {"blocks": [3, 4, 6, 3], "width": 64},  # 23.50 M
}
# padding: of the CIFAR stem's convolution (solo-learn's and DeACL's networks have 2). routes: sets of every BatchNorm.
DEFAULTS: dict[str, Any] = {"classes": 10, "channels": 3, "size": 32, "stem": "cifar", "mean": [], "std": []}
# members: networks whose mean probability is the prediction.
DEFAULTS |= {"padding": 1, "routes": 1, "members": 1}


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with every key stated. BadInput for an unknown name or key and for values that make no network.

    `ensemble` has the whole specs of its `members`, and what they have in common: classes, channels, size.
    """
    name = spec.get("name", "resnet18")
    if name == "ensemble":
        members = [resolve(member) for member in spec["members"]]
        return {"name": name, "members": members, **{key: members[0][key] for key in ("classes", "channels", "size")}}
    if name not in NETWORKS:
        raise unknown_name("network", str(name), NETWORKS)
    full = {"name": name, **DEFAULTS, **NETWORKS[name]}
    for key, value in spec.items():
        if key not in full:
            raise unknown_name("network key", key, full)
        full[key] = list(value) if isinstance(value, tuple | list) else value
    sides = full["size"] if isinstance(full["size"], list) else [full["size"]] * 2
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise BadInput(f"network key size={full['size']!r} must be a side in pixels, or [height, width]")
    full["size"] = sides if sides[0] != sides[1] else sides[0]
    for key in ("classes", "channels", "width", "padding", "routes", "members", "stem_width"):
        if key in full and (not isinstance(full[key], int) or full[key] < 1):
            raise BadInput(f"network key {key}={full[key]!r} must be a whole number of at least 1")
    if not full["blocks"] or not all(isinstance(count, int) and count >= 1 for count in full["blocks"]):
        raise BadInput(f"network key blocks={full['blocks']} must list at least one block for each stage, as in [2, 2, 2, 2]")
    choices = {"stem": ("cifar", "cifar-linear", "imagenet"), "activation": ACTIVATIONS, "shortcut": SHORTCUTS}
    choices |= {"block": ("basic", "bottleneck", "preact", "preact-bottleneck")}
    for key, known in choices.items():
        if key in full and full[key] not in known:
            raise unknown_name(f"network {key}", str(full[key]), known)
    if len(full["mean"]) != len(full["std"]) or len(full["mean"]) not in (0, full["channels"]):
        raise BadInput(f"network keys mean and std need one value for each of the {full['channels']} channels, or none")
    if full["routes"] > 1 and full["members"] > 1:
        raise BadInput("a network has several routes or several members, not both")
    if any(value <= 0 for value in full["std"]):
        raise BadInput(f"network key std={full['std']} must be positive")
    _check_block(full)
    return full


def image_shape(spec: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network of this spec takes; its size is one side, or height and width."""
    height, width = (spec["size"], spec["size"]) if isinstance(spec["size"], int) else spec["size"]
    return spec["channels"], height, width


def _check_block(full: Mapping[str, Any]) -> None:
    """What holds between the kind of block and the other keys."""
    block, own = full.get("block", "basic"), NETWORKS[full["name"]].get("block", "basic")
    if block.startswith("preact") != own.startswith("preact"):
        raise BadInput(f"network key block={block!r} is not for {full['name']}; start from wrn, preact-resnet or resnet50")
    if not block.startswith("preact"):
        return
    if full["stem"] != "cifar":
        raise BadInput(f"network key stem={full['stem']!r}: {full['name']} has the CIFAR stem only; a ResNet has both")
    if full["standardise"] and full["mean"]:
        raise BadInput(f"{full['name']} standardises every image by itself; leave mean and std out, or set standardise=false")
