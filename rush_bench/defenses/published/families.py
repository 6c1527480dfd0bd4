"""The families of published checkpoints and how their keys tell them apart (recipes R4.1)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rush_bench.errors import BadInput

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
NOT_STATED = "not stated"
OWN_CODE = "import the file that its own fine-tuning code writes"


@dataclass(frozen=True)
class Family:
    """One dialect of keys. Every key is the network's, the head's, or matches `ignorable`; else the file is refused.

    `head`: prefix of the linear classifier among the keys, None where the file holds at best a head for something else.
    `mean`, `std`: constants inside the network; `buffers` says that the file must state them itself.
    """

    name: str  # what the card states as recipe
    title: str
    ignorable: str = r"(?!)"  # nothing
    prefix: str = ""
    head: str | None = None
    buffers: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    padding: int = 1
    protocol: str = NOT_STATED
    extra_data: str | None = None
    supervised: bool = False
    also: tuple[str, ...] = ()  # recipes that write the same keys
    finetune: str = OWN_CODE  # how a file without a head gets one
    note: str | None = None


ACL_KIN = ("dynacl", "air", "rcs")
ACL_NOTE = (
    "ACL, DynACL, AIR and RCS write the same keys: say --recipe where it is not this one. The fc of a DynACL++ file that was "
    "not fine-tuned knows pseudo-labels, not classes: look at the clean accuracy first"
)
PROJECTOR = r"fc\.(fc|bn)\d\."
ACL_TUNE = "run ACL's train_trades.py or DynACL's test_LF.py on it and import the file that this writes"
ACL = Family("acl", "ACL, pre-trained", PROJECTOR, head="fc", buffers=True, also=ACL_KIN, finetune=ACL_TUNE, note=ACL_NOTE)
ACL_TUNED = Family("acl", "ACL, fine-tuned", head="fc", buffers=True, also=ACL_KIN, note=ACL_NOTE)
DYNACL = Family(
    "dynacl",
    "DynACL, pre-trained (key encoder)",
    r"encoder_q\.|encoder_k\.fc\.(fc|bn)\d\.|queue",
    prefix="encoder_k.",
    head="fc",
    buffers=True,
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
KL = Family(
    "trades", "kl ResNet (TRADES)", head="linear", protocol="supervised", extra_data=NOT_STATED, supervised=True,
    also=("pgd_at", "advcl", "rocl"), note="the file states no normalisation and gets none: right for TRADES, AdvCL and RoCL",
)  # fmt: skip
DEACL = Family(
    "deacl", "DeACL", r"classifier\.|momentum_|(projector|predictor|teacher)", prefix="backbone.",
    mean=CIFAR_MEAN, std=CIFAR_STD, padding=2,
    finetune="train a linear head on its features (DeACL's adv_finetune.py) and give that as --head",
)  # fmt: skip

REFUSED = (
    (r"1\.bn0\.|1\.linear\.weight", "Chen 2020b's pre-activation ResNet-50"),
    (r"1\.layer\d\.\d+\.|1\.fc\.weight", "Cohen's and SmoothAdv's ResNet-110"),
    (
        r"logits\.weight|conv_2d\.weight",
        "Rebuffi's network with SiLU (RobustBench has it: --models robustbench:cifar10/Linf/Rebuffi2021Fixing_R18_ddpm)",
    ),
    (r"block1\.layer\.\d", "a WideResNet (TRADES, Free-m)"),
    (r"attacker\.|model\.(conv1|layer1)\.?", "a MadryLab `robustness` model"),
    (r"linear_1\.weight", "RoCL's projector, which no classifier has; the network is the file without _projector"),
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
    if some(r"bn1\.bn_list\."):
        return ADVCL if some(r"fc_\d{3}\.weight") else ACL
    if {"conv1.weight", "bn1.weight"} <= found and some(r"layer2\.0\.shortcut\.0\.weight"):
        return ADVCL_TUNED if some(r"head_proj\.") else KL if "linear.weight" in found else ROCL
    if {"normalize.mean", "layer2.0.downsample.0.weight"} <= found:
        return ACL_TUNED
    own = "load it in a function of your own and attack that: --model package.module:function"
    for pattern, what in REFUSED:
        if some(pattern):
            raise BadInput(f"this is {what}: not among the networks that import knows; {own}")
    if len(found) == 2 and all(re.search(r"(^|\.)(weight|bias)$", key) for key in found):
        raise BadInput("this is a linear head; import the network's file and give this one as --head")
    raise BadInput(f"keys of no known family ({', '.join(sorted(found)[:4])}, ...); {own}")
