"""AutoAttack (Croce and Hein 2020): the reference implementation, `pyautoattack`, on a deterministic predictor (A8).

A randomised defence is attacked on its bank (its draws fixed) and scored there, on banks that the attack has not seen (T6) and
on fresh draws. `aa-rand` (T5) attacks the defence itself.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import at_once, judging_rows, prediction_rows
from rush_bench.attacks.package_count import CountedByPackage
from rush_bench.attacks.parts import STANDARD, Name, parts_for, settled
from rush_bench.attacks.pyautoattack_parts import Effort, PackageParts, part_passes
from rush_bench.defenses import Defense, as_module
from rush_bench.errors import RushBenchError
from rush_bench.noise import Stream
from rush_bench.settings import Count, Whole
from rush_bench.threats import Threat

NAMES = {
    "aa": "AutoAttack standard (pyautoattack): APGD-CE, APGD-T, FAB-T, Square; a randomised defence on its bank",
    "apgd": "APGD-CE alone, 20 steps (ours, as pyautoattack's): the quick stand-in for AutoAttack, never printed as AA",
    "aa-rand": "AutoAttack rand (pyautoattack): APGD-CE, APGD-DLR, 20 EOT passes; the best x' on held-apart draws",
}

RAND: tuple[Name, ...] = ("apgd-ce", "apgd-dlr")
UNSEEN = 5  # banks of other draws that x' of a bank is scored on (T6)


@dataclass(frozen=True)
class AutoAttack(Attack):
    """`bank` draws are fixed for a randomised defence: 0 is its own m, but at least `least_bank`.

    A bank of one draw would be fitted to that draw alone and say nothing about fresh ones. `parts` and `steps` are those of
    pyautoattack's `standard` version when empty and 0; of fewer than four classes, those that exist (see `parts_for`).
    `closer`: logits so far apart that float32's cross-entropy has no gradient come at a smaller scale, as it does by itself on
    a deterministic network of such logits (`Defense.saturated`); replays get them as they are.
    """

    drawn: ClassVar[tuple[str, ...]] = ("bank", "least_bank", "bank_seed")
    later: ClassVar[dict[str, Any]] = {"closer": False}

    bank: Whole = 0
    least_bank: Count = 16
    bank_seed: Whole = 0
    parts: tuple[Name, ...] = ()
    steps: Whole = 0
    closer: bool = False

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if (settled := self.on(defense)) != self:
            return settled.run(defense, images, labels, threat, stream)
        fixed = self._fixed(defense)
        with torch.random.fork_rng():  # AutoAttack seeds the global generator (A5)
            attack = self._build(fixed, threat, stream)
            # batches that fit in memory, so that no draw goes forward twice; the package starts each from the same numbers
            # contiguous: its zero-gradient check fails on channels_last images
            size = min(at_once(fixed), len(images))
            attacked, _ = attack.run_standard_evaluation(images.contiguous(), labels, batch_size=size)
            if not defense.deterministic:
                # It hands back the clean image where nothing worked, or where the bank was wrong already. Fresh noise would
                # score that image as clean accuracy; its best point stands there instead (A4).
                attack.apgd.loss = "ce"
                clean = (attacked == images).flatten(1).all(1).nonzero()[:, 0]
                for positions in clean.split(size) if len(clean) else ():  # nothing splits into one empty batch
                    torch.manual_seed(stream.seed)
                    attacked[positions] = attack.apgd.perturb(images[positions].contiguous(), labels[positions], best_loss=True)
        return threat.project(attacked.detach(), images)

    def recorded(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, dict[str, Any]]:
        attacked = self.run(defense, images, labels, threat, stream)
        if defense.deterministic:
            return attacked, {}
        right = [
            (self._fixed(defense, other).predict(attacked, stream).labels == labels).long().cpu().numpy()
            for other in range(1 + UNSEEN)
        ]
        ones = torch.ones_like(labels).cpu().numpy()
        return attacked, {
            "bank_correct": right[0],
            "bank_repeats": ones,
            "unseen_correct": sum(right[1:]),
            "unseen_repeats": UNSEEN * ones,
        }

    def passes(self, defense: Defense) -> tuple[float, float]:
        fixed = self._fixed(defense)
        per_prediction, effort = prediction_rows(fixed), Effort(steps=self.steps or 100)
        parts = [part_passes(part, fixed, effort) for part in self.parts or STANDARD]
        checks = 8  # of the package, before it starts
        if not defense.deterministic:  # the best point where it hands back the clean image, and `recorded`
            parts.append(part_passes("apgd-ce", fixed, effort))
            checks += UNSEEN
        return sum(f for f, _ in parts) + checks * per_prediction, sum(b for _, b in parts)

    def on(self, defense: Defense) -> Attack:
        closer = self.closer or (defense.deterministic and defense.saturated)
        return dataclasses.replace(self, parts=settled(defense.classes, self.parts), closer=closer)

    def settings(self) -> dict[str, Any]:
        # Records made with checkpoints of 100 steps, whatever `steps` was, are not these.
        return super().settings() | ({"schedule": "scaled"} if self.steps else {})

    def _fixed(self, defense: Defense, other: int = 0) -> Defense:
        """The bank that is attacked, or another of its size."""
        return defense.bank(self.bank or max(defense.draws, self.least_bank), self.bank_seed + other)

    def _build(self, fixed: Defense, threat: Threat, stream: Stream) -> Any:
        import pyautoattack

        if not hasattr(pyautoattack, "AutoAttack"):
            raise RushBenchError("the installed pyautoattack has no AutoAttack; pip install 'pyautoattack>=0.2'")
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        attack = pyautoattack.AutoAttack(
            as_module(fixed.unsaturated() if self.closer else fixed),
            eps=threat.eps,
            norm={"linf": "Linf", "l2": "L2"}[threat.norm],
            seed=stream.seed,
            device=fixed.device,
            version="custom" if self.parts else "standard",
            **({"attacks": list(self.parts)} if self.parts else {}),
        )
        attack.apgd.n_restarts = attack.fab.n_restarts = 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, fixed.classes - 1)
        if self.steps:
            attack.fab.n_iter = self.steps
            for apgd in (attack.apgd, attack.apgd_targeted):
                # as its __init__ has them for so many steps: with those of 100, few steps would never halve the step size
                apgd.n_iter, apgd.n_iter_2 = self.steps, max(int(0.22 * self.steps), 1)
                apgd.n_iter_min, apgd.size_decr = max(int(0.06 * self.steps), 1), max(int(0.03 * self.steps), 1)
        return attack


@dataclass(frozen=True)
class QuickAPGD(AutoAttack):
    """One part of AutoAttack with few steps.

    `steeper`, as in `PGD`: our own APGD-CE, which is the package's image by image, of logits that are far enough apart; without
    it, or with other parts, the package runs, but for a defence that has no `as_module` to give it.
    """

    later: ClassVar[dict[str, Any]] = AutoAttack.later | {"steeper": False}

    parts: tuple[Name, ...] = ("apgd-ce",)
    steps: Count = 20
    steeper: bool = True

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if (settled := self.on(defense)) != self:
            return settled.run(defense, images, labels, threat, stream)
        if not self._is_ours(defense):
            return super().run(defense, images, labels, threat, stream)
        return self._ours().run(self._fixed(defense), images, labels, threat, stream)

    def passes(self, defense: Defense) -> tuple[float, float]:
        if (settled := self.on(defense)) != self:
            return settled.passes(defense)
        if not self._is_ours(defense):
            return super().passes(defense)
        fixed = self._fixed(defense)
        forward, backward = self._ours().passes(fixed)
        return forward + (0 if defense.deterministic else 1 + UNSEEN) * prediction_rows(fixed), backward

    def _is_ours(self, defense: Defense) -> bool:
        return self.steeper or (self.parts == ("apgd-ce",) and type(defense).as_module is Defense.as_module)

    def _ours(self) -> EOTAPGD:
        return EOTAPGD(steps=self.steps, losses=("ce",))

    def on(self, defense: Defense) -> Attack:
        found = super().on(defense)
        assert isinstance(found, QuickAPGD)
        steeper = self.steeper and defense.steepens and found.parts == ("apgd-ce",)
        return dataclasses.replace(found, steeper=steeper, closer=found.closer and not steeper)


@dataclass(frozen=True)
class RandAutoAttack(CountedByPackage):
    """The components of the `rand` version on a randomised defence with fresh draws at every pass (T5).

    No single pass ends an image here: x' is the best, over `select_draws` held-apart draws, of all that the components
    produced. What the package's own bookkeeping would have counted, where an image must be right in one noisy pass before
    and one after each component, stands beside it in `official_correct`.
    """

    drawn: ClassVar[tuple[str, ...]] = ("eot_iter", "select_draws")
    later: ClassVar[dict[str, Any]] = {"parts": RAND}

    eot_iter: Count = 20
    steps: Count = 100
    select_draws: Count = 64
    parts: tuple[Name, ...] = RAND

    def attempt(
        self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream
    ) -> tuple[Tensor, Tensor]:
        best = BestSoFar(defense, images, labels, stream, self.select_draws)
        with torch.random.fork_rng():
            package = PackageParts(defense, threat, stream, self._effort(defense))
            with torch.no_grad():
                standing = package.right(images, labels)
            for part in parts_for(defense.classes, self.parts):
                positions = (standing | ~best.broken).nonzero()[:, 0]
                if not len(positions):
                    break
                x, y = images[positions], labels[positions]

                def offer(points: Tensor, where: Tensor, positions: Tensor = positions) -> None:
                    best.offer(points, positions[where])

                claimed = package.run(part, x, y, offer, everyone=True)
                changed = (claimed != x).flatten(1).any(1).nonzero()[:, 0]
                offer(claimed[changed], changed)
                with torch.no_grad():
                    standing[positions] &= package.right(claimed, y)
        return threat.project(best.points, images), standing

    def passes(self, defense: Defense) -> tuple[float, float]:
        parts = [part_passes(part, defense, self._effort(defense)) for part in parts_for(defense.classes, self.parts)]
        judged = 2 * len(parts) * judging_rows(defense, self.select_draws)
        return sum(f for f, _ in parts) + prediction_rows(defense) + judged, sum(b for _, b in parts)

    def on(self, defense: Defense) -> Attack:
        return dataclasses.replace(self, parts=parts_for(defense.classes, self.parts))

    def _effort(self, defense: Defense) -> Effort:
        return Effort(steps=self.steps, eot=1 if defense.deterministic else self.eot_iter)


def make(name: str) -> Any:
    return {"aa": AutoAttack, "apgd": QuickAPGD, "aa-rand": RandAutoAttack}[name]
