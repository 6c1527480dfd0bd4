"""Our APGD for randomised defences: Croce and Hein (2020), algorithm 1, on the mean over all of a step's draws.

The reference implementation loops over draws, and its step control, success and best point follow the last draw of each
step. Here the m draws go through the network in one batch and all three follow their mean; what is kept is judged on draws
held apart (A4). Restarts and targets are rows of the batch; images that are broken leave it.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import BestSoFar
from rush_bench.attacks.cost import climbing_rows, gradient_rows, judging_rows, prediction_rows
from rush_bench.defenses import TARGETED, Defense, is_network
from rush_bench.defenses.aggregate import objective_named, steepened
from rush_bench.defenses.base import Gradient
from rush_bench.defenses.losses import margin
from rush_bench.noise import Stream
from rush_bench.settings import Count, Whole
from rush_bench.threats import Threat

NAMES = {
    "eot-apgd": "our APGD on the mean over 16 or more draws: CE (of the soft vote), then margin, 100 steps each",
    "eot-apgd-t": "the same towards 9 targets as rows of the batch: margin, then DLR, 40 steps each",
}


@dataclass(frozen=True)
class EOTAPGD(Attack):
    """`losses` run one after another on what still stands, each `restarts` times; see `Defense.gradient` for their names, and
    `on` for what no losses are.

    `draws` per gradient: 0 is the defence's own m, at least 16. `select_draws` held-apart draws judge candidates, at
    every checkpoint of the step size. With `stop`, an image none of whose held-apart draws is right leaves the search
    (see `BestSoFar`). `rows` bounds images x restarts x targets at once. `redraw` is how many steps draws are used before fresh
    ones come: 1 for EOT; 0 never, the fixed noise of T2. `back` returns to the best point so far where the step is halved, as
    in the paper; a deterministic defence always does. Under noise that point is partly the luckiest, and going on from
    where the search is breaks more at equal cost (benchmarks/next_attacks.py): hence the default. `steeper` as in `PGD`.
    """

    drawn: ClassVar[tuple[str, ...]] = ("draws", "select_draws", "redraw", "back")
    later: ClassVar[dict[str, Any]] = {"back": True, "steeper": False}

    steps: Count = 100
    losses: tuple[str, ...] = ()
    restarts: Count = 1
    targets: Count = 9
    draws: Whole = 0
    select_draws: Count = 64
    stop: bool = True
    redraw: Whole = 1
    rows: Count = 1024
    back: bool = False
    steeper: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for loss in self.losses:
            objective_named(loss)

    def run(self, defense: Defense, images: Tensor, labels: Tensor, threat: Threat, stream: Stream) -> Tensor:
        if (settled := self.on(defense)) != self:
            return settled.run(defense, images, labels, threat, stream)
        best = BestSoFar(defense, images, labels, stream, self.select_draws)
        ranked, climbed = None, defense.to_climb(images, stream) if self.steeper else defense
        for loss in self.losses:
            targeted, objective = loss.partition("@")[0] in TARGETED, steepened(loss) if self.steeper else loss
            if targeted and ranked is None:
                ranked = _ranked_targets(defense, images, labels, stream)[:, : self.targets]
            units = list(
                itertools.product(range(self.restarts), range(ranked.shape[1] if ranked is not None and targeted else 1))
            )
            # the noise is that of the loss, not of the group: which units share a batch depends on the other images
            search = _Search(self, climbed, images, threat, stream.named(f"gradient/{loss}"), objective, best)
            while units and len(alive := best.standing() if self.stop else best.everyone):
                # the first run breaks most of what will break; only then do the others pay as rows of one batch
                width = 1 if not best.value.isfinite().any() else max(1, self.rows // len(alive))
                group, units = units[:width], units[width:]
                own = stream.at(best.places(alive))
                start = [threat.start(images[alive], own.named(f"start/{loss}/{r}" + f"/{t}" * targeted)) for r, t in group]
                answers = [labels[alive]] * len(group)
                if targeted and ranked is not None:
                    answers = [torch.stack([labels[alive], ranked[alive, t]], 1) for _, t in group]
                search.run(alive, torch.stack(start), torch.stack(answers))
        return best.points

    def on(self, defense: Defense) -> "EOTAPGD":
        losses = self.losses or self._default_losses(defense)
        steeper = self.steeper and defense.steepens and any(steepened(loss) != loss for loss in losses)
        return dataclasses.replace(self, losses=losses, back=self.back or defense.deterministic, steeper=steeper)

    def _default_losses(self, defense: Defense) -> tuple[str, ...]:
        """CE, and where that saturates the margin, which does not. CE of the sharpened vote goes for the draws that can be won:
        it took 4 to 9 points more than CE from a noise-trained digits network (benchmarks/apgd_against_reference.py), and less
        from networks without draws."""
        return ("ce" if defense.deterministic else "ce@vote:3", "margin")

    def passes(self, defense: Defense) -> tuple[float, float]:
        if (settled := self.on(defense)) != self:
            return settled.passes(defense)
        forward, backward = float(climbing_rows(defense) if self.steeper else 0), 0.0
        judged = judging_rows(defense, self.select_draws)
        targets = min(self.targets, defense.classes - 1)
        for loss in self.losses:
            targeted = loss.partition("@")[0] in TARGETED
            units = self.restarts * (targets if targeted else 1)
            one = gradient_rows(defense, self.draws or max(defense.draws, 16), loss)
            # each run ends with its best point and, where there is noise, its last; looks in between seldom cost
            forward += units * ((1 + self.steps) * one[0] + (1 if defense.deterministic else 2) * judged)
            backward += units * (1 + self.steps) * one[1]
        if any(loss.partition("@")[0] in TARGETED for loss in self.losses):
            forward += prediction_rows(defense)  # ranks the targets
        return forward, backward


@dataclass
class _Rows:
    """The state of algorithm 1, a row for each of (units, images): x, the last x, the best x with its loss and gradient."""

    answers: Tensor
    images: Tensor
    x: Tensor
    before: Tensor
    best: Tensor
    gradient: Tensor
    best_gradient: Tensor
    loss: Tensor
    best_loss: Tensor
    step: Tensor
    rises: Tensor  # steps since the last checkpoint at which the loss rose
    checked_loss: Tensor  # the best loss at the last checkpoint
    halved: Tensor  # whether the step was halved there
    peak: Tensor  # the point with the largest margin so far, which need not be that of the largest loss
    peak_margin: Tensor
    best_true: Tensor  # log-probability of the label at `best`, over the draws of the search

    def promising(self, deterministic: bool) -> Tensor:
        """Which images (n,) may be broken by now, as far as the search's own draws tell: worth a look."""
        return (self.peak_margin > 0 if deterministic else self.best_true < math.log(0.05)).any(0)

    def take(self, columns: Tensor) -> "_Rows":
        """These images only."""
        return _Rows(**{name: value[:, columns] for name, value in self.__dict__.items()})


@dataclass
class _Search:
    """One run of algorithm 1 for some images, all its restarts or targets side by side."""

    settings: EOTAPGD
    defense: Defense
    images: Tensor
    threat: Threat
    stream: Stream
    loss: str
    best: BestSoFar
    share: float = 0.75  # of a step's own direction, against that of the step before
    calls: int = 0  # of the gradient, in the run at work

    @property
    def draws(self) -> int:
        return 1 if self.defense.deterministic else self.settings.draws or max(self.defense.draws, 16)

    def run(self, alive: Tensor, start: Tensor, answers: Tensor) -> None:
        """`alive` (n,) positions in the batch, `start` (U, n, C, H, W), `answers` (U, n) labels or (U, n, 2) with targets."""
        steps = self.settings.steps
        checkpoints = _checkpoints(steps)
        early = {max(1, round(part * steps)) for part in (0.03, 0.07, 0.13)} if self.settings.stop else set()
        self.calls, last = 0, 0
        s = self._begin(alive, start, answers)
        for step in range(1, steps + 1):
            images, x = s.images, s.x
            towards = self._project(x + s.step * self._ascend(s.gradient), images)
            share = self.share if step > 1 else 1.0
            s.x = self._project(x + share * (towards - x) + (1 - share) * (x - s.before), images)
            s.before = x
            self._look(s, alive)
            if step in checkpoints:
                self._control(s, step - last)
                last = step
            if step == steps or (self.settings.stop and (step in checkpoints or step in early)):
                deterministic = self.defense.deterministic
                self._offer(s.peak if deterministic else s.best, alive, None if step == steps else s.promising(deterministic))
                if step == steps and not (deterministic and is_network(self.defense)):
                    # the best on the search's draws is partly the luckiest; by somebody's own loss it is as good as that is
                    self._offer(s.x, alive, None)
                if self.settings.stop:
                    columns = (~self.best.broken[alive]).nonzero()[:, 0]
                    if not len(columns):
                        return
                    if len(columns) < len(alive):
                        alive, s = alive[columns], s.take(columns)

    def _begin(self, alive: Tensor, start: Tensor, answers: Tensor) -> _Rows:
        low = torch.full(start.shape[:2], -torch.inf, device=start.device)
        s = _Rows(
            answers=answers,
            images=self.images[alive].expand_as(start),
            x=start,
            before=start,
            best=start,
            gradient=start,
            best_gradient=start,
            loss=low,
            best_loss=low,
            step=_wide(torch.full_like(low, 2 * self.threat.eps)),
            rises=torch.zeros_like(low),
            checked_loss=low,
            halved=torch.zeros_like(low, dtype=torch.bool),
            peak=start,
            peak_margin=low,
            best_true=low,
        )
        self._look(s, alive)
        s.checked_loss, s.rises = s.best_loss, torch.zeros_like(low)
        return s

    def _look(self, s: _Rows, alive: Tensor) -> None:
        """Gradient and mean loss at x over all draws; what is best so far."""
        units, n = s.loss.shape
        labels = s.answers.flatten(0, 1)
        at = self._ask(s.x.flatten(0, 1), labels, self.stream.at(self.best.places(alive).repeat(units)))
        self.calls += 1
        loss = at.loss.unflatten(0, (units, n))
        s.gradient = at.gradient.unflatten(0, (units, n))
        s.rises = s.rises + (loss > s.loss)
        s.loss = loss
        better = loss > s.best_loss
        s.best_loss = torch.where(better, loss, s.best_loss)
        s.best = torch.where(_wide(better), s.x, s.best)
        s.best_gradient = torch.where(_wide(better), s.gradient, s.best_gradient)
        lead = loss
        if at.scores is not None:
            truth = labels if labels.ndim == 1 else labels[:, 0]
            lead = margin(at.scores, truth).view_as(loss)
            s.best_true = torch.where(better, at.scores.gather(1, truth[:, None]).view_as(loss), s.best_true)
        higher = lead > s.peak_margin
        s.peak_margin = torch.where(higher, lead, s.peak_margin)
        s.peak = torch.where(_wide(higher), s.x, s.peak)

    def _ask(self, x: Tensor, labels: Tensor, stream: Stream) -> Gradient:
        """The gradient at x over this call's draws."""
        fresh = self.calls // self.settings.redraw if self.settings.redraw else 0
        return self.defense.gradient(x, labels, self.loss, self.draws, stream.skip(fresh * self.draws))

    def _control(self, s: _Rows, since: int) -> None:
        """Halve the step, and go back to the best, where it rose too seldom, or stands as at the last checkpoint (1 and 2)."""
        seldom = s.rises <= 0.75 * since
        stuck = ~s.halved & (s.best_loss <= s.checked_loss)
        s.halved = seldom | stuck
        s.checked_loss, s.rises = s.best_loss, torch.zeros_like(s.rises)
        s.step = torch.where(_wide(s.halved), s.step / 2, s.step)
        if self.settings.back:
            s.x = torch.where(_wide(s.halved), s.best, s.x)
            s.gradient = torch.where(_wide(s.halved), s.best_gradient, s.gradient)

    def _offer(self, points: Tensor, alive: Tensor, some: Tensor | None) -> None:
        if some is not None:
            columns = some.nonzero()[:, 0]
            points, alive = points[:, columns], alive[columns]
        if len(alive):
            for unit in points:
                self.best.offer(unit, alive)

    def _project(self, x: Tensor, images: Tensor) -> Tensor:
        return self.threat.project(x.flatten(0, 1), images.flatten(0, 1)).view_as(x)

    def _ascend(self, gradient: Tensor) -> Tensor:
        return self.threat.ascend(gradient.flatten(0, 1)).view_as(gradient)


def _wide(rows: Tensor) -> Tensor:
    return rows[..., None, None, None]


def _checkpoints(steps: int) -> set[int]:
    """After which steps the step size is looked at: intervals of 22 %, then 3 % shorter each, at least 6 %."""
    length, least, less = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    found, at = set(), 0
    while (at := at + length) <= steps:
        found.add(at)
        length = max(length - less, least)
    return found


def _ranked_targets(defense: Defense, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
    """The other classes from the likeliest on, by a prediction on the clean images: (B, K - 1)."""
    probabilities = defense.predict(images, stream.named("targets")).probabilities
    order = probabilities.scatter(1, labels[:, None], -1.0).argsort(dim=1, descending=True)
    return order[:, :-1]


@dataclass(frozen=True)
class TargetedEOTAPGD(EOTAPGD):
    """Margin and, of 4 classes or more, DLR towards the likeliest classes.

    With `pgd` it comes to AutoAttack's worst case on small networks at a fifth of its cost (benchmarks/strength.py).
    """

    steps: Count = 40

    def _default_losses(self, defense: Defense) -> tuple[str, ...]:
        return ("margin-to", "dlr-to") if defense.classes > 3 else ("margin-to",)


def make(name: str) -> Any:
    return {"eot-apgd": EOTAPGD, "eot-apgd-t": TargetedEOTAPGD}[name]
