"""The families of published checkpoints and how their keys tell them apart (sources S4.1)."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rush_bench.defenses.published.normalisation import BY_NAME, Constants
from rush_bench.errors import BadInput
from rush_bench.registry import recipes

NOT_STATED = "not stated"
Rules = tuple[tuple[str, str], ...]

# Dialects of keys (S1.2) as (pattern, replacement), in this order, to the names in `rush_bench.networks`.
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
# lightly's backbones are `nn.Sequential` of a ResNet's children: torchvision's have ReLU and pooling among them, its own none.
FIRST: Rules = ((r"^0\.", "conv1."), (r"^1\.", "bn1."))
CHILDREN: Rules = (*FIRST, *((rf"^{k + 3}\.", f"layer{k}.") for k in range(1, 5)), *RESNET)
OWN_CHILDREN: Rules = (*FIRST, *((rf"^{k + 1}\.", f"layer{k}.") for k in range(1, 5)), *RESNET)
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
    `randomised`: the noise of training must be said. `choose`: the recipe must be said, for the file does not tell it;
    `unknown`: nor its normalisation, but for those recipes that are known to have none (`bare`).
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
    unknown: bool = False
    bare: tuple[str, ...] = ()
    note: str | None = None
    assumed: str | None = None  # said where neither the file nor the user states the normalisation

    @property
    def labels(self) -> tuple[str, ...]:
        """The recipes that write such keys, its own first."""
        return tuple(dict.fromkeys((self.name, *self.also)))


INSIDE = ("normalize.mean", "normalize.std")
ACL_KIN = ("dynacl", "air", "rcs")
ACL_NOTE = (
    "ACL, DynACL, AIR and RCS write the same keys: say --recipe where it is not this one. The fc of a DynACL++ file that was "
    "not fine-tuned knows pseudo-labels, not classes: look at the clean accuracy first"
)
PROJECTOR = r"fc\.(fc|bn)\d\."
ACL = Family("acl", "ACL, pre-trained", PROJECTOR, heads=("fc",), buffers=INSIDE, also=ACL_KIN, note=ACL_NOTE)
ACL_TUNED = Family("acl", "ACL, fine-tuned", heads=("fc",), buffers=INSIDE, also=ACL_KIN, note=ACL_NOTE)
DYNACL = Family(
    "dynacl",
    "DynACL, pre-trained (key encoder)",
    r"encoder_q\.|encoder_k\.fc\.(fc|bn)\d\.|queue",
    prefix="encoder_k.",
    heads=("fc",),
    buffers=INSIDE,
    also=("acl", "air", "rcs"),
)
IMAGENET_LABELS = "ImageNet (pseudo-labels of a SimCLR trained on it)"
ADVCL = Family(
    "advcl",
    "AdvCL, pre-trained",
    r"fc_\d{3}\.|head_(proj|pred|ce)\.",
    extra_data=IMAGENET_LABELS,
    also=("a-infonce",),
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
NONE_STATED = "the file states no normalisation and gets none: right for {}; --normalise says otherwise"
# What trains a network from labels alone; all others pre-train an encoder first.
SUPERVISED = ("standard", "pgd_at", "trades", "free", "dataaug", "cohen", "smoothadv", "noise_sup")
RANDOMISED = ("cohen", "smoothadv", "noise_sup")
OTHERS = [name for name in recipes.entries if name != "finetune" and not name.startswith("random_probe")]
ANY = ("standard", *OTHERS, "a-infonce", "air", "rcs")
PLAIN = Family(
    "standard", "plain ResNet (names of torchvision and timm, or kl)", heads=("linear", "fc"), also=ANY, choose=True,
    extra_data=NOT_STATED, unknown=True, bare=("trades", "advcl", "a-infonce", "rocl"),
    assumed=NONE_STATED.format("TRADES, AdvCL and RoCL"),
    note="a stem of 3 x 3 is taken to pad by 1, with no pooling after it, which no tensor shows: --network padding=2 otherwise",
)  # fmt: skip
# sub_block1 is made by TRADES' code and used by no forward pass.
TRADES = Family(
    "trades", "WideResNet (TRADES)", r"sub_block1\.", heads=("fc", "linear"), rename=WRN, protocol="supervised",
    network={"block": "preact"}, extra_data=NOT_STATED, supervised=True, also=("pgd_at", "acl", "rcs"),
    assumed=NONE_STATED.format("TRADES"),
)  # fmt: skip
WIDE = dataclasses.replace(
    TRADES, name="standard", title="WideResNet without TRADES' sub_block1", also=ANY, choose=True, unknown=True,
    bare=("trades",), supervised=False, protocol=NOT_STATED,
)  # fmt: skip
# Its class is solo-learn's with a second classifier; released files hold the normalisation as well.
DEACL = Family(
    "deacl", "DeACL", r"classifier\.|classifier_adv\.|momentum_(backbone|classifier)\.", prefix="backbone.",
    constants={"": BY_NAME["cifar10"]}, network={"padding": 2},
)  # fmt: skip
SSL: tuple[str, ...] = (
    "simclr",
    "byol",
    "mocov2plus",
    "mocov3",
    "simsiam",
    "barlow_twins",
    "swav",
    "dino",
    "nnclr",
    "vicreg",
    "vibcreg",
)
SSL += ("ressl", "wmse", "deepclusterv2", "supcon", "nnbyol", "all4one", "moco", "smog", "tico", "dcl", "dclw")
# Its `classifier` is trained online, on detached features of augmented images: a monitor, and no model of the method.
SOLO = Family(
    "simclr", "solo-learn's ResNet",
    r"(momentum_)?(classifier|projector|predictor|head)\d*\.|momentum_backbone\.|(prototypes|transformer_encoder)\.|queue"
    r"|(dino_loss_func|whitening)\.",
    prefix="backbone.", network={"padding": 2}, also=SSL, choose=True, extra_data=NOT_STATED,
    constants={
        "cifar10": BY_NAME["solo"], "cifar100": BY_NAME["cifar100"], "stl10": BY_NAME["solo-stl10"], "": BY_NAME["imagenet"],
    },
    assumed="the file holds no normalisation: that of solo-learn's augmentations for the data set was taken; --normalise says "
    "otherwise",
)  # fmt: skip
LIGHTLY = Family(
    "simclr", "lightly's backbone, torchvision's ResNet",
    r"(backbone|projection_head|prediction_head)_momentum\.|(student_|teacher_|anchor_)\w+\.|(projection|prediction)_head\."
    r"|(criterion|prototypes|online_classifier|smog|queues|memory_bank)\.|dummy_param",
    prefix="backbone.", rename=CHILDREN, also=SSL, choose=True, extra_data=NOT_STATED, constants={"": BY_NAME["imagenet"]},
    assumed="the file holds no normalisation: ImageNet's was taken, the default of lightly's transforms; --normalise says "
    "otherwise",
)  # fmt: skip
LIGHTLY_NAMED = dataclasses.replace(LIGHTLY, rename=RESNET)
LIGHTLY_OWN = dataclasses.replace(
    LIGHTLY, title="lightly's backbone, its own ResNet", rename=OWN_CHILDREN, network={"stem": "cifar-linear"},
    note="lightly takes its own ResNet apart and leaves the ReLU after the first BatchNorm out; so does what was imported",
)  # fmt: skip
CHEN = Family(
    "ssp", "Chen 2020b's pre-activation ResNet", prefix="1.", heads=("linear",), rename=V2, buffers=("0.mean", "0.std"),
    network={"block": "preact"}, protocol="AFF", pretext=(4, 31),
)  # fmt: skip
CHEN_BARE = Family(
    "ssp", "Chen 2020b's pre-activation ResNet, without its normalisation", heads=("linear",), rename=V2, protocol="AFF",
    constants={"": BY_NAME["imagenet"]}, network={"block": "preact"}, pretext=CHEN.pretext,
    assumed="the file holds no normalisation: ImageNet's was taken, as in its finetune/main.py; --normalise says otherwise",
)  # fmt: skip
COHEN = Family(
    "cohen", "ResNet of Cohen and SmoothAdv", prefix="1.", heads=("fc",), protocol="supervised", supervised=True,
    randomised=True, choose=True, also=("smoothadv",),
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

DEACL_ALONE = r"classifier_adv\.|backbone\.normalize\."
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
        return LIGHTLY_NAMED if some(r"(projection_head|online_classifier)\.") else DEACL if some(DEACL_ALONE) else SOLO
    if some(r"backbone\.0\.weight$"):
        return LIGHTLY if some(r"backbone\.7\.0\.conv1\.weight$") else LIGHTLY_OWN
    if some(r"layer1\.0\.bn0\.weight"):
        return CHEN_BARE
    if some(r"block1\.layer\.0\.bn1\."):
        return TRADES if some(r"sub_block1\.") else WIDE
    if some(r"bn1\.bn_list\."):
        return ADVCL if some(r"fc_\d{3}\.weight") else ACL
    if {"normalize.mean", "layer2.0.downsample.0.weight"} <= found:
        return ACL_TUNED
    if {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= found:
        return ADVCL_TUNED if some(r"head_proj\.") else PLAIN
    if some(r"1\.layer1\.0\.bn0\.weight"):
        return CHEN
    if {"1.conv1.weight", "1.fc.weight"} <= found:
        return COHEN
    if some(r"(conv_2d|init_conv)\.weight$"):
        return REBUFFI
    if some(r"normalizer\.new_mean$") or {"attacker.model.conv1.weight", "model.conv1.weight"} <= found:
        return MADRY
    if "encoder.conv1.weight" in found and some(r"(classifier|projector)\."):
        return dataclasses.replace(SOLO, prefix="encoder.")  # of before its encoders were called backbones
    if "encoder.conv1.weight" in found:
        raise BadInput("this is a model of rush-bench itself: copy its folder, card.json and all, into the store (--store)")
    own = "load it in a function of your own and attack that: --model package.module:function"
    for pattern, what in REFUSED:
        if some(pattern):
            raise BadInput(f"this is {what}: not among the networks that import knows; {own}")
    if len(found) == 2 and all(re.search(r"(^|\.)(weight|bias)$", key) for key in found):
        raise BadInput("this is a linear head; import the network's file and give this one as --head")
    raise BadInput(f"keys of no known family ({', '.join(sorted(found)[:4])}, ...); {own}")
