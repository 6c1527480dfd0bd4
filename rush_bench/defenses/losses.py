"""What an attack raises: losses of log-probabilities (B, K), a value per image (B,)."""

from collections.abc import Callable

import torch
from torch import Tensor


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-log p_y; scores (B, K) are log-probabilities, so that this is eq. 7 of the RUSH paper. Returns (B,)."""
    return -scores.gather(1, labels[:, None])[:, 0]


def against(scores: Tensor, labels: Tensor) -> Tensor:
    """Log of the odds against the label, log (1 - p_y) / p_y, from log-probabilities (..., K); labels (...), as the result.

    CE is its softplus, so that both rise in the same direction, but its slope never fades where p_y is near 1.
    """
    true = scores.gather(-1, labels[..., None])[..., 0]
    return scores.scatter(-1, labels[..., None], -torch.inf).logsumexp(-1) - true


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Best other score minus the true one (Carlini and Wagner 2017), positive where the attack has won. Returns (B,)."""
    true = scores.gather(1, labels[:, None])[:, 0]
    return scores.scatter(1, labels[:, None], -torch.inf).max(1).values - true


def dlr(scores: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6); of two classes the margin. Returns (B,)."""
    if scores.shape[1] < 3:
        return margin(scores, labels)
    ordered = scores.sort(1, descending=True).values
    return margin(scores, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def margin_to(scores: Tensor, labels: Tensor) -> Tensor:
    """The target's score minus the true one; labels (B, 2) hold the true class and the target. Returns (B,)."""
    picked = scores.gather(1, labels)
    return picked[:, 1] - picked[:, 0]


def dlr_to(scores: Tensor, labels: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein 2020, eq. 7); of fewer than four classes the margin. Returns (B,)."""
    if scores.shape[1] < 4:
        return margin_to(scores, labels)
    ordered = scores.sort(1, descending=True).values
    return margin_to(scores, labels) / (ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]) + 1e-12)


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED: dict[str, Loss] = {"margin-to": margin_to, "dlr-to": dlr_to}
