"""AutoAttack (Croce and Hein 2020): the reference implementation, `pyautoattack`, on a deterministic predictor (A8).

A randomised defence is attacked on its bank (its draws fixed) and scored both there and on fresh draws.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack, Threat
from rush_bench.defenses import Defense, as_module
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream

NAMES = {
    "aa": "AutoAttack standard (pyautoattack): APGD-CE, APGD-T, FAB-T, Square; a randomised defence on its bank",
    "apgd": "APGD-CE alone, 20 steps (pyautoattack): the quick stand-in for AutoAttack, never printed as AA",
}


@dataclass(frozen=True)
class AutoAttack(Attack):
    """`bank` draws are fixed for a randomised defence: 0 is its own m, but at least `least_bank`.

    A bank of one draw would be fitted to that draw alone and say nothing about fresh ones. `parts` and `steps` are those of
    pyautoattack's `standard` version when empty and 0.
    """

    bank: int = 0
    least_bank: int = 16
    bank_seed: int = 0
    parts: tuple[str, ...] = ()
    steps: int = 0

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if defense.classes < 4:
            raise BadInput(
                f"AutoAttack's targeted DLR loss needs 4 classes, {defense.name} has {defense.classes}; leave out the aa attack"
            )
        fixed = self._fixed(defense)
        with torch.random.fork_rng():  # AutoAttack seeds the global generator (A5)
            attack = self._build(fixed, threat, stream)
            # contiguous: its zero-gradient check fails on channels_last images
            attacked, _ = attack.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
            if not defense.deterministic:
                # It hands back the clean image where nothing worked, or where the bank was wrong already. Fresh noise would
                # score that image as clean accuracy; its best point stands there instead (A4).
                same = (attacked == images).flatten(1).all(1)
                if same.any():
                    torch.manual_seed(stream.seed)
                    attack.apgd.loss = "ce"
                    attacked[same] = attack.apgd.perturb(images[same].contiguous(), labels[same], best_loss=True)
        return threat.project(attacked.detach(), images)

    def extra(self, defense: Defense, attacked: Tensor, labels: Tensor, stream: Stream) -> dict[str, Any]:
        if defense.deterministic:
            return {}
        right = self._fixed(defense).predict(attacked, stream).labels == labels
        return {"bank_correct": right.long().cpu().numpy(), "bank_repeats": torch.ones_like(labels).cpu().numpy()}

    def _fixed(self, defense: Defense) -> Defense:
        return defense.bank(self.bank or max(defense.draws, self.least_bank), self.bank_seed)

    def _build(self, fixed: Defense, threat: Threat, stream: Stream) -> Any:
        import pyautoattack

        if not hasattr(pyautoattack, "AutoAttack"):
            raise RushBenchError("the installed pyautoattack has no AutoAttack; pip install 'pyautoattack>=0.2'")
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        attack = pyautoattack.AutoAttack(
            as_module(fixed),
            eps=threat.eps,
            norm={"linf": "Linf", "l2": "L2"}[threat.norm],
            seed=stream.seed,
            device=fixed.device,
            version="custom" if self.parts else "standard",
            **({"attacks": list(self.parts)} if self.parts else {}),
        )
        attack.apgd.n_restarts = 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, fixed.classes - 1)
        if self.steps:
            attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = self.steps
        return attack


@dataclass(frozen=True)
class QuickAPGD(AutoAttack):
    """One part of AutoAttack with few steps."""

    parts: tuple[str, ...] = ("apgd-ce",)
    steps: int = 20


def make(name: str) -> Any:
    return {"aa": AutoAttack, "apgd": QuickAPGD}[name]
