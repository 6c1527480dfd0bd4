"""The families of published checkpoints and how their keys tell them apart (recipes R4.1)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rush_bench.defenses.published.normalisation import BY_NAME, Constants
from rush_bench.errors import BadInput

NOT_STATED = "not stated"
OWN_CODE = "import the file that its own fine-tuning code writes"
Rules = tuple[tuple[str, str], ...]

# Dialects of keys (R1.2) as (pattern, replacement), in this order, to the names in `rush_bench.networks`.
RESNET: Rules = (
    (r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample."),
    (r"\.downsample\.conv\.", ".downsample.0."),
    (r"\.downsample\.bn\.", ".downsample.1."),
)
WRN: Rules = (
    (r"^bn1\.", "bn."),
    (r"^block(\d)\.layer\.", r"layer\1."),
    (r"\.convShortcut\.", ".shortcut."),
)
V2: Rules = (  # theirs stand before conv1, conv2, conv3 as bn0, bn1, bn2
    (r"^(layer\d\.\d+\.)bn2\.", r"\1bn3."),
    (r"^(layer\d\.\d+\.)bn1\.", r"\1bn2."),
    (r"^(layer\d\.\d+\.)bn0\.", r"\1bn1."),
)
STAGES: Rules = tuple((rf"^layer[._]{k}\.(block\.)?", f"layer{k + 1}.") for k in range(4))
JAX: Rules = (
    *STAGES,
    (r"^(conv_2d|init_conv)\.", "conv1."),
    (r"^batchnorm\.", "bn."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv(_2d_1|_0)\.", ".conv1."),
    (r"\.conv(_2d_2|_1)\.", ".conv2."),
)


@dataclass(frozen=True)
class Family:
    """One dialect of keys. Every key is the network's, the head's, or matches `ignorable`; else the file is refused.

    `heads`: names that the linear classifier may have among the keys; none where the file holds at best a head for
    something else. `buffers`: the keys of mean and std where the file must state them itself; `constants`: those by data
    set ("" for any other) where it does not. `network`: keys of the network's spec that no tensor's shape tells.
    `randomised`: the noise of training must be said. `choose`: the recipe must be said, for the normalisation hangs on it.
    """

    name: str  # what the card states as recipe
    title: str
    ignorable: str = r"(?!)"  # nothing
    prefix: str = ""
    heads: tuple[str, ...] = ()
    rename: Rules = RESNET
    buffers: tuple[str, str] | None = None
    constants: Mapping[str, Constants] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = NOT_STATED
    extra_data: str | None = None
    supervised: bool = False
    randomised: bool = False
    choose: bool = False
    pretext: tuple[int, ...] = ()  # classes of heads that answer a pre-training task
    also: tuple[str, ...] = ()  # recipes that write the same keys
    finetune: str = OWN_CODE  # how a file without a head gets one
    note: str | None = None
    assumed: str | None = None  # said where neither the file nor the user states the normalisation


INSIDE = ("normalize.mean", "normalize.std")
ACL_KIN = ("dynacl", "air", "rcs")
ACL_NOTE = (
    "ACL, DynACL, AIR and RCS write the same keys: say --recipe where it is not this one. The fc of a DynACL++ file that was "
    "not fine-tuned knows pseudo-labels, not classes: look at the clean accuracy first"
)
PROJECTOR = r"fc\.(fc|bn)\d\."
ACL_TUNE = "run ACL's train_trades.py or DynACL's test_LF.py on it and import the file that this writes"
ACL = Family(
    "acl", "ACL, pre-trained", PROJECTOR, heads=("fc",), buffers=INSIDE, also=ACL_KIN, finetune=ACL_TUNE, note=ACL_NOTE
)
ACL_TUNED = Family("acl", "ACL, fine-tuned", heads=("fc",), buffers=INSIDE, also=ACL_KIN, note=ACL_NOTE)
DYNACL = Family(
    "dynacl",
    "DynACL, pre-trained (key encoder)",
    r"encoder_q\.|encoder_k\.fc\.(fc|bn)\d\.|queue",
    prefix="encoder_k.",
    heads=("fc",),
    buffers=INSIDE,
    also=("acl", "air", "rcs"),
    finetune=ACL_TUNE,
)
IMAGENET_LABELS = "ImageNet (pseudo-labels of a SimCLR trained on it)"
ADVCL = Family(
    "advcl",
    "AdvCL, pre-trained",
    r"fc_\d{3}\.|head_(proj|pred|ce)\.",
    extra_data=IMAGENET_LABELS,
    also=("a-infonce",),
    finetune="run AdvCL's finetuning_advCL_SLF.py on it (on two GPUs: on one it loads nothing) and import the file it writes",
)
# Its `linear` is never trained: the head is the file's `classifier`.
ADVCL_TUNED = Family(
    "advcl",
    "AdvCL, fine-tuned",
    r"linear\.|head_(proj|pred)\.",
    protocol="SLF",
    extra_data=IMAGENET_LABELS,
    also=("a-infonce",),
)
ROCL = Family("rocl", "RoCL", also=("advcl",), protocol="SLF", finetune="give the file that ends in _linear as --head")
NONE_STATED = "the file states no normalisation and gets none: right for {}; --normalise says otherwise"
KL = Family(
    "trades", "kl ResNet (TRADES)", heads=("linear",), protocol="supervised", extra_data=NOT_STATED, supervised=True,
    also=("pgd_at", "advcl", "rocl"), assumed=NONE_STATED.format("TRADES, AdvCL and RoCL"),
)  # fmt: skip
# sub_block1 is made by TRADES' code and used by no forward pass.
TRADES = Family(
    "trades", "WideResNet (TRADES)", r"sub_block1\.", heads=("fc", "linear"), rename=WRN, protocol="supervised",
    network={"block": "preact"}, extra_data=NOT_STATED, supervised=True, also=("pgd_at", "acl", "rcs"),
    assumed=NONE_STATED.format("TRADES"),
)  # fmt: skip
DEACL = Family(
    "deacl", "DeACL", r"classifier\.|momentum_|(projector|predictor|teacher)", prefix="backbone.",
    constants={"": BY_NAME["cifar10"]}, network={"padding": 2},
    finetune="train a linear head on its features (DeACL's adv_finetune.py) and give that as --head",
)  # fmt: skip
CHEN = Family(
    "ssp", "Chen 2020b's pre-activation ResNet", prefix="1.", heads=("linear",), rename=V2, buffers=("0.mean", "0.std"),
    network={"block": "preact"}, protocol="AFF", finetune="run its finetune/main.py on it and import ata_best_model.pt",
    pretext=(4, 31),
)  # fmt: skip
CHEN_BARE = Family(
    "ssp", "Chen 2020b's pre-activation ResNet, without its normalisation", heads=("linear",), rename=V2, protocol="AFF",
    constants={"": BY_NAME["imagenet"]}, network={"block": "preact"}, finetune=CHEN.finetune, pretext=CHEN.pretext,
    assumed="the file holds no normalisation: ImageNet's was taken, as in its finetune/main.py; --normalise says otherwise",
)  # fmt: skip
COHEN = Family(
    "cohen", "ResNet of Cohen and SmoothAdv", prefix="1.", heads=("fc",), protocol="supervised", supervised=True,
    randomised=True, choose=True, also=("smoothadv",), finetune="download it again",
)  # fmt: skip
# What else they have seen (a million generated images, Tiny Images) the file's name says, not the file: --extra-data.
REBUFFI = Family(
    "dataaug", "network of Rebuffi 2021 (deepmind-research)", heads=("logits",), rename=JAX, protocol="supervised",
    constants={"cifar100": BY_NAME["cifar100"], "": BY_NAME["deepmind"]}, supervised=True, extra_data=NOT_STATED,
    also=("trades",),
    network={"block": "preact", "activation": "silu", "same": True},
    assumed="the file holds no normalisation: that of deepmind-research's eval.py for the data set was taken",
)  # fmt: skip
MADRY = Family(
    "pgd_at", "ResNet of MadryLab's robustness", r"attacker\.", prefix="model.", heads=("linear", "fc"),
    buffers=("normalizer.new_mean", "normalizer.new_std"), protocol="supervised", supervised=True,
)  # fmt: skip

REFUSED = (
    (r"linear_1\.weight", "RoCL's projector, which no classifier has; the network is the file without _projector"),
    (r"branch\d\.", "the ensemble of Chen 2020b as RobustBench has it (--models robustbench:cifar10/Linf/Chen2020Adversarial)"),
)


def recognise(keys: Iterable[str]) -> Family:
    """The family of a checkpoint by its keys (without `module.`). BadInput for one that is unknown or not supported."""
    found = set(keys)

    def some(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in found)

    if some(r"encoder_k\.conv1\.weight$"):
        return DYNACL
    if some(r"backbone\.conv1\.weight$"):
        return DEACL
    if some(r"layer1\.0\.bn0\.weight"):
        return CHEN_BARE
    if some(r"block1\.layer\.0\.bn1\."):
        return TRADES
    if some(r"bn1\.bn_list\."):
        return ADVCL if some(r"fc_\d{3}\.weight") else ACL
    if {"conv1.weight", "bn1.weight"} <= found and some(r"layer2\.0\.shortcut\.0\.weight"):
        return ADVCL_TUNED if some(r"head_proj\.") else KL if "linear.weight" in found else ROCL
    if {"normalize.mean", "layer2.0.downsample.0.weight"} <= found:
        return ACL_TUNED
    if some(r"1\.layer1\.0\.bn0\.weight"):
        return CHEN
    if {"1.conv1.weight", "1.fc.weight"} <= found:
        return COHEN
    if some(r"(conv_2d|init_conv)\.weight$"):
        return REBUFFI
    if some(r"normalizer\.new_mean$") or {"attacker.model.conv1.weight", "model.conv1.weight"} <= found:
        return MADRY
    if "encoder.conv1.weight" in found:
        raise BadInput("this is a model of rush-bench itself: copy its folder, card.json and all, into the store (--store)")
    own = "load it in a function of your own and attack that: --model package.module:function"
    for pattern, what in REFUSED:
        if some(pattern):
            raise BadInput(f"this is {what}: not among the networks that import knows; {own}")
    if len(found) == 2 and all(re.search(r"(^|\.)(weight|bias)$", key) for key in found):
        raise BadInput("this is a linear head; import the network's file and give this one as --head")
    raise BadInput(f"keys of no known family ({', '.join(sorted(found)[:4])}, ...); {own}")
