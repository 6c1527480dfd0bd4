"""Objectives, as pure functions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(u: Tensor, v: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy of B pairs (Chen et al. 2020a, eq. 1; RUSH paper eq. 11's L_pre).

    u, v: projections (B, D) of the two views, of any length (they are normalised here). For each of the 2B anchors:
    cross-entropy over the 2B - 1 other vectors with logits cos / temperature and the paired view as target; mean of 2B.
    Scalar, at least float32.
    """
    # bfloat16 cosines at temperature 0.5 would lose the third digit of the loss: leave autocast here.
    with torch.autocast(u.device.type, enabled=False):
        z = torch.cat([u, v])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        logits = z @ z.T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        target = torch.arange(len(z), device=z.device).roll(len(u))
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), target)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(q) from softmax(p), KL(p || q), for logits (B, K): (B,), at least float32."""
    p, q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(1) for x in (p, q))
    return (p.exp() * (p - q)).sum(1)


def cross_entropy_to(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K) to target probabilities (B, K): (B,), at least float32."""
    return -(targets * logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)).sum(1)


def trades(clean: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta KL(p(x) || p(x')), batch mean (Zhang et al. 2019, eq. 5; sources S2.16). Scalar.

    clean, attacked: logits (B, K) of x and x'. labels: classes (B,) or target probabilities (B, K). The divergence is
    from the clean prediction, as in TRADES' code and Rebuffi's; gradients flow through both.
    """
    clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
    return F.cross_entropy(clean, labels) + beta * kl(clean, attacked).mean()


def multi_view(views: Sequence[Tensor], temperature: float, detach_keys: bool = False) -> Tensor:
    """Contrastive loss of V views of B images in the supervised-contrastive form (Khosla et al. 2020, eq. 2, L_out).

    views: V projections (B, D), of any length. For each of the VB anchors: the mean, over the V - 1 other views of its
    image, of the cross-entropy over the VB - 1 other vectors with logits cos / temperature; mean of VB. V = 2 is
    `nt_xent`. detach_keys: no gradient through the second factor of a cosine (RoCL's code, sources S2.5). Scalar.
    """
    with torch.autocast(views[0].device.type, enabled=False):
        z = torch.cat(list(views))
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        logits = z @ (z.detach() if detach_keys else z).T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = logits.masked_fill(itself, -torch.inf).log_softmax(1)
        batch = len(views[0])
        positives = [log_p.roll(-shift * batch, 1).diagonal() for shift in range(1, len(views))]
        return -torch.stack(positives).mean()


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """The mean cosine of rows of u and v (B, D), at least float32. Scalar."""
    with torch.autocast(u.device.type, enabled=False):
        u, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (u, v))
        return F.cosine_similarity(u, v, dim=1).mean()
