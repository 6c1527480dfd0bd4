"""Which images make a split or a subset: pure functions of labels and a seed, the same on every machine for ever.

The numbers come from numpy's RandomState, whose stream is frozen (Generator's may change between versions of numpy).
"""

import numpy as np

from rush_bench.errors import BadInput

HOLD_OUT = 0.1  # of the official training set: 5,000 of CIFAR's 50,000 and 500 of STL-10's 5,000 (sources S1.6)
HOLD_OUT_SEED = 0


def ranked(labels: np.ndarray | None, count: int, seed: int, leave_out: np.ndarray | None = None) -> np.ndarray:
    """All positions 0..count-1 in an order whose every prefix is a stratified random subset; int64 (count - left out,).

    A class with the share s of all images has s * n of the first n, to within one image. Without labels the order is
    simply random. Positions in `leave_out` make room for the next of their class; nothing else moves (up to the end of
    the order, where that class runs out).
    """
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed {seed} must be between 0 and 2^32 - 1")
    random = np.random.RandomState(seed)
    order = random.permutation(count)
    if leave_out is not None and len(leave_out):
        order = order[~np.isin(order, leave_out)]
    if labels is None:
        return order
    kinds, kind, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    kind = kind[order]
    # Position within the class: a stable sort by class lists each class in drawn order, one after the other.
    by_class, left = np.argsort(kind, kind="stable"), np.bincount(kind, minlength=len(kinds))
    within = np.empty(len(order), np.int64)
    within[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(left) - left, left)
    # The k-th image of a class comes when the share (k + 1/2) / size is reached; equal shares go by class, reshuffled.
    share = (within + 0.5) / sizes[kind]
    return order[np.lexsort((random.permutation(len(kinds))[kind], share))]


def hold_out(labels: np.ndarray, stand_ins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (training, validation) of an official training set, each in ascending order.

    Validation is a tenth, stratified, always the same, free of stand-ins; all the rest is training.
    """
    count = len(labels)
    if count < 2:
        raise BadInput(f"{count} training image cannot be split into training and validation; give at least 2")
    validation = np.sort(ranked(labels, count, HOLD_OUT_SEED, stand_ins)[: max(1, round(HOLD_OUT * count))])
    return np.setdiff1d(np.arange(count), validation), validation
