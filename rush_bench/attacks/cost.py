"""Rows through the network for one image: what `Attack.passes` is made of.

Formulas, held to what runs count by tests/attacks/test_passes.py: a dry run on a stub is as exact, but takes a minute of a CPU
for `aa` and `square` (one image, 5000 queries), and a plan prices a hundred trials before it starts.
"""

from rush_bench.defenses import Defense
from rush_bench.defenses.smoothed import SEEN


def prediction_rows(defense: Defense) -> int:
    """Rows of one prediction of one image: the votes, the draws of a bank, or 1; times the steps of a purifier and 1."""
    return _draws(defense) * (1 + _chain(defense)[0])


def judging_rows(defense: Defense, draws: int) -> int:
    """Rows to judge one point on at least `draws` draws, in whole predictions; one prediction where it is deterministic."""
    return prediction_rows(defense) if defense.deterministic else -(-draws // defense.draws) * prediction_rows(defense)


def gradient_rows(defense: Defense, draws: int, loss: str) -> tuple[int, int]:
    """Rows forward and backward of one `Defense.gradient` of one image."""
    rows = _draws(defense) if defense.deterministic else draws
    name, _, averaging = loss.partition("@")
    geometric = averaging == "logits" or (not averaging and getattr(getattr(defense, "averaging", None), "geometric", False))
    # draws that do not fit in memory go forward twice, unless a running sum does; see `Network.gradient`
    once = rows <= _room(defense) or (name == "ce" and not geometric)
    there, again, back = _chain(defense)
    return rows * ((1 if once else 2) * (1 + there) + again), rows * (1 + back)


def climbing_rows(defense: Defense) -> int:
    """Rows of `Defense.to_climb` for one image."""
    return prediction_rows(defense) if defense.deterministic else SEEN * (1 + _chain(defense)[0])


def at_once(defense: Defense) -> int:
    """Images whose backward pass through `as_module(defense)` fits in the memory budget: no draw goes forward twice."""
    return max(1, int(min(_room(defense) / prediction_rows(defense), 2**31)))


def module_rows(defense: Defense, batch: int = 1) -> tuple[int, int]:
    """Rows forward again and backward of one backward pass through `as_module(defense)`, of one image of the batch.

    A batch that does not fit in memory saves nothing, and the backward pass computes each block once more; 1 where the caller
    of the module cuts batches to what fits (`at_once`).
    """
    rows = _draws(defense)
    there, again, back = _chain(defense)
    return rows * (again + (1 + there if batch * rows > _room(defense) else 0)), rows * (1 + back)


def _draws(defense: Defense) -> int:
    return getattr(defense, "averaged", defense.draws or 1)


def _chain(defense: Defense) -> tuple[int, int, int]:
    """Rows through the steps of a purifier for one draw: forward, again on the way back, back; none without one."""
    return getattr(getattr(defense, "transform", None), "rows", (0, 0, 0))


def _room(defense: Defense) -> float:
    body = getattr(defense, "body", None)  # a custom defence says nothing of its memory
    return body.rows if body is not None else float("inf")
