import numpy as np
import pytest

from rush_bench.datasets.splits import hold_out, ranked
from rush_bench.errors import BadInput

BALANCED = np.repeat(np.arange(10), 60)
SKEWED = np.random.RandomState(1).choice(4, 400, p=[0.6, 0.3, 0.08, 0.02])
PINNED = [315, 122, 85, 434, 283, 526, 400, 569, 48, 224, 346, 162]  # with seed 0: it must never change


@pytest.mark.parametrize("labels", [BALANCED, SKEWED], ids=["balanced", "skewed"])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_beginning_is_stratified(labels: np.ndarray, seed: int) -> None:
    order = ranked(labels, len(labels), seed)
    assert sorted(order) == list(range(len(labels)))
    share = np.bincount(labels) / len(labels)
    for n in range(1, len(labels) + 1):
        assert np.abs(np.bincount(labels[order[:n]], minlength=len(share)) - n * share).max() <= 1


def test_a_subset_is_random_and_fixed_for_ever() -> None:
    assert ranked(BALANCED, 600, 0)[:12].tolist() == PINNED
    assert ranked(BALANCED, 600, 0)[:100].tolist() != ranked(BALANCED, 600, 1)[:100].tolist()
    # Each image of a class is as likely to be taken: 400 seeds, 1 of 60 images a class.
    hits = np.bincount([row for seed in range(400) for row in ranked(BALANCED, 600, seed)[:10]], minlength=600)
    assert hits.sum() == 4000 and ((hits - 400 / 60) ** 2 / (400 / 60)).sum() < 600 + 4.5 * np.sqrt(2 * 600)


def test_leaving_images_out_keeps_the_order_of_the_others() -> None:
    out = np.array([3, 77, 400])
    kept = ranked(None, 600, 0, leave_out=out)
    assert kept.tolist() == [row for row in ranked(None, 600, 0) if row not in out]
    assert sorted(ranked(BALANCED, 600, 0, leave_out=out)) == sorted(set(range(600)) - set(out))


def test_an_image_left_out_makes_room_for_the_next_of_its_class() -> None:
    out = ranked(BALANCED, 600, 0)[[4, 31, 32]]
    without = ranked(BALANCED, 600, 0, leave_out=out)
    assert np.bincount(BALANCED[without[:100]]).tolist() == [10] * 10
    same = ~np.isin(BALANCED, BALANCED[out])  # classes of which nothing is missing
    assert [r for r in without if same[r]] == [r for r in ranked(BALANCED, 600, 0) if same[r]]
    assert len(set(ranked(BALANCED, 600, 0)[:100]) - set(without[:100])) == 3


def test_without_labels_the_order_is_random() -> None:
    assert sorted(ranked(None, 50, 3)) == list(range(50)) != ranked(None, 50, 3).tolist()


def test_hold_out_is_a_stratified_tenth_without_stand_ins() -> None:
    stand_ins = ranked(BALANCED, 600, 0)[:5]  # exactly those that would come first
    training, validation = hold_out(BALANCED, stand_ins)
    assert len(validation) == 60 and np.bincount(BALANCED[validation]).tolist() == [6] * 10
    assert sorted([*training, *validation]) == list(range(600))
    assert not set(validation) & set(stand_ins) and set(stand_ins) <= set(training)


def test_bad_seed_and_too_few_images() -> None:
    with pytest.raises(BadInput, match="seed -1"):
        ranked(None, 5, -1)
    with pytest.raises(BadInput, match="at least 2"):
        hold_out(np.zeros(1, np.int64), np.empty(0, np.int64))
