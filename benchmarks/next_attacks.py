"""What might lower the worst case of a randomised defence at equal cost: variants of our APGD, one idea each.

    python benchmarks/next_attacks.py [--images 100] [--seed 0] [--steps 50] [--draws 16] [--keep DIR] [--data-dir DIR]
        [--store DIR --models rush-digits@1,smoothadv-digits@64] [--networks PART,..] [--variants PART,..]

`present` is `eot-apgd` as it was before this: its default losses, CE of the soft vote, then the margin on what still stands,
`--draws` per gradient, back to the best point where the step is halved. Every variant may spend as many rows through the
network (steps x draws; transfer from the base and looks at the vote included), on the same images, and has the same starts and
noise but for what it changes. An image that is broken leaves the search, so that what was spent (`fe`: rows forward plus rows
backward, per image) is less than what was granted. x' are scored on fresh draws, the same for all, 400 per image or more;
differences are paired by image, with 95 % intervals. Of so many intervals one in twenty misses by chance: what wins has to
win again with another `--seed` (of images, starts, draws and networks made on the spot).

Networks: small ones that are trained on the spot (of strength.py), and any of a store. `--keep` holds a file for each
network and variant; what is there is not computed again.
"""

import argparse
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from strength import SUBJECTS, Subject, train
from torch import Tensor

from rush_bench.attacks.apgd import EOTAPGD, _Rows, _Search, _wide
from rush_bench.attacks.best import BestSoFar
from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses import Defense, Gradient, Smoothed, load_defense
from rush_bench.defenses.aggregate import steepened
from rush_bench.evaluation.score import check, score
from rush_bench.noise import Stream, Uniform
from rush_bench.records.statistics import interval, paired_difference
from rush_bench.threats import Threat

JUDGED = 64  # draws held apart, that candidates and votes are judged on
SCORED = 400  # draws
STORED_EPS = 0.1  # of the committed records of digits
SPOT = {name.replace(",", ""): SUBJECTS[name] for name in ("digits, noise", "digits, noise and PGD")}
SPOT["CIFAR-10 noise"] = Subject("cifar10", 0.1, 0.0, 2 / 255, 8)


# (3) momentum


class Averaged(_Search):
    """MI-FGSM (Dong et al. 2018): an exponential mean of gradients, each over its l1 norm; `keeps` is what stays of it."""

    keeps = 0.5

    def _look(self, s: _Rows, alive: Tensor) -> None:
        first = self.calls == 0
        super()._look(s, alive)
        fresh = s.gradient / s.gradient.flatten(2).abs().mean(2)[..., None, None, None].clamp_min(1e-30)
        if first:
            self.mean = fresh.new_zeros(len(fresh), len(self.images), *fresh.shape[2:])
            self.square = torch.zeros_like(self.mean)
        self.mean[:, alive] = self.keeps * self.mean[:, alive] + (1 - self.keeps) * fresh
        self.square[:, alive] = self.keeps * self.square[:, alive] + (1 - self.keeps) * fresh**2
        s.gradient = self._towards(self.mean[:, alive], self.square[:, alive])

    def _towards(self, mean: Tensor, square: Tensor) -> Tensor:
        return mean


class AveragedLonger(Averaged):
    keeps = 0.8


class Certain(AveragedLonger):
    """A pixel moves as far as its gradient is sure of its sign: mean over root mean square of the steps (Adam), up to 1."""

    def _towards(self, mean: Tensor, square: Tensor) -> Tensor:
        return 1.5 * mean / square.sqrt().clamp_min(1e-30)

    def _ascend(self, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


# (4) draws


class Growing(_Search):
    """A quarter of the draws at first, 7 quarters at last."""

    @property
    def draws(self) -> int:
        return self._at(self.calls)

    def _at(self, call: int) -> int:
        return max(1, round(super().draws * (0.25 + 1.5 * call / self.settings.steps)))

    def _ask(self, x: Tensor, labels: Tensor, stream: Stream) -> Gradient:
        before = sum(self._at(call) for call in range(self.calls))
        return self.defense.gradient(x, labels, self.loss, self.draws, stream.skip(before))


class Unsure(_Search):
    """Two gradients of a quarter of the draws each; the half of the images where fewest signs agree gets all the draws more."""

    def _ask(self, x: Tensor, labels: Tensor, stream: Stream) -> Gradient:
        few, stream = self.draws // 4, stream.skip(2 * self.calls * self.draws)
        one, two = (self.defense.gradient(x, labels, self.loss, few, stream.skip(k * few)) for k in range(2))
        agree = (one.gradient.sign() == two.gradient.sign()).flatten(1).float().mean(1)
        ask = agree.argsort()[: -(-len(x) // 2)]
        assert stream.images is not None
        of = Stream(stream.seed, stream.purpose, stream.images[ask], stream.first_draw + 2 * few)
        more = self.defense.gradient(x[ask], labels[ask], self.loss, self.draws, of)
        found = [(a + b) / 2 for a, b in zip(_parts(one), _parts(two), strict=True)]
        new = self.draws / (self.draws + 2 * few)  # the share of the later draws
        for mean, late in zip(found, _parts(more), strict=True):
            mean[ask] = (1 - new) * mean[ask] + new * late
        return Gradient(found[0], found[1], found[2].log())


def _parts(at: Gradient) -> tuple[Tensor, Tensor, Tensor]:
    """What a mean is taken of."""
    assert at.scores is not None
    return at.gradient, at.loss, at.scores.exp()


# (5) steps


class Smoother(_Search):
    """A rise is one of the exponential mean of the loss."""

    def _look(self, s: _Rows, alive: Tensor) -> None:
        first, before, rises = self.calls == 0, s.loss, s.rises
        super()._look(s, alive)
        if not first:
            s.loss = 0.8 * before + 0.2 * s.loss
            s.rises = rises + (s.loss > before)


class Cosine(_Search):
    """From eps to 0 along a cosine, whatever the loss does."""

    def _look(self, s: _Rows, alive: Tensor) -> None:
        super()._look(s, alive)
        share = 0.5 + 0.5 * math.cos(math.pi * (self.calls - 1) / self.settings.steps)
        s.step = _wide(torch.full_like(s.loss, self.threat.eps * share))

    def _control(self, s: _Rows, since: int) -> None:
        """Leaves the steps alone."""


class CosineAveraged(Cosine, Averaged):
    """Both."""


# (1) starts


class Near(_Search):
    """The first step is half of eps, so that it does not leave a start that was chosen."""

    def _begin(self, alive: Tensor, start: Tensor, answers: Tensor) -> _Rows:
        s = super()._begin(alive, start, answers)
        s.step = s.step / 4
        return s


@dataclass
class State:
    """What a start or a target may depend on."""

    defense: Defense
    images: Tensor
    labels: Tensor
    threat: Threat
    stream: Stream
    best: BestSoFar
    steps: int

    def votes(self, points: Tensor) -> Tensor:
        """Shares (B, K) of the draws that judge at these points."""
        votes = self.defense.predictions(points, self.stream.named("votes"), -(-JUDGED // self.defense.draws)).votes
        return votes.sum(0) / votes.sum((0, 2))[:, None]


def base_points(s: State) -> Tensor:
    """x' of CE and of the margin on the network without its noise, the better of the two for the defence: (B, C, H, W)."""
    best = BestSoFar(s.defense, s.images, s.labels, s.stream.named("base"), JUDGED)
    for loss in ("ce", "margin"):
        attack = EOTAPGD(steps=s.steps, losses=(loss,))
        best.offer(attack.run(s.defense.base(), s.images, s.labels, s.threat, s.stream.named(f"base/{loss}")))
    return best.points


def cost_of_base(steps: int) -> int:
    return 2 * (2 * (1 + steps) + JUDGED)


def best_so_far(s: State) -> Tensor:
    return s.best.points


# (2) targets


def runner_up(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.scatter(1, labels[:, None], -torch.inf).argmax(1)


def of_logits(s: State) -> Tensor:
    return runner_up(s.defense.predict(s.images, s.stream.named("targets")).probabilities, s.labels)


def of_clean_vote(s: State) -> Tensor:
    return runner_up(s.votes(s.images), s.labels)


def of_vote(s: State) -> Tensor:
    return runner_up(s.votes(s.best.points), s.labels)


@dataclass(frozen=True)
class Phase:
    """One run of algorithm 1 on what stands, with `share` of all rows; from a random start where none is said."""

    loss: str
    search: type[_Search] = _Search
    share: float = 0.5
    draws: float = 1.0  # of a gradient, times those of the present attack
    redraw: int = 1
    back: bool = True  # to the best point, where the step is halved
    start: Callable[[State], Tensor] | None = None
    target: Callable[[State], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the search


@dataclass(frozen=True)
class Variant:
    """`extra` is what it spends per image besides its phases, in rows forward plus backward, given the steps of a phase."""

    phases: tuple[Phase, ...]
    extra: Callable[[int], int] = lambda steps: 0

    def run(self, defense: Defense, data: Images, threat: Threat, stream: Stream, steps: int, draws: int) -> Tensor:
        images, labels = data.floats(), data.labels
        best, climbed = BestSoFar(defense, images, labels, stream, JUDGED), defense.to_climb(images, stream)
        state = State(defense, images, labels, threat, stream, best, steps)
        rows = 2 * steps * draws - self.extra(steps) / 2  # there and back
        for number, phase in enumerate(self.phases):
            alive = best.standing()
            if not len(alive):
                break
            own_draws = round(phase.draws * draws)
            settings = EOTAPGD(
                steps=round(phase.share * rows / own_draws),
                losses=(phase.loss,),
                draws=own_draws,
                redraw=phase.redraw,
                back=phase.back,
            )
            again = sum(earlier.loss == phase.loss for earlier in self.phases[:number])  # a restart
            own, noise = stream.at(best.places(alive)), stream.named(f"gradient/{phase.loss}" + f"/{again}" * (again > 0))
            start = threat.start(images[alive], own.named(f"start/{phase.loss}/{again}"))
            start = start if phase.start is None else phase.start(state)[alive]
            answers = labels[alive]
            if phase.target is not None:
                answers = torch.stack([answers, phase.target(state)[alive]], 1)
            objective = steepened(phase.loss)
            search = phase.search(settings, climbed, images, threat, noise, objective, best, **phase.options)
            search.run(alive, start[None], answers[None])
        return best.points


def both(*searches: type[_Search], **changes: Any) -> tuple[Phase, Phase]:
    """CE and the margin, searched and changed alike."""
    return Phase(CE, *searches, **changes), Phase(MARGIN, *searches, **changes)


def towards(target: Callable[[State], Tensor]) -> tuple[Phase, Phase]:
    return Phase(CE), Phase("margin-to", target=target)


CE, MARGIN = "ce@vote:3", "margin"
PRESENT = "present"
VARIANTS = {
    PRESENT: Variant(both()),
    "1 CE from the base's x'": Variant((Phase(CE, start=base_points), Phase(MARGIN)), cost_of_base),
    "1 CE from it, first step eps/2": Variant((Phase(CE, Near, start=base_points), Phase(MARGIN)), cost_of_base),
    "1 margin from CE's best": Variant((Phase(CE), Phase(MARGIN, start=best_so_far))),
    "1 margin from it, first step eps/2": Variant((Phase(CE), Phase(MARGIN, Near, start=best_so_far))),
    "1 two starts, half the steps": Variant(2 * both(share=0.25)),
    "2 margin to the logits' runner-up": Variant(towards(of_logits)),
    "2 margin to the clean vote's": Variant(towards(of_clean_vote), lambda steps: JUDGED),
    "2 margin to the vote's at CE's best": Variant(towards(of_vote), lambda steps: JUDGED),
    "2 margin of the soft vote": Variant((Phase(CE), Phase("margin@vote:3"))),
    "3 no momentum": Variant(both(options={"share": 1.0})),
    "3 momentum 0.5 for 0.25": Variant(both(options={"share": 0.5})),
    "3 mean of gradients, 0.5 stays": Variant(both(Averaged)),
    "3 mean of gradients, 0.8 stays": Variant(both(AveragedLonger)),
    "3 steps as sure as the sign": Variant(both(Certain)),
    "4 draws grow from 1/4 to 7/4": Variant(both(Growing)),
    "4 draws where signs are unsure": Variant(both(Unsure)),
    "4 a quarter of the draws, more steps": Variant(both(draws=0.25)),
    "4 half the draws, twice the steps": Variant(both(draws=0.5)),
    "4 twice the draws, half the steps": Variant(both(draws=2)),
    "4 4 times the draws for the margin": Variant((Phase(CE), Phase(MARGIN, draws=4))),
    "4 new draws every 5 steps": Variant(both(redraw=5)),
    "5 rises of the smoothed loss": Variant(both(Smoother)),
    "5 no way back to the best": Variant(both(back=False)),
    "5 cosine from eps to 0": Variant(both(Cosine)),
    "6 cosine, mean of gradients": Variant(both(CosineAveraged)),
    "6 cosine, twice the draws": Variant(both(Cosine, draws=2)),
    "6 cosine, half the draws": Variant(both(Cosine, draws=0.5)),
    "6 cosine, two starts": Variant(2 * both(Cosine, share=0.25)),
}


@dataclass
class Found:
    """How often right on fresh draws, per image, and what it took per image."""

    correct: np.ndarray
    repeats: np.ndarray
    fe: float
    seconds: float


Network = Callable[[], tuple[Defense, Images]]  # made or loaded once it is asked for, with its test images


def measure(variant: Variant, network: Network, threat: Threat, seed: int, steps: int, draws: int) -> Found:
    defense, data = network()
    images, labels = data.floats(), data.labels
    before, begun = defense.passes.forwards + defense.passes.backwards, time.process_time()
    attacked = variant.run(defense, data, threat, Stream(seed, "attack", data.index), steps, draws)
    seconds, spent = time.process_time() - begun, defense.passes.forwards + defense.passes.backwards - before
    check(attacked, images, data.index, threat)
    right = score(defense, attacked, labels, data.index, Stream(seed, "score"), max(SCORED // defense.draws, 10))
    return Found(right["correct"], right["repeats"], spent / len(images), seconds / len(images))


def kept_in(folder: Path | None, name: str, compute: Callable[[], Found]) -> Found:
    """What a file of the folder holds, or else what is computed and put there."""
    if folder is None:
        return compute()
    path = folder / ("".join(c if c.isalnum() or c in "@-" else "_" for c in name) + ".npz")
    if path.exists():
        with np.load(path) as held:
            return Found(held["correct"], held["repeats"], float(held["fe"]), float(held["seconds"]))
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, **dataclasses.asdict(found))
    return found


def row(name: str, found: Found, present: Found | None) -> str:
    right = interval(found.correct, found.repeats, deterministic=False)
    cost = f"{found.fe:6.0f} fe {1000 * found.seconds:5.0f} ms"
    if present is None:
        return f"  {name:36} {100 * right.value:5.1f}  [{100 * right.low:.1f}, {100 * right.high:.1f}]".ljust(70) + cost
    less = paired_difference(found.correct, found.repeats, present.correct, present.repeats)
    word = "lower" if less.high < 0 else "higher" if less.low > 0 else ""
    difference = f"{100 * less.value:+6.2f} [{100 * less.low:+6.2f}, {100 * less.high:+6.2f}]"
    return f"  {name:36} {100 * right.value:5.1f}  {difference:24} {cost}  {word}".rstrip()


def networks(args: argparse.Namespace) -> dict[str, tuple[float, Network]]:
    """By name: eps of the threat, and the network."""

    @functools.cache
    def spot(subject: Subject) -> tuple[Defense, Images]:
        side, data = (8, None) if subject.data == "digits" else (16, args.data_dir)
        pool = load_dataset(subject.data, "train", None if side == 8 else 5000, size=side, data_dir=data)
        test = load_dataset(subject.data, "test", args.images, seed=args.seed, size=side, data_dir=data)
        network = train(subject, pool, args.seed)
        return Smoothed(network, noise=Uniform(subject.noise), votes=1, shape=test.shape), test

    @functools.cache
    def stored(model: str) -> tuple[Defense, Images]:
        return load_defense(model, store=args.store), load_dataset("digits", "test", args.images, seed=args.seed)

    made = {name: subject for name, subject in SPOT.items() if subject.data == "digits" or args.data_dir is not None}
    found = {name: (subject.eps, functools.partial(spot, subject)) for name, subject in made.items()}
    return found | {name: (STORED_EPS, functools.partial(stored, name)) for name in filter(None, args.models.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws, of the images, of networks made on the spot")
    parser.add_argument("--steps", type=int, default=50, help="of each of the two losses")
    parser.add_argument("--draws", type=int, default=16, help="of a gradient")
    parser.add_argument("--data-dir", default=None, help="with CIFAR-10")
    parser.add_argument("--store", default=None, help="folder of models trained on digits")
    parser.add_argument("--models", default="", help="randomised ones of the store, as name@votes, with commas between")
    parser.add_argument("--networks", default="", help="these alone: part of a name, with commas between")
    parser.add_argument("--variants", default="", help="these beside the present one: part of a name, with commas between")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what was computed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def asked(names: str, name: str) -> bool:
        return not names or any(part in name for part in names.split(","))

    for title, (eps, network) in networks(args).items():
        if not asked(args.networks, title):
            continue
        how = f"{args.images} images, {args.steps} steps, {args.draws} draws"
        print(f"{title}, seed {args.seed}, linf {eps:.4f}, {how}", flush=True)
        present: Found | None = None
        for name, variant in VARIANTS.items():
            if name != PRESENT and not asked(args.variants, name):
                continue
            where = f"{title}-{args.seed}-{args.images}-{args.steps}-{args.draws}-{name}"
            compute = functools.partial(measure, variant, network, Threat("linf", eps), args.seed, args.steps, args.draws)
            found = kept_in(args.keep, where, compute)
            print(row(name, found, present), flush=True)
            present = present or found


if __name__ == "__main__":
    main()
