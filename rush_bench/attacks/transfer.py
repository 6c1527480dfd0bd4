"""Transfer (T8): x' crafted on another defence and scored on this one. A white-box attack that does worse is broken."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.base import Attack
from rush_bench.defenses import Defense, load_defense, resolve
from rush_bench.errors import BadInput
from rush_bench.noise import Stream
from rush_bench.settings import Count, Whole
from rush_bench.store import read_card
from rush_bench.threats import Threat

NAMES = {"transfer": "x' of our APGD on the network without its noise (source=base), or on any model of the store"}


@dataclass(frozen=True)
class Transfer(Attack):
    """`source` is `base` (smoothing removed), a model of the store as `name@m`, or a Defense; `store` its folder.

    x' is the best for the source: the defence under attack is never asked. The other settings are those of `eot-apgd`;
    `draws` counts for a randomised source.
    """

    climbs: ClassVar[bool] = False

    source: str | Defense = "base"
    store: str = "models"
    steps: Count = 100
    losses: tuple[str, ...] = ("ce", "margin")
    restarts: Count = 1
    draws: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attack()

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        source = self._source(defense)
        if tuple(source.shape) != tuple(defense.shape) or source.classes != defense.classes:
            raise BadInput(
                f"{source.name} takes images {tuple(source.shape)} into {source.classes} classes, {defense.name} "
                f"{tuple(defense.shape)} into {defense.classes}; choose a source of the same data set"
            )
        before = dataclasses.replace(source.passes)
        attacked = self._attack().run(source, images, labels, threat, stream)
        if source.passes is not defense.passes:  # the record of this attack tells what it cost, on whichever network
            defense.passes.forwards += source.passes.forwards - before.forwards
            defense.passes.backwards += source.passes.backwards - before.backwards
        return attacked

    def passes(self, defense: Defense) -> tuple[float, float]:
        return self._attack().passes(self._source(defense))

    def settings(self) -> dict[str, Any]:
        """With the source's weights in place of its whereabouts, so that a record's key follows what was attacked."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("source", "store")}
        if isinstance(self.source, Defense):
            return {**plain, "source": self.source.name, "source_identity": self.source.identity()}
        if self.source == "base":
            return {**plain, "source": self.source}
        full = resolve([self.source], Path(self.store))[0]
        model, _, which = full.partition("@")[0].partition(":")
        return {**plain, "source": full, "source_sha256": read_card(Path(self.store), model)["sha256"][which or "model"]}

    def _attack(self) -> EOTAPGD:
        # with the way back on a randomised source too, as records of it were made
        return EOTAPGD(steps=self.steps, losses=self.losses, restarts=self.restarts, draws=self.draws, back=True)

    def _source(self, defense: Defense) -> Defense:
        if isinstance(self.source, Defense):
            return self.source
        if self.source == "base":
            return defense.base()
        return load_defense(self.source, store=self.store, device=defense.device)


def make(name: str) -> Any:
    return Transfer
