"""Projected gradient descent (Madry et al. 2017) through eq. 7 of the RUSH paper, with fresh draws at every step (EOT)."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import climbing_rows, gradient_rows, judging_rows
from rush_bench.defenses import Defense, Gradient, is_network
from rush_bench.defenses.aggregate import objective_named, steepened
from rush_bench.noise import Stream
from rush_bench.settings import Count, Range, Whole
from rush_bench.threats import Threat

NAMES = {
    "pgd": "PGD-20, step eps/4 (2/255 at 8/255), random start; the defence's own m draws per gradient",
    "eot": "PGD-100, step 2.5 eps/100, random start; 64 fresh draws per gradient (EOT)",
}

Step = Annotated[float, Range(0, 10, above=True)]  # in units of eps; 2 cross the ball

WITHOUT_LOOKS: dict[str, Any] = {"select_draws": 32, "select_every": 5, "stop": False}  # where nothing is held apart: no effect


@dataclass
class Walk:
    """Where the images that are still attacked stand: x' (B, C, H, W), beside the clean ones.

    A step keeps x' itself in ball and box, so that no pixel can freeze outside of the box (sources S5.10).
    """

    attacked: Tensor
    clean: Tensor
    threat: Threat
    step: float

    def move(self, gradient: Tensor) -> None:
        """One step up."""
        moved = self.attacked + self.step * self.threat.eps * self.threat.ascend(gradient)
        self.attacked = self.threat.project(moved, self.clean)

    def keep(self, positions: Tensor) -> None:
        """The others leave."""
        self.attacked, self.clean = self.attacked[positions], self.clean[positions]


@dataclass(frozen=True)
class PGD(Attack):
    """`step` is in units of eps; `draws` per gradient, 0 for the defence's own m.

    On a randomised defence iterates are judged every `select_every` steps and at the end, on `select_draws` draws held apart
    from those of the gradients (A4; see `BestSoFar`), and with `stop` an image that is broken there leaves: its x' and the
    margin in its record are those of that look, not the furthest that the steps would go. On a deterministic network every
    iterate counts, at no extra cost, and none leaves; on a deterministic defence of somebody's own, those of every fifth step.
    `steeper`: CE of an image whose logits lie a few units apart is that of larger ones (`ce@steep`). What other choices are
    worth: `rush_bench.attacks.ablation`.
    """

    drawn: ClassVar[tuple[str, ...]] = ("draws", *WITHOUT_LOOKS)
    later: ClassVar[dict[str, Any]] = {"stop": False, "steeper": False}

    steps: Count = 20
    step: Step = 0.25  # as a share of eps, in each pixel (l-inf) or in length (l2)
    restarts: Count = 1
    random_start: bool = True
    draws: Whole = 0
    loss: str = "ce"
    select_draws: Count = 24
    select_every: Count = 10  # steps between two judgements
    stop: bool = True
    steeper: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_named(self.loss, targets=False)

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if (settled := self.on(defense)) != self:
            return settled.run(defense, images, labels, threat, stream)
        best = BestSoFar(defense, images, labels, stream, self.select_draws)
        looks = self._judged_apart(defense)
        climbed = self.climbed(defense, images, stream)
        for restart in range(self.restarts):
            alive = best.standing() if self.stop and restart else best.everyone
            own, truth = stream.at(best.places(alive)), labels[alive]
            walk = self.begin(images[alive], threat, own, restart)
            for step in range(self.steps):
                if looks and step and step % self.select_every == 0:
                    best.offer(walk.attacked, alive)
                    positions = (~best.broken[alive]).nonzero()[:, 0]
                    if self.stop and len(positions) < len(alive):
                        alive, truth = alive[positions], truth[positions]
                        walk.keep(positions)
                        own = stream.at(best.places(alive))
                if not len(alive):
                    break
                at = self.gradient(climbed, walk, truth, own, restart, step)
                if not looks:
                    best.take(walk.attacked, alive, at.loss)
                walk.move(at.gradient)
            if looks and len(alive):
                best.offer(walk.attacked, alive)
            elif not looks:
                best.take(walk.attacked, alive, climbed.loss(walk.attacked, truth, self.objective(defense), own))
        return best.points

    def climbed(self, defense: Defense, images: Tensor, stream: Stream) -> Defense:
        """The defence whose gradients are followed from these images."""
        return defense.to_climb(images, stream) if self.objective(defense) != self.loss else defense

    def begin(self, clean: Tensor, threat: Threat, stream: Stream, restart: int) -> Walk:
        """At a random point of the ball, or at the image."""
        start = threat.start(clean, stream.named(f"start{restart}")) if self.random_start else clean
        return self.walk(start, clean, threat)

    def walk(self, start: Tensor, clean: Tensor, threat: Threat) -> Walk:
        """From there, as this attack keeps ball and box."""
        return Walk(start, clean, threat, self.step)

    def gradient(self, defense: Defense, walk: Walk, labels: Tensor, stream: Stream, restart: int, step: int) -> Gradient:
        """At x', over draws of this step's own."""
        draws = self.draws or defense.draws or 1
        noise = stream.named(f"gradient{restart}").skip(self.renewed(step) * draws)
        return defense.gradient(walk.attacked, labels, self.objective(defense), draws, noise)

    def renewed(self, step: int) -> int:
        """How often fresh draws have come by this step."""
        return step

    def objective(self, defense: Defense) -> str:
        """The loss, and how draws are averaged in it."""
        return steepened(self.loss) if self.steeper and defense.steepens else self.loss

    def looks(self, defense: Defense) -> int:
        """Judgements of an image in a restart."""
        return 1 + (self.steps - 1) // self.select_every if self._judged_apart(defense) else 1

    def _judged_apart(self, defense: Defense) -> bool:
        """Whether predictions judge iterates: the loss on the way does where a network of ours draws nothing."""
        return not (defense.deterministic and is_network(defense))

    def passes(self, defense: Defense) -> tuple[float, float]:
        forward, backward = gradient_rows(defense, self.draws or defense.draws or 1, self.loss)
        judged = self.looks(defense) * judging_rows(defense, self.select_draws)
        began = climbing_rows(defense) if self.objective(defense) != self.loss else 0
        return self.restarts * (self.steps * forward + judged) + began, self.restarts * self.steps * backward

    def on(self, defense: Defense) -> Attack:
        idle = WITHOUT_LOOKS if defense.deterministic else {}
        return dataclasses.replace(self, steeper=self.objective(defense) != self.loss, **idle)


@dataclass(frozen=True)
class EOT(PGD):
    """PGD with many steps and many fresh draws, whatever m the defence votes with."""

    steps: Count = 100
    step: Step = 0.025
    draws: Whole = 64
    select_draws: Count = 64


def make(name: str) -> Any:
    return {"pgd": PGD, "eot": EOT}[name]
