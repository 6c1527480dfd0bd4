"""torchattacks' own attacks where the extra is installed: what `published` emulates, to compare with (A9). Nothing imports the
package before an attack runs.
"""

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rush_bench.attacks.base import Attack
from rush_bench.attacks.cost import module_rows
from rush_bench.attacks.pgd import Step
from rush_bench.attacks.pyautoattack_parts import NORMS, Effort, module_of, part_passes
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput, MissingPackage
from rush_bench.noise import Gaussian, Noise, Stream, Uniform
from rush_bench.packages import overwritten
from rush_bench.settings import Count, Whole
from rush_bench.threats import Threat

NAMES = {
    "torchattacks-pgdrs": "torchattacks' own PGDRS, by RUSH's author: 40 steps, fresh noise (extra torchattacks)",
    "torchattacks-aa": "torchattacks' own AutoAttack (clean images back): explains a number only (extra torchattacks)",
}

INSTALL = (
    "pip install 'rush-bench[torchattacks]'  (where its requests~=2.25.1 conflicts: pip install --no-deps torchattacks==3.5.1)"
)
LAWS: dict[type[Noise], str] = {Uniform: "uniform", Gaussian: "guassian"}  # its spelling


@dataclass(frozen=True)
class TorchattacksPGDRS(Attack):
    """PGD on a smoothed network (l-inf): m draws as the defence (`draws` 0) anew at each step, steps of eps/4, last iterate."""

    drawn: ClassVar[tuple[str, ...]] = ("draws",)

    steps: Count = 40
    step: Step = 0.25  # as a share of eps
    draws: Whole = 0

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        law, draws = Uniform(0.0) if defense.deterministic else getattr(defense, "noise", None), self._draws(defense)
        if threat.norm != "linf":
            raise BadInput("torchattacks' PGDRS is for l-inf; choose a linf suite, or leave out the torchattacks-pgdrs attack")
        if not isinstance(law, Noise) or type(law) not in LAWS:
            raise BadInput(
                f"torchattacks' PGDRS knows uniform and Gaussian noise, {defense.name} has {law or 'no noise that it names'}; "
                "leave out the torchattacks-pgdrs attack"
            )
        with torch.random.fork_rng():
            torch.manual_seed(stream.seed)
            attack = real_torchattacks().PGDRS(
                _Anchored(module_of(defense.base(), stream), defense.device),
                eps=threat.eps,
                alpha=self.step * threat.eps,
                steps=self.steps,
                noise_type=LAWS[type(law)],
                noise_sd=law.scale,
                noise_batch_size=draws,
                batch_max=max(2048, draws),  # fewer than an image's draws would leave it no image to take
            )
            attacked = attack(images.contiguous(), labels)
        return threat.project(attacked.detach(), images)

    def passes(self, defense: Defense) -> tuple[float, float]:
        draws = self._draws(defense)
        again, rows = module_rows(defense.base(), max(1, 2048 // draws) * draws)
        return self.steps * draws * (rows + again), self.steps * draws * rows

    def _draws(self, defense: Defense) -> int:
        return 1 if defense.deterministic else self.draws or defense.draws


@dataclass(frozen=True)
class TorchattacksAutoAttack(Attack):
    """Its `standard` version on the defence with fresh draws at every pass, returned unchanged: clean where nothing worked.

    `steps` and `queries` are the package's own where 0 (3.5.1: 10 and 5000).
    """

    steps: Whole = 0
    queries: Whole = 0

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if defense.classes < 4:
            raise BadInput(
                f"torchattacks' AutoAttack needs 4 classes, {defense.name} has {defense.classes}; take aa, which runs "
                "the parts that exist"
            )
        with torch.random.fork_rng():
            attack = real_torchattacks().AutoAttack(
                _Anchored(module_of(defense, stream), defense.device),
                norm=NORMS[threat.norm],
                eps=threat.eps,
                n_classes=defense.classes,
                seed=stream.seed,
            )
            for part in attack._autoattack.attacks:
                if self.queries and hasattr(part, "n_queries"):
                    part.n_queries = self.queries
                if self.steps and hasattr(part, "steps"):
                    part.steps = self.steps
            attacked = attack(images.contiguous(), labels)
        return threat.project(attacked.detach(), images)

    def passes(self, defense: Defense) -> tuple[float, float]:
        effort = Effort(steps=self.steps or 10, queries=self.queries or 5000, targets=0)
        parts = [part_passes(part, defense, effort) for part in ("apgd-ce", "apgd-t", "fab-t", "square")]
        return sum(f for f, _ in parts), sum(b for _, b in parts)


class _Anchored(nn.Module):
    """A module with a parameter: the package asks the first one for its device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)


def real_torchattacks() -> Any:
    """The module `torchattacks` as its distribution installed it; MissingPackage with the line that installs it."""
    try:
        distribution = importlib.metadata.distribution("torchattacks")
        if changed := overwritten(distribution, "torchattacks"):
            again = f"pip install --force-reinstall --no-deps torchattacks=={distribution.version}"
            raise MissingPackage(f"torchattacks {distribution.version} was overwritten ({changed}): {again}")
        package = importlib.import_module("torchattacks")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage(f"this attack needs the package torchattacks, which is not installed: {INSTALL}") from error
    except ImportError as error:
        raise MissingPackage(f"torchattacks does not import ({error}): {INSTALL}") from error
    if not hasattr(package, "PGDRS"):
        raise MissingPackage(f"the installed torchattacks {distribution.version} has no PGDRS: {INSTALL}")
    return package


def make(name: str) -> type[Attack]:
    return {"torchattacks-pgdrs": TorchattacksPGDRS, "torchattacks-aa": TorchattacksAutoAttack}[name]
