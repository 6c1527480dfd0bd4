"""Rows through the network for one image: what `Attack.passes` is made of."""

from rush_bench.defenses import Defense


def prediction_rows(defense: Defense) -> int:
    """Rows of one prediction of one image: the votes, the draws of a bank, or 1."""
    return defense.draws or getattr(defense, "size", 1)


def judging_rows(defense: Defense, draws: int) -> int:
    """Rows to judge one point on at least `draws` draws, in whole predictions; one prediction where it is deterministic."""
    return prediction_rows(defense) if defense.deterministic else -(-draws // defense.draws) * defense.draws


def gradient_rows(defense: Defense, draws: int, loss: str) -> tuple[int, int]:
    """Rows forward and backward of one `Defense.gradient` of one image."""
    rows = prediction_rows(defense) if defense.deterministic else draws
    name, _, how = loss.partition("@")
    geometric = how == "logits" or (not how and getattr(getattr(defense, "how", None), "geometric", False))
    # draws that do not fit in memory go forward twice, unless a running sum does; see `_Network.gradient`
    once = rows <= _room(defense) or (name == "ce" and not geometric)
    return rows * (1 if once else 2), rows


def at_once(defense: Defense) -> int:
    """Images whose backward pass through `as_module(defense)` fits in the memory budget: no draw goes forward twice."""
    return max(1, int(min(_room(defense) / prediction_rows(defense), 2**31)))


def module_rows(defense: Defense, batch: int = 1) -> tuple[int, int]:
    """Rows forward again and backward of one backward pass through `as_module(defense)`, of one image of the batch.

    A batch that does not fit in memory saves nothing, and the backward pass computes each block once more; 1 where whoever
    calls the module cuts batches to what fits (`at_once`).
    """
    rows = prediction_rows(defense)
    return (rows if batch * rows > _room(defense) else 0), rows


def _room(defense: Defense) -> float:
    body = getattr(defense, "body", None)  # a defence of one's own says nothing of its memory
    return body.rows if body is not None else float("inf")
