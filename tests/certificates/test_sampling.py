"""The stated error holds in every mode, on a classifier whose radius is known; and early stopping saves draws.

For a linear classifier under Gaussian noise the smoothed radius is the distance to its hyperplane, which is also what
sigma Phi^-1(p) gives for the true p: a radius above the distance is an error of the certificate, and of nothing else.
"""

import numpy as np
import pytest
from scipy import stats

from rush_bench.certificates.bounds import best_bound, certificate, lower_bound
from rush_bench.certificates.sampling import Plan, Sampling, estimate, make_plan
from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Uniform

SIGMA = 0.25
THEOREM = certificate(Gaussian(SIGMA), None, 3072)
REPETITIONS = 2000
DISTANCES = (0.02, 0.1, 0.25, 0.5)  # p = 0.53, 0.66, 0.84, 0.977
RADII = (0.0, 0.09, 0.11, 0.24, 0.45)


def binomial(p, seed: int = 0):
    """`draw` of images that get class 1 of 2 with probabilities p (n,)."""
    rng, p = np.random.default_rng(seed), np.asarray(p)

    def draw(rows, first, count):
        right = rng.binomial(count, p[rows])
        return np.stack([count - right, right], axis=1)

    return draw


def errors(settings: Sampling, distance: float, plan: Plan | None = None) -> int:
    """How many of 2,000 independent certificates of one image claim more than the truth."""
    p = np.full(REPETITIONS, stats.norm.cdf(distance / SIGMA))
    plan = plan or make_plan(settings, THEOREM)
    found = estimate(plan, np.ones(REPETITIONS, np.int64), 2, binomial(p), settings.give_up_level)
    return int((THEOREM.radius(found.bound) > distance).sum())


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("mode", "radii"), [("fixed", ()), ("staged", RADII), ("staged", ()), ("target", (0.11,)), ("target", (0.24,))]
)
def test_error_rate_is_at_most_alpha(mode, radii, distance: float, alpha: float) -> None:
    settings = Sampling(mode, draws=20_000, alpha=alpha, radii=radii)
    # With the rate alpha, more errors than this have a chance of 1e-6.
    assert errors(settings, distance) <= stats.binom.isf(1e-6, REPETITIONS, alpha)


def test_fixed_uses_its_error_and_a_staged_plan_without_a_split_would_exceed_it() -> None:
    # Both show that the test above can fail: the bound is nearly attained, and peeking at full alpha goes over it.
    assert errors(Sampling("fixed", draws=20_000, alpha=0.05), 0.1) > 0.6 * 0.05 * REPETITIONS
    settings = Sampling("staged", draws=20_000, alpha=0.05, radii=(0.4,), give_up_level=1e-9)
    honest = make_plan(settings, THEOREM)
    peeking = Plan(honest.looks, tuple(0.05 for _ in honest.looks), (0.99,), (0.0,))
    assert errors(settings, 0.1, peeking) > stats.binom.isf(1e-6, REPETITIONS, 0.05)


@pytest.mark.parametrize("mode", ["staged", "target"])
def test_shares_of_alpha_add_up_and_the_last_look_is_at_all_draws(mode) -> None:
    plan = make_plan(Sampling(mode, alpha=0.001, radii=(0.25,)), THEOREM)
    assert sum(plan.alphas) == pytest.approx(0.001)
    assert plan.looks[-1] == 100_000
    assert np.all(np.diff(plan.looks) > 0)


def test_staged_loses_little_where_it_settles_and_saves_most_draws() -> None:
    rng = np.random.default_rng(3)
    z = rng.uniform(-0.5, 4.5, 4000)  # as the radii of Cohen's CIFAR-10 networks spread: over some 4 sigma
    p = stats.norm.cdf(z)
    selected = np.ones(len(p), np.int64)
    fixed = estimate(make_plan(Sampling("fixed"), THEOREM), selected, 2, binomial(p, 1))
    settings = Sampling("staged", radii=(0.0, 0.25, 0.5))
    staged = estimate(make_plan(settings, THEOREM), selected, 2, binomial(p, 2), settings.give_up_level)
    for radius in settings.radii:
        at = THEOREM.probability(radius)
        assert abs((fixed.bound >= at).mean() - (staged.bound >= at).mean()) <= 0.005
    assert fixed.used.sum() / staged.used.sum() > 15


def test_target_stops_as_soon_as_it_is_decided() -> None:
    settings = Sampling("target", radii=(0.25,))  # needs p = 0.841
    plan = make_plan(settings, THEOREM)
    p = np.array([0.3, 0.6, 0.843, 0.9, 1.0])
    found = estimate(plan, np.ones(5, np.int64), 2, binomial(p), settings.give_up_level)
    assert (found.bound >= plan.wanted[0]).tolist()[3:] == [True, True]
    assert not (found.bound >= plan.wanted[0])[:2].any()
    assert found.used[0] == found.used[1] == found.used[4] == plan.looks[0]
    assert found.used[2] > 50 * plan.looks[0] and found.used[3] < 5000


def test_draws_are_asked_for_once_each_and_in_order() -> None:
    asked: dict[int, list[int]] = {k: [] for k in range(3)}

    def draw(rows, first, count):
        for row in rows:
            asked[int(row)] += range(first, first + count)
        return np.stack([np.full(len(rows), count), np.zeros(len(rows), int)], axis=1)

    plan = make_plan(Sampling("staged", draws=1000, radii=(0.0, 0.5)), THEOREM)
    found = estimate(plan, np.array([0, 1, 0]), 2, draw)
    assert all(asked[k] == list(range(found.used[k])) for k in asked)
    assert found.counts.sum(1).tolist() == found.used.tolist()
    assert found.bound[1] == 0 and found.used[1] < found.used[0]


def test_the_bound_is_the_best_of_the_looks_at_their_own_alpha() -> None:
    plan = Plan((100, 400), (0.01, 0.02), (0.99,), (0.0,))
    answers = iter([np.array([[0, 100]]), np.array([[150, 150]])])
    found = estimate(plan, np.array([1]), 2, lambda rows, first, count: next(answers))
    assert found.bound[0] == lower_bound(100, 100, 0.01) > lower_bound(250, 400, 0.02)


def test_unreachable_radii_hold_no_image_up() -> None:
    plan = make_plan(Sampling("staged", draws=1000, radii=(0.1, 5.0)), THEOREM)
    assert plan.settled == (0.1,)


def test_a_target_at_the_very_largest_radius_is_reached_when_all_draws_agree() -> None:
    plan = make_plan(Sampling("target", draws=1000, radii=(0.1,)), THEOREM)
    largest = THEOREM.largest(1000, plan.alphas[-1])
    plan = make_plan(Sampling("target", draws=1000, radii=(largest,)), THEOREM)
    found = estimate(plan, np.array([1]), 2, binomial([1.0]))
    assert found.used[0] == 1000 and found.bound[0] >= plan.wanted[0] * (1 - 1e-12)
    assert found.bound[0] == pytest.approx(best_bound(1000, plan.alphas[-1]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "stagd"}, "did you mean 'staged'"),
        ({"alpha": 0.0}, "alpha=0.0 must be a finite number, above 0 and below 1"),
        ({"alpha": 1.0}, "above 0 and below 1"),
        ({"alpha": 0.5}, r"may be wrong for one image in 2 certifies nothing; .*below 0\.5; 0\.001 is usual"),
        ({"alpha": 0.9, "mode": "staged"}, "alpha = 0.9: .* certifies nothing"),
        ({"give_up_level": 2.0}, "give_up_level"),
        ({"give_up_level": 0.4}, "leave give_up_level out"),
        ({"draws": 0}, "draws"),
        ({"selection": 0}, "selection"),
        ({"radii": (-0.1,)}, "radii=.-0.1,. must be a list, each a finite number, at least 0"),
        ({"radii": (float("nan"),)}, "radii=.nan,. must be a list, each a finite number"),
        ({"draws": 9}, "9 draws at alpha = 0.001 certify nothing, not even if all agree; raise --draws to 10 or more"),
        ({"mode": "staged", "draws": 9}, "certify nothing"),
        ({"mode": "target"}, "give one --radius"),
        ({"mode": "target", "radii": (0.1, 0.2)}, "give one --radius"),
    ],
)
def test_bad_settings_name_the_fix(settings: dict, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Sampling(**settings)


def test_a_target_out_of_reach_is_refused_with_the_largest_radius() -> None:
    with pytest.raises(BadInput, match=r"certify radii up to 0\.299\d+ in mode target, not 0\.5; raise --draws"):
        make_plan(Sampling("target", radii=(0.5,)), certificate(Uniform(0.3), None, 3072))
