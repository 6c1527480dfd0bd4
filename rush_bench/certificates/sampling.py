"""How many draws an image gets before its certificate is written: modes `fixed`, `staged` and `target`.

All modes select a class by `selection` draws and bound its probability by other draws (Cohen et al. 2019, algorithm 1).
`fixed` makes all N draws and looks once. `staged` and `target` look at growing numbers of draws n_1 < ... < n_J = N and
stop an image early.

Why the error stays at most alpha. The looks n_j and shares alpha_j are set beforehand, sum alpha_j = alpha. Imagine all N
draws made for every image, also where we stop. The event E_j, that the Clopper-Pearson bound of the first n_j draws at
level alpha_j is above the truth, has probability at most alpha_j. So with probability at least 1 - alpha no E_j happens,
and then every bound that was looked at is below the truth, and so is the largest of them, whatever decided when to stop.
Hence the rule for stopping may use anything that was seen; a look that is not in the list would cost an error of its own.
The selected class depends on the selection draws alone, which the other draws are independent of.

The rule. Each radius that is to be decided needs a bound p_r. An image is sampled only while some radius is open: not yet
certified, and within reach: an upper bound at level `give_up_level` on the image's rate is not below what all N draws need
to certify that radius. A larger `give_up_level` gives up sooner. Giving up is an abstention at that radius, never an error.
`staged` settles several radii, `target` a single one. Between the settled radii a staged record is valid too, only below
`fixed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rush_bench.certificates.bounds import Certificate, best_bound, lower_bound, needed_count, upper_bound
from rush_bench.errors import BadInput
from rush_bench.settings import Count, Level, NonNegative, Range, Settings

Counts = NDArray[np.int64]
Draw = Callable[[Counts, int, int], Counts]  # (rows (b,), first draw, how many) -> counts of classes (b, K)

FIRST_LOOK = 200
LOOK_RATIO = 2**0.5  # finer looks stop images earlier; their share of alpha costs less than the draws they save
THIRDS = (0.0, 1 / 3, 2 / 3)  # of the largest radius: what `staged` settles where nothing else is asked for


@dataclass(frozen=True)
class Sampling(Settings):
    """Settings of a certificate. The defaults are those of Cohen et al. 2019 (N0 = 100, N = 100,000, alpha = 0.001).

    `radii`: what `staged` settles (none: 0, 1/3 and 2/3 of the largest), and the one radius of `target`; `fixed`
    settles every radius. `give_up_level`: see the module.
    """

    mode: Literal["fixed", "staged", "target"] = "fixed"
    selection: Count = 100
    draws: Annotated[int, Range(1, 2**31 - 1)] = 100_000
    alpha: Level = 0.001
    radii: tuple[NonNegative, ...] = ()
    give_up_level: Level = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "target" and len(self.radii) != 1:
            raise BadInput(f"mode target decides one radius, not {len(self.radii)}; give one --radius, or use --mode staged")
        if self.mode == "fixed" and self.give_up_level != type(self).give_up_level:
            raise BadInput("mode fixed makes all draws and gives no radius up; leave give_up_level out, or use --mode staged")
        if self.alpha >= 0.5:
            raise BadInput(
                f"alpha = {self.alpha:g}: a bound that may be wrong for one image in {1 / self.alpha:.2g} certifies nothing; "
                "alpha is the chance of a wrong certificate, below 0.5; 0.001 is usual"
            )
        share = _looks(self)[1][-1]
        if best_bound(self.draws, share) <= 0.5:
            enough = next(n for n in range(self.draws, 2**31) if best_bound(n, share) > 0.5)
            raise BadInput(
                f"{self.draws} draws at alpha = {self.alpha:g} certify nothing, not even if all agree; "
                f"raise --draws to {enough} or more, 100000 is usual"
            )


@dataclass(frozen=True)
class Plan:
    """Looks (numbers of draws) with their shares of alpha, the bounds p that are to be reached, ascending, and for each
    the rate that all draws need to reach it."""

    looks: tuple[int, ...]
    alphas: tuple[float, ...]
    wanted: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    settled: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Per image: bound (n,) on the class's probability, counts (n, K) of all its `used` (n,) estimation draws."""

    bound: NDArray[np.float64]
    counts: Counts
    used: Counts


def make_plan(settings: Sampling, theorem: Certificate) -> Plan:
    """The looks of a mode. BadInput for a target radius that N draws cannot certify even if all of them agree."""
    n = settings.draws
    looks, alphas = _looks(settings)
    if settings.mode == "fixed":
        return Plan(looks, alphas)
    largest = theorem.largest(n, alphas[-1])
    if settings.mode == "target" and settings.radii[0] > largest:
        raise BadInput(
            f"{n} draws at alpha = {settings.alpha:g} certify radii up to {largest:.6g} in mode target, not "
            f"{settings.radii[0]:.6g}; raise --draws, or ask for less"
        )
    radii = np.array(settings.radii or [share * largest for share in THIRDS])
    radii = np.unique(radii[radii <= largest])  # what cannot be reached is open for no image
    wanted = np.minimum(theorem.probability(radii), best_bound(n, alphas[-1]))  # rounding at the very largest
    rates = np.minimum(needed_count(wanted, n, alphas[-1]), n) / n
    return Plan(looks, alphas, tuple(wanted.tolist()), tuple(rates.tolist()), tuple(radii.tolist()))


def _looks(settings: Sampling) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The looks of a mode, and each one's share of alpha."""
    if settings.mode == "fixed":
        return (settings.draws,), (settings.alpha,)
    looks: list[int] = []
    while (look := round(FIRST_LOOK * LOOK_RATIO ** len(looks))) < 0.85 * settings.draws:
        looks.append(look)
    looks.append(settings.draws)
    # Shares grow with the look: the late ones decide the images near a radius, and there the width counts.
    weights = np.sqrt(looks)
    return tuple(looks), tuple((settings.alpha * weights / weights.sum()).tolist())


def estimate(plan: Plan, selected: Counts, classes: int, draw: Draw, give_up_level: float = 0.05) -> Outcome:
    """Draw and look until every image is settled; `selected` (n,) are the classes that the selection draws chose.

    `draw(rows, first, count)` gives the class counts of draws first .. first + count - 1 of the images in `undecided`; it is
    called once a look, with all images that go on. Every image gets at least the first look.
    """
    n = len(selected)
    bound, counts, used = np.zeros(n), np.zeros((n, classes), np.int64), np.zeros(n, np.int64)
    undecided, done = np.arange(n), 0
    for look, alpha in zip(plan.looks, plan.alphas, strict=True):
        if not len(undecided):
            break
        counts[undecided] += draw(undecided, done, look - done)
        used[undecided] = done = look
        top = counts[undecided, selected[undecided]]
        bound[undecided] = np.maximum(bound[undecided], lower_bound(top, look, alpha))
        undecided = undecided[open_rows(plan, bound[undecided], top, look, give_up_level)]
    return Outcome(bound, counts, used)


def open_rows(plan: Plan, bound: NDArray[np.float64], top: Counts, n: int, give_up_level: float) -> NDArray[np.bool_]:
    """Which images go on after `n` draws: the next radius above the bound is within reach."""
    following = np.searchsorted(plan.wanted, bound, side="right")
    rates = np.append(plan.rates, np.inf)[following]
    return upper_bound(top, n, give_up_level) >= rates


def stated(settings: Sampling, plan: Plan) -> dict[str, Any]:
    """The settings and what followed from them, JSON-able, for a record."""
    return {
        "mode": settings.mode,
        "selection": settings.selection,
        "draws": settings.draws,
        "alpha": settings.alpha,
        "radii": list(plan.settled),
        "hope": settings.give_up_level if len(plan.looks) > 1 else None,
        "looks": list(plan.looks),
    }
