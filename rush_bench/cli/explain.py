"""What a setting is, in a line: what the field means by its name, and the comment beside it in the source."""

import dataclasses
import inspect
from functools import cache
from typing import Any

from rush_bench.declared import comments

# By the last part of a setting's name, or by the last two where that part means several things.
GLOSSARY = {
    "area": "share of the pixels in the first square",
    "lars_exclude_1d": "whether LARS leaves biases and BatchNorm alone",
    "least_bank": "draws of the bank at least, whatever the defence's votes",
    "noisy_views": "which of the two views is noisy",
    "points": "random points of the ball that are tried",
    "rows": "images and draws that one pass may hold",
    "source": "what it is made on: the network without its noise, or a model",
    "states": "steps of the purifier whose states are kept",
    "steeper": "multiply logits that lie close together before cross-entropy, whose gradient is weak there",
    "store": "folder of the source's model",
    "surrogate": "what its gradient goes through",
    "whole": "whether the square is of one sign over all channels",
    "back": "whether it goes back to the best point so far where the step is halved",
    "augment": "what is done to training images",
    "bank": "draws of the fixed bank that is attacked",
    "bank_seed": "seed of the bank",
    "batch_size": "images of a step",
    "beta": "weight of the robust term",
    "blocks": "residual blocks of each stage; empty: the name's own",
    "bn_adapt": "what of BatchNorm moves while the head is trained",
    "ce_weight": "weight of the cross-entropy on pseudo-labels",
    "channels_last": "memory layout of the network",
    "clamp": "how x' is kept in [0, 1]",
    "closer": "whether logits so far apart that float32's cross-entropy has no gradient come at a smaller scale",
    "classifier": "what stands behind the purifier",
    "clusters": "number of clusters of the pseudo-labels",
    "compile": "whether torch.compile compiles the network",
    "crop_floor": "least share of the image's area in a crop",
    "decay": "what the learning rate is multiplied by at each milestone",
    "dim": "width of the transformer",
    "attack.draws": "noise draws of a gradient",
    "draws": "noise draws of a gradient or of a query; 0: the defence's own m",
    "dropout": "in the transformer",
    "ema": "share that the average of the weights keeps at each step",
    "eot_iter": "draws of a gradient (AutoAttack rand)",
    "epochs": "passes over the training images",
    "eps": "radius of the attack in pixel units",
    "fab": "which FAB",
    "feedforward": "hidden units of the transformer's layers",
    "flip": "chance that a view is mirrored",
    "gray_p": "chance that a view is grey",
    "hand_back": "which x' is handed back where no attack has won",
    "head_init": "how the linear head begins",
    "heads": "attention heads of the transformer",
    "interpolation": "by which crops are resized",
    "jitter": "strengths of brightness, contrast, saturation, hue",
    "jitter_p": "chance of colour jitter",
    "keep": "which x' is handed back: the best, or the last",
    "key_momentum": "share that the key encoder keeps at each step",
    "late_step": "size of the last steps",
    "layers": "layers of the transformer",
    "loss": "what the attack raises: ce, margin, dlr; @logits or @vote averages draws otherwise",
    "losses": "what it raises, one after another",
    "lr": "learning rate after the warm-up",
    "lr_min": "learning rate at the end",
    "mean": "of the normalisation inside the network, by channel; empty: none",
    "method": "how the attack steps",
    "milestones": "epochs after which the learning rate is multiplied",
    "mode": "which statistics BatchNorm takes during the attack",
    "finetune.mode": "which form the stage has",
    "momentum": "of the optimiser",
    "multipliers": "channels of the U-Net's levels, in units of its width",
    "name": "which network",
    "nesterov": "whether momentum is Nesterov's",
    "noise": "law of the smoothing noise",
    "of": "the attack whose switch is turned",
    "optimiser": "which optimiser steps: SGD with momentum, LARS or Adam",
    "padding": "pixels of black border around a training image before its random crop",
    "network.padding": "pixels around the image before the first convolution",
    "parts": "of AutoAttack; empty: all",
    "plus": "whether a second stage trains on pseudo-labels (DynACL++)",
    "precision": "in which the network computes",
    "projector_hidden": "hidden units of the projector",
    "projector_layers": "layers of the projector",
    "projector_norm": "whether the projector has BatchNorm",
    "projector_out": "outputs of the projector",
    "protocol": "how the encoder is judged: SLF, NSLF, ALF or AFF",
    "pseudo_source": "where pseudo-labels come from",
    "queries": "predictions that it may ask for",
    "random_start": "whether it begins at a random point of the ball",
    "redraw": "steps after which fresh draws come; 0: never",
    "restarts": "how often the attack begins anew",
    "ridge": "added to a matrix's diagonal before it is inverted",
    "schedule": "how the learning rate falls: by a cosine, or in steps at the milestones",
    "select_draws": "draws held apart, by which an iterate is judged",
    "distil.start": "which weights the student starts from",
    "purification.start": "time up to which noise is added",
    "start": "where the attack starts",
    "std": "of the normalisation inside the network, by channel; empty: none",
    "stem": "first layers: 3x3 for small images, or ImageNet's",
    "step": "size of a step of the attack",
    "purification.steps": "steps of the reverse process",
    "steps": "steps of the attack",
    "stop": "stop attacking an image once no draw held apart is right (of fewer than 64, and its label is below 5 %)",
    "targets": "classes that a targeted part goes for",
    "temperature": "of the contrastive loss",
    "variant": "which views are attacked",
    "warmup_epochs": "epochs in which the learning rate rises linearly",
    "weight_decay": "L2 penalty on the weights",
    "diffusion.width": "channels of the U-Net that its multipliers multiply",
    "width": "channels of the first stage; 0: the name's own",
}


def explained(settings: Any, prefix: str = "") -> dict[str, str]:
    """A line for each setting of a dataclass, nested ones by dotted key; empty where nothing is known."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= explained(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = _line(type(settings), prefix + field.name)
    return found


def _line(owner: type, key: str) -> str:
    name = key.rpartition(".")[2]
    return line(key, next((found[name] for base in owner.__mro__ if name in (found := _comments(base))), ""))


def line(key: str, comment: str) -> str:
    """What a setting is, from its dotted key and the comment beside it; empty where nothing is known."""
    parts = key.split(".")
    known = next((GLOSSARY[name] for name in (".".join(parts[-2:]), parts[-1]) if name in GLOSSARY), "")
    return "; ".join(part for part in (known, comment) if part)


@cache
def _comments(owner: type) -> dict[str, str]:
    try:
        return comments(inspect.getsource(owner))
    except (OSError, TypeError):
        return {}
