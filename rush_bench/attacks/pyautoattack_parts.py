"""pyautoattack's components one at a time, with all that they found: the caller decides which image leaves, with which x'.

The package's own driver hides the points of highest loss and hands back clean images; see `published` and `autoattack`.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.attacks.cost import at_once, module_rows, prediction_rows
from rush_bench.attacks.parts import Name
from rush_bench.defenses import Defense, as_module
from rush_bench.errors import RushBenchError
from rush_bench.noise import Stream
from rush_bench.settings import Count, Settings, Whole
from rush_bench.threats import Threat

Offer = Callable[[Tensor, Tensor], None]  # points (n, C, H, W), positions (n,) in what was attacked
NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class Effort(Settings):
    """`steps` of APGD and FAB, `queries` of Square, `targets` of APGD-T and FAB-T (0: every other class), `eot` passes averaged
    in a gradient of APGD, and whether Square's squares shrink with the share of `queries` that is spent (`rescale`)."""

    steps: Count = 100
    queries: Count = 5000
    targets: Whole = 9
    eot: Count = 1
    rescale: bool = False


class PackageParts:
    """The components on a defence as a module; each is seeded as the package seeds it, so use it under `fork_rng` (A5).

    A randomised defence draws anew at every forward pass. `right` is one such pass.
    """

    def __init__(self, defense: Defense, threat: Threat, stream: Stream, effort: Effort) -> None:
        self.module, self.effort, self.seed = module_of(defense, stream), effort, stream.seed
        self.classes, self.size = defense.classes, at_once(defense)
        self.shared = {"eps": threat.eps, "norm": NORMS[threat.norm], "seed": stream.seed, "device": defense.device}

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether one prediction is right, (n,) bool."""
        return self.module(images).argmax(1) == labels

    def run(self, name: Name, images: Tensor, labels: Tensor, offer: Offer, everyone: bool = False) -> Tensor:
        """What the component returns: x' where a pass of its search was wrong, elsewhere the clean image, (n, C, H, W).

        `offer` is shown, besides, every point of highest loss. As in the package, an image that one clean pass gets wrong is
        not attacked, unless `everyone` is (it is still returned clean then).
        """
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        images = images.contiguous()  # its zero-gradient check fails on channels_last images
        with torch.no_grad():
            torch.manual_seed(self.seed)
            if name in ("fab", "fab-t"):
                batches = zip(images.split(self.size), labels.split(self.size), strict=True)
                return torch.cat([self._fab(x, y, targeted=name == "fab-t").detach() for x, y in batches])
            right = self.right(images, labels)
            claimed = images.clone()
            for search in self._searches(name):
                positions = (torch.ones_like(right) if everyone else right).nonzero()[:, 0]
                if not len(positions):
                    break
                parts = [search(images[part], labels[part]) for part in positions.split(self.size)]
                best, wrong, points = (torch.cat(found) for found in zip(*parts, strict=True))
                offer(best, positions)
                wrong &= right[positions]
                claimed[positions[wrong]] = points[wrong]
                right[positions[wrong]] = False
            return claimed.detach()

    def _searches(self, name: Name) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """Each (images, labels) to the best points, which images were wrong in a pass, and their points."""
        if name == "square":
            return [self._square]
        if name == "apgd-t":
            targets = self.effort.targets or self.classes - 1
            return [self._apgd("dlr-targeted", place) for place in range(2, min(targets, self.classes - 1) + 2)]
        return [self._apgd(name.removeprefix("apgd-"), None)]

    def _apgd(self, loss: str, place: int | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """`place` of the target among the classes sorted by score, 2 for the likeliest but one."""
        base = _package("autopgd_base")
        kind = base.APGDAttack if place is None else base.APGDAttack_targeted
        attack = kind(
            self.module,
            n_iter=self.effort.steps,
            eot_iter=self.effort.eot,
            logger=logging.getLogger("auto-attack"),
            **self.shared,
        )
        attack.loss = loss

        def search(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            attack.init_hyperparam(images)
            if place is not None:
                attack.y_target = self.module(images).sort(dim=1)[1][:, -place]
            best, right, _, points = attack.attack_single_run(images, labels)
            return best, ~right.bool(), points

        return search

    def _square(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attack = _package("square").SquareAttack(
            self.module, n_queries=self.effort.queries, p_init=0.8, resc_schedule=self.effort.rescale, **self.shared
        )
        attack.init_hyperparam(images)
        best = attack.attack_single_run(images, labels)[1]
        return best, ~self.right(best, labels), best

    def _fab(self, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        attack = _package("fab_pt").FABAttack_PT(self.module, n_iter=self.effort.steps, targeted=targeted, **self.shared)
        attack.n_target_classes = min(self.effort.targets or self.classes - 1, self.classes - 1)
        return attack.perturb(images, labels)


def part_passes(name: str, defense: Defense, effort: Effort) -> tuple[float, float]:
    """Rows forward and backward of one component for an image that never breaks, the pass that decides included."""
    per_prediction = prediction_rows(defense)
    again, back = module_rows(defense)
    targets = min(effort.targets or defense.classes - 1, defense.classes - 1)
    apgd = effort.eot * (1 + effort.steps)
    gradients, forwards = {
        "apgd-ce": (apgd, apgd),
        "apgd-dlr": (apgd, apgd),
        "apgd-t": (targets * apgd, targets * (apgd + 1)),
        "fab": (effort.steps * defense.classes, 2 * effort.steps + 2),
        "fab-t": (targets * effort.steps, targets * (2 * effort.steps + 3)),
        "square": (0, effort.queries + 2),
    }[name]
    return (forwards + 2) * per_prediction + gradients * again, gradients * back


def module_of(defense: Defense, stream: Stream) -> nn.Module:
    """The defence as a module for other people's attacks, which call it on any subset of the batch.

    Its noise depends on the row of a call, not on the image (a third party does not say which image that is); batches draw
    apart by their first image.
    """
    first = 0 if stream.images is None or not len(stream.images) else int(stream.images.flatten()[0])
    return as_module(defense, stream.named(f"module/{first}").at(None))


def _package(module: str) -> Any:
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ImportError as error:
        raise RushBenchError(
            f"the installed pyautoattack has no {module} ({error}); pip install 'pyautoattack>=0.2'"
        ) from error
