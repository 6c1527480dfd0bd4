"""Networks that draw from torch's global generators: what can be asked of them, and whether the rows of a call share a draw."""

import torch
from torch import Tensor

from rush_bench.defenses import draws
from rush_bench.defenses.body import Body
from rush_bench.defenses.owner import own_generators
from rush_bench.defenses.probe import apart, asking, differ, drifts, edges_like, images_like
from rush_bench.errors import BadInput

CALLS, COPIES, SHUFFLES = 16, 64, 199


def seeded(body: Body, batch: Tensor, seed: int) -> Tensor:
    """What the network returns for rows (R, C, H, W), in float32, its draws decided by `seed`."""
    return draws.seeded(body, batch, seed, asking(body))


@torch.no_grad()
def check_draws(body: Body, shape: tuple[int, ...]) -> bool:
    """Whether the rows of a call share a draw, see `share_a_draw`.

    BadInput for a network whose draws a seed of torch's global generators does not decide, one that draws nothing, and one
    whose answer depends on its company, its calls, or on whether gradients are recorded. In a batch of another size the
    draws of an image are others; in one of the same size they are the same, and other neighbours must leave its answer be.
    """
    ask, inner = asking(body), images_like(shape, body.device)
    images = torch.cat([inner, edges_like(shape, body.device)])
    found, first = draws.sources(body, images, ask), seeded(body, images, 0)
    moves = any(apart(first, seeded(body, images, 0)) for _ in range(2))
    if moves and not found.elsewhere and draws.remembers(body, images, asking):
        raise BadInput(
            "the network changes from call to call: the same images and seed gave other logits at each; take what it remembers "
            "of earlier calls out"
        )
    if moves or (found.elsewhere and draws.depends_elsewhere(body, images, ask, apart)):
        raise BadInput(
            "the network draws from elsewhere than torch's global generator (numpy, random, a generator of its own), so "
            "its numbers could not be made again; draw with torch.rand and the like, or pass a transform that draws from "
            "its stream"
        )
    if not draws.depends(body, images, ask, found, other_at_all):
        raise BadInput(
            "the network draws nothing: other seeds gave the same logits; use Deterministic(network), or put the layers "
            "that are to draw in train mode, as in network.dropout.train()"
        )
    with torch.enable_grad():
        recorded = seeded(body, images.clone().requires_grad_(), 0).detach()
    if apart(first, recorded):
        raise BadInput(
            "the network answers otherwise while gradients are recorded, so that an attack would see another network than the "
            "one that is judged; take torch.is_grad_enabled() and requires_grad out of its forward"
        )
    if _in_company(body, images, ask) and not apart(first, seeded(body, images, 0)):  # what remembers its calls differs, too
        raise BadInput(
            "the network's logits for an image depend on the other images of its batch: the same draws gave others beside "
            "others; make them a function of the image and its draws"
        )
    shared = share_a_draw(body, shape)
    if apart(first, seeded(body, images, 0)) or drifts(body, lambda exact: seeded(exact, inner, 0)):
        raise BadInput(
            "the network changes from call to call: the same images and seed gave other logits later; take what it remembers "
            "of earlier calls out"
        )
    return shared


def _in_company(body: Body, images: Tensor, ask: draws.Ask) -> bool:
    """Whether the same draws give an image other logits beside other images."""
    for batches, row in (([[0, 1, 2], [0, 3, 4], [0, 5, 6]], 0), ([[1, 2, 0], [3, 4, 0]], 2)):
        answers, after = [], []
        for batch in batches:
            with own_generators(body.device, 0):
                answers.append(ask(images[batch])[row])
                after.append(torch.rand(8, device=body.device))
        others = list(zip(after[1:], answers[1:], strict=True))
        # other numbers left: draws that depend on the images, no verdict
        if any(torch.equal(after[0], left) and differ(answers[0], answer) for left, answer in others):
            return True
    return False


def other_at_all(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs are not equal to the bit, but for what is not a number."""
    return not torch.equal(first.nan_to_num(), second.nan_to_num())


@torch.no_grad()
def share_a_draw(body: Body, shape: tuple[int, ...]) -> bool:
    """Whether rows of one call share a draw, wholly or in part.

    Copies of one image in a call are independent draws if they do not. Then it does not matter which copy came from which
    call: the spread of the calls' means must be that of shuffled copies (a permutation test at 1 in 200; an error of this
    kind costs time alone, as draws are then made by separate calls).
    """
    image = images_like(shape, body.device)[2:3]
    copies = max(4, min(COPIES, body.rows_of(2**25)))
    repeated = image.expand(copies, -1, -1, -1)
    answers = torch.stack([seeded(body, repeated, seed) for seed in range(CALLS)]).double()
    if not any(differ(call, call[:1].expand_as(call)) for call in answers):
        return True
    pooled = answers.flatten(0, 1)
    pooled = (pooled - pooled.mean(0)) / pooled.std(0).clamp_min(1e-300)

    def spread(order: Tensor) -> float:
        return float(pooled[order].unflatten(0, (CALLS, copies)).mean(1).square().sum())

    generator = torch.Generator().manual_seed(0)
    shuffled = [spread(torch.randperm(len(pooled), generator=generator).to(pooled.device)) for _ in range(SHUFFLES)]
    return spread(torch.arange(len(pooled), device=pooled.device)) > max(shuffled)
