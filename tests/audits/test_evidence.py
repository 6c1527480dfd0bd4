"""Evidence picks the right trials: itself, at its threat, finished."""

import numpy as np
import pytest

from rush_bench.audits.evidence import entries_of
from rush_bench.records.statistics import clopper_pearson


def test_its_own_are_attacks_on_itself_at_its_threat_that_are_finished(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    own = [entry("T1", "m=1", share(0.5)), entry("T10", "1 eps", share(0.5), scale=1.0)]
    others = [
        entry("T10", "2 eps", share(0.1), scale=2.0),
        entry("T13", "1 votes", share(0.1), on="votes=1"),
        entry("T12", "l2 0.4", share(0.1), norm="l2", other_threat=True),
        entry("T10", "0", share(0.1), attack="clean"),
        entry("T11", "worst case over all", share(0.1), attack="worst"),
        entry("T4", "CE", share(0.1), complete=False),
    ]
    assert list(made_by_hand.evidence(*own, *others).own()) == own


def test_worst_clean_and_complete(made_by_hand) -> None:
    entry, share = made_by_hand.entry, made_by_hand.share
    clean, least = (
        entry("T10", "0", share(0.9), attack="clean"),
        entry("T11", "worst case over all", share(0.2), attack="worst"),
    )
    last = entry("T15", "worst case over all", share(0.3), attack="worst")
    curve = entry("T10", "0.5 eps", share(0.5))
    evidence = made_by_hand.evidence(curve, clean, least, last)
    assert (evidence.worst, evidence.clean, evidence.complete) == (least, clean, True)
    assert made_by_hand.evidence(curve, last).worst == last and made_by_hand.evidence(curve).clean is None
    assert made_by_hand.evidence().worst is None
    half = entry("T10", "0", share(0.9), complete=False)
    assert made_by_hand.evidence(curve, half).clean is None and not made_by_hand.evidence(curve, half).complete


def test_numbers_of_an_entry(made_by_hand) -> None:
    one = made_by_hand.entry("T1", "m=1", made_by_hand.share(0.3), votes=0)
    assert one.estimate == pytest.approx((0.3, *clopper_pearson(30, 100)))
    assert one.any_of(10) is None and one.other("bank") is None
    two = made_by_hand.entry("T1", "m=4", np.full(40, 3), 4)
    assert two.rates == pytest.approx(0.75)
    # of four predictions one is wrong: two of them are both right in 3 of 6 choices
    assert two.any_of(2).value == pytest.approx(0.5) and two.any_of(5) is None
    assert two.minus(made_by_hand.entry("T1", "m=16", np.full(40, 2), 4)).value == pytest.approx(0.25)


def test_entries_come_in_the_order_of_experiments_and_the_plan(made_by_hand) -> None:
    rows = [("T10", "1 eps", 7), ("T2", "b", 4), ("T2", "a", 3), ("T1", "m=1", 1)]
    results = [made_by_hand.entry(e, t, made_by_hand.share(0.5), order=order).result for e, t, order in rows]
    strange = made_by_hand.entry("T99", "x", made_by_hand.share(0.5)).result
    found = entries_of([*results, strange])
    assert [(e.experiment, e.trial) for e in found] == [("T1", "m=1"), ("T2", "a"), ("T2", "b"), ("T10", "1 eps")]
