"""What a network must do to become a defence: return logits, one row per image, of that image alone.

Every refusal is a BadInput that names the way out. The images asked with differ in brightness and grain, so that a mean
over the batch shows; they stay inside (0,1), since a network that is not finite at an edge is refused where it is used.
Beside them it is asked what real images have, pixels of exactly 0 and 1 and noise beyond them, whether finite or not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.defenses.draws import depends, remembers, sources
from rush_bench.defenses.owner import exported, half_precision
from rush_bench.errors import BadInput
from rush_bench.noise import Stream

if TYPE_CHECKING:
    from rush_bench.defenses.body import Body

SHAPE = (3, 32, 32)  # of an image, unless another is given
ROWS, EDGES = 5, 3
LARGEST = 128  # rows of the largest batch that is tried, where 64 MB hold them
Ask = Callable[[Tensor], Tensor]


def shape_hint(shape: tuple[int, ...]) -> str:
    """What a refusal of images of the default shape adds: the user may not have named that of the images."""
    return f"; name the shape of your images: shape=images.shape (default {SHAPE})" if tuple(shape) == SHAPE else ""


def images_like(shape: tuple[int, ...], device: torch.device | str, count: int = ROWS) -> Tensor:
    """Images (count, C, H, W) strictly inside (0,1): smooth to noisy, bright to dark; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(count, shape[0], 2, 2, generator=generator), shape[1:], mode="bilinear")
    noise = torch.rand(count, *shape, generator=generator)
    grain, power = (torch.linspace(*ends, count)[:, None, None, None] for ends in ((0.1, 1.0), (0.4, 2.5)))
    return (0.05 + 0.9 * ((1 - grain) * smooth + grain * noise) ** power).to(device)


def edges_like(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Images (3, C, H, W) with pixels of exactly 0 and 1: one of strong contrast, one mostly white, one mostly black."""
    first = images_like(shape, "cpu")[2]
    ranks = first.flatten().argsort().argsort().view_as(first) / max(first.numel() - 1, 1)
    return torch.stack([((ranks - middle) * 2.5 + 0.5).clamp(0, 1) for middle in (0.5, 0.1, 0.9)]).to(device)


def more_rows(body: Body, batch: Tensor, count: int) -> Tensor:
    """Rows (count, C', H', W') at the edges of what a defence hands its network: `edges_like`, with noise where it has some."""
    edges = edges_like(body.shape, body.device)
    rows = body.before(edges)
    if body.noise is not None:
        drawn = Stream(0, "probe").noise(body.noise, count, 1, body.shape, body.device)[:, 0]
        rows = torch.cat([rows[:1], edges[(torch.arange(count - 1) % 2 + 1).to(edges.device)] + drawn[1:]])
    return rows[torch.arange(count).to(rows.device) % len(rows)].to(batch)


def rows_for(shape: tuple[int, ...], device: torch.device, before: Callable[[Tensor], Tensor]) -> Tensor:
    """What a defence hands the network for these images, (5, C', H', W')."""
    with torch.no_grad():
        return before(images_like(shape, device))


def check_outputs(body: Body, batch: Tensor, shape: tuple[int, ...]) -> None:
    """Find the number of classes; BadInput where the network returns anything but finite logits (B, classes)."""
    try:
        with torch.no_grad():
            out: Any = body.outputs_of(body.network, batch)
    except Exception as error:  # anybody's code
        if half_precision(body.network):
            raise BadInput(f"the network's weights have 16 bits and float32 judges; give network.float() ({error})") from error
        fix = "; export it with dynamic_shapes=({0: torch.export.Dim.AUTO},), for batches of any size"
        fix = fix if exported(body.network) else shape_hint(shape)
        raise BadInput(f"the network does not take images of shape {shape}: {type(error).__name__}: {error}{fix}") from error
    if not isinstance(out, Tensor):
        picked = "['logits']" if isinstance(out, dict) else "[0]"
        raise BadInput(
            f"the network must return logits (B, classes), not a {type(out).__name__}; wrap it in a module whose forward "
            f"returns these alone, as in self.network(x){picked}"
        )
    if out.ndim == 1 or (out.ndim == 2 and out.shape[1] == 1):
        raise BadInput(
            "the network returns one number per image where logits (B, classes) are meant; for two classes let its forward "
            "return torch.cat([torch.zeros_like(z), z], 1), z (B, 1)"
        )
    if out.ndim > 2 and out.shape[2:].numel() == 1 and len(out) == len(batch):
        raise BadInput(f"the network must return logits (B, classes), not {tuple(out.shape)}; end its forward in .flatten(1)")
    if out.ndim != 2 or len(out) != len(batch):
        raise BadInput(f"the network must return logits (B, classes), not {tuple(out.shape)} for {len(batch)} images")
    if not out.isfinite().all():
        masked = not (out.isnan() | (out == torch.inf)).any() and out.isfinite().any(1).all()
        fix = "mask a class with -1e4, not with -inf" if masked else "look at its weights"
        raise BadInput(f"the network returns values that are not finite; {fix}")
    looks = bool((out >= 0).all() and (out.sum(1) - 1).abs().max() < 1e-4)
    if looks and body.outputs == "logits":
        raise BadInput(
            "the network returns probabilities where logits are meant, which flattens gradients; "
            'return logits, or say outputs="probabilities"'
        )
    if not looks and body.outputs == "probabilities":
        raise BadInput('outputs="probabilities" was said, but the rows that the network returns do not sum to 1')
    if not looks and (ends := squashed(out)):
        raise BadInput(
            f"the network's outputs crowd at {ends[0]} and 1, as after a {ends[1]}, where gradients vanish; "
            f"return what goes into the {ends[1]}: the order of the classes is the same"
        )
    body.classes = out.shape[1]
    with torch.no_grad():
        asking(body)(batch[:1])


@torch.no_grad()
def check_first_call(body: Body, other: nn.Module, batch: Tensor) -> None:
    """Refuse a network whose first call decides what it computes: constants would be those of our probes. `other` is a copy of
    it that was never called; where it cannot be copied it is the network itself, and nothing is found."""
    body.outputs_of(other, 0.5 * batch[:2])
    if differ(body.outputs_of(body.network, batch), body.outputs_of(other, batch)):
        raise BadInput(
            "the network's first call decides what it computes (the mean of its first batch, say, or a mask that is drawn "
            "then), so that it would be measured with constants of our probes; call it once on a batch of your own images first"
        )


def squashed(out: Tensor) -> tuple[int, str] | None:
    """The lower bound (the upper is 1) and the name of a function that outputs (B, K) went through: half of them are at its
    bounds, and some class is at one bound for an image and at the other for another."""
    for low, name in ((0, "sigmoid"), (-1, "tanh")):
        place = (out - low) / (1 - low)
        bottom, top = place < 0.02, place > 0.98
        within = place.min() >= 0 and place.max() <= 1
        if within and (bottom | top).float().mean() >= 0.5 and (bottom.any(0) & top.any(0)).any():
            return low, name
    return None


@torch.no_grad()
def check_function(body: Body, batch: Tensor) -> None:
    """Refuse a network that is no function of the image: it draws, or looks at its batch, its calls or at who asks."""
    ask, inner = asking(body), batch
    batch = torch.cat([inner, more_rows(body, inner, EDGES)])
    try:
        drawn = sources(body, batch, ask)
    except BadInput:
        check_edges(body, batch)
        raise
    first = drawn.outputs
    moves = apart(first, ask(batch))
    if moves and not drawn and remembers(body, batch, asking):
        raise BadInput(
            "the network changes from call to call: the same images gave other logits at each, without a draw; take "
            "what it remembers of earlier calls out"
        )
    if moves or (drawn and depends(body, batch, ask, drawn, apart)):
        raise BadInput(
            "the network draws at random: the same images gave other logits at each call; declare it, as in "
            "Randomised(network, votes=1, shape=(C, H, W)), which the function of --model may return too, or take its "
            "randomness out"
        )
    if apart(first, _with_gradient(body, batch)):
        raise BadInput(
            "the network answers otherwise while gradients are recorded, so that an attack would see another network than the "
            "one that is judged; take torch.is_grad_enabled() and requires_grad out of its forward"
        )
    large = max(ROWS, min(LARGEST, body.rows_of(2**26)))
    crowd = None if body.noise is None else more_rows(body, inner, large // 2)
    company = in_company(ask, batch, large, crowd)
    # what moves a little at each call has gone far after an attack's thousands
    if apart(first, ask(batch)) or drifts(body, lambda exact: asking(exact)(inner)):
        raise BadInput(
            "the network changes from call to call: the same images gave other logits later; take what it remembers of "
            "earlier calls out"
        )
    if company:
        try:  # rounding differs from batch to batch; in float64 a hundred million times less
            company = in_company(asking(in_float64(body)), batch, large, crowd)
        except Exception:  # it does not run in float64
            company = True
        if company:
            raise BadInput(
                "the network's logits for an image depend on the other images of its batch, on their number or on its place "
                "among them; make them a function of the image alone: a mean over the batch, for one, becomes a constant"
            )


def check_edges(body: Body, batch: Tensor) -> None:
    """Refuse a network that fails on pixels of exactly 0 and 1, or outside [0,1] where noise puts them."""
    try:
        body.outputs_of(body.network, batch[ROWS:])
    except Exception as error:  # anybody's code
        fix = "noisy copies are not clipped, so take any check of their range out of its forward, or clamp them in it"
        raise BadInput(
            f"the network fails on images with pixels of exactly 0 and 1: {type(error).__name__}: {error}"
            if body.noise is None
            else f"the network fails on pixels outside [0,1]: {type(error).__name__}: {error}; {fix}"
        ) from error


def in_float64(body: Body) -> Body:
    """The same body with a network of float64."""
    if isinstance(body.network, torch.jit.ScriptModule) and not body.network.state_dict():
        raise TypeError("the weights of frozen TorchScript are constants, and torch ends the process where types are mixed")
    exact = copy.copy(body)
    exact.network, exact.dtype = copy.deepcopy(body.network).double(), torch.float64
    return exact


def drifts(body: Body, ask: Callable[[Body], Tensor]) -> bool:
    """Whether calls with other images leave `ask(body)` (R, K) other than it was, in float64, where rounding is no cause."""
    try:
        exact = in_float64(body)
        first, images = ask(exact), images_like(body.shape, body.device, 2)
        for other in (0 * images, 0.3 * images, edges_like(body.shape, body.device)[:2]):
            _with_gradient(exact, exact.before(other))
        return not torch.equal(first, ask(exact))  # both rounded to float32
    except Exception:  # it does not run in float64
        return False


def in_company(ask: Ask, batch: Tensor, large: int, crowd: Tensor | None) -> bool:
    """Whether images (8, ...) get other logits alone than in company: other images, orders, numbers and positions.

    In the largest batch every second row is of a `crowd`, where there is one, so that what few noisy rows set off shows.
    """
    alone, count = torch.cat([ask(row) for row in batch.split(1)]), len(batch)
    many = (torch.arange(large) * 3 + 1) % count
    parts = [[0, 1, 2, 3, 4], [1, 3], [2, 0, 0], [3, 3, 3, 4, 0, 2, 1], list(range(count))[::-1]]
    if any(apart(alone[part], ask(batch[part]), torch.tensor(part) < ROWS) for part in parts):
        return True
    rows = batch[many]
    if crowd is not None:
        rows[1::2] = crowd[: len(rows[1::2])]
    every = slice(None, None, 1 if crowd is None else 2)
    return apart(alone[many][every], ask(rows)[every], (many < ROWS)[every])


def apart(first: Tensor, second: Tensor, inner: Tensor | None = None) -> bool:
    """Whether two outputs for the same rows differ: those strictly inside (0,1), the first five or `inner`, at their own scale
    and the others at theirs."""
    inner = torch.arange(len(first)) < ROWS if inner is None else inner
    return any(differ(first[which], second[which]) for which in (inner, ~inner) if which.any())


def asking(body: Body) -> Ask:
    """The network as a function of rows (R, C, H, W) that gives logits (R, K), or a BadInput."""

    def ask(batch: Tensor) -> Tensor:
        try:
            out = body.outputs_of(body.network, batch)
        except Exception as error:  # anybody's code
            raise BadInput(
                f"the network fails on a batch of {len(batch)}: {type(error).__name__}: {error}; it must take any number of "
                "images (squeeze() without its axis takes the batch of one away: squeeze(1))"
            ) from error
        if tuple(out.shape) != (len(batch), body.classes):
            raise BadInput(
                f"the network returns {tuple(out.shape)} for a batch of {len(batch)}; it must return logits (B, classes)"
            )
        return out

    return ask


def _with_gradient(body: Body, batch: Tensor) -> Tensor:
    with torch.enable_grad():
        return body.outputs_of(body.network, batch.detach().requires_grad_()).detach()


def fastest(body: Body, batch: Tensor) -> tuple[nn.Module, torch.memory_format]:
    """The first form with the network's outputs and gradients: folded and channels_last, one of these, the network itself.

    channels_last is the layout of the fast convolutions, on CUDA and in oneDNN alike; `view` after one may not take it.
    """
    known = _answer(body, body.network, batch, torch.contiguous_format)
    for make, layout in _forms(body.network):
        try:
            form = make().to(device=body.device)
            if layout == torch.channels_last:
                form = form.to(memory_format=layout)
            found = _answer(body, form, batch, layout)
        except Exception:  # it has no such form
            continue
        # a unit at its kink may take either slope, hence the wider bound on gradients
        if not differ(known[0], found[0]) and (known[1] - found[1]).norm() <= 1e-2 * known[1].norm():
            return form, layout
    return body.network, torch.contiguous_format


def _forms(network: nn.Module) -> Iterator[tuple[Callable[[], nn.Module], torch.memory_format]]:
    layouts = [torch.channels_last] if any(p.ndim == 4 for p in network.parameters()) else []
    if callable(folded := getattr(network, "folded", None)):
        yield from ((folded, layout) for layout in [*layouts, torch.contiguous_format])
    yield from ((lambda: copy.deepcopy(network), layout) for layout in layouts)


def _answer(body: Body, network: nn.Module, batch: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Logits (B, K), and the gradient in the rows of their sum with unequal weights."""
    with torch.enable_grad():
        x = batch.detach().requires_grad_()
        out = body.outputs_of(network, x, layout)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).cos().view_as(out)
        return out.detach(), gradient_of((weights * out).sum(), x)


def gradient_of(objective: Tensor, images: Tensor) -> Tensor:
    """The gradient in the images; BadInput where there is none."""
    gradient = None
    if objective.requires_grad:
        (gradient,) = torch.autograd.grad(objective, images, allow_unused=True)
    if gradient is None:
        raise BadInput(
            "no gradient reaches the images: the network detaches its input; pass a form of it that is differentiable, "
            "such as the identity in the backward pass of a step that has no gradient (BPDA)"
        )
    return gradient


def check_search(body: Body, images: Tensor) -> None:
    """Refuse a network that has no gradient in the images, or does not run in the precision of the search."""
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        try:
            objective = body.log_probabilities(body.before(x), exact=False)[:, 0].sum()
            gradient_of(objective, x)
        except BadInput:
            raise
        except Exception as error:  # anybody's code
            fix = "" if body.precision == "float32" else f"; it does not run in {body.precision}, give precision float32"
            raise BadInput(f"the network fails when its gradient is taken: {type(error).__name__}: {error}{fix}") from error


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs (B, K) for the same rows are further apart than rounding explains; two NaN are not."""
    if first.isfinite().logical_xor(second.isfinite()).any():
        return True
    first, second = first.nan_to_num(0, 0, 0), second.nan_to_num(0, 0, 0)
    size = max(float(first.abs().max()), float(second.abs().max()))
    spread = max(float((each - each.mean(-1, keepdim=True)).abs().max()) for each in (first, second))
    return bool((first - second).abs().max() > 1e-4 * spread + 1e-5 * size)
