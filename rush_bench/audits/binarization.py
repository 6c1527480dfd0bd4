"""The binarization test (Zimmermann et al. 2022, section 4): can the attack find an adversarial point that surely is there?

The last layer with weights gives way to one that tells two kinds of points apart: inside the ball (class 0) and one point
on its edge (class 1). That point is an adversarial one for the image, by construction. An attack worth its name finds it or
another; where it does not, its failure against the defence itself says nothing. Every image has a layer of its own.

For a randomised defence a point is what most of its draws are: the layer is fitted to mean features over draws, and its
threshold lies below the median of the planted point and above those of the points inside, on the draws that judge later.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.base import Attack
from rush_bench.attacks.best import positions
from rush_bench.audits.finding import Finding, judged, not_run, within_chance
from rush_bench.defenses import Defense, Network
from rush_bench.defenses.body import Body, blocks, log_probabilities
from rush_bench.defenses.samplers import Fixed, Forward, Sampler
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream
from rush_bench.records.statistics import clopper_pearson
from rush_bench.threats import Threat

PAPER = "Zimmermann et al. 2022, section 4"
FEATURES = 2048  # at most, since a layer of each image's own is fitted to them
NO_STREAM = "each image of the binarization test has its own layer; take an attack that keeps the stream: eot-apgd"
INNER = 0.95  # inner points lie in a ball of this share of eps (the paper's gap of 5 %)


@dataclass(frozen=True)
class Binarization:
    """Settings. `inner` points per image, 0: 999 as in the paper, for a randomised defence 200 (a fifth, as each costs draws).

    Of a randomised defence `draws` a point serve the fit, `judging` the verdict. `closeness` is how near to the planted point
    the threshold lies on the way from the furthest inner point. `points` are those of the random attack.
    """

    inner: int = 0
    draws: int = 16
    judging: int = 256
    closeness: float = 0.99
    points: int = 100


# of 32 images of sound digits networks, undefended and adversarially trained, one restart leaves up to 3, five leave up to 1
ATTACK = EOTAPGD(steps=50, restarts=5, draws=16, select_draws=32)
# whose images seldom leave the search early, as success is half of the draws: one restart, at a fifth of the cost
RANDOMISED = EOTAPGD(steps=50, draws=16, select_draws=32, back=True)


def binarization(
    defense: Defense,
    images: Tensor,
    threat: Threat,
    stream: Stream,
    *,
    attack: Attack | None = None,
    settings: Binarization | None = None,
) -> list[Finding]:
    """The attack's success on binarized images (B, C, H, W), and that of random points, which must be low.

    `attack` is ATTACK unless given, or RANDOMISED for a defence that is. Images for which no layer tells the planted point
    from the others are left out, and counted in the note.
    """
    settings, what = settings or Binarization(), "share of binarized images that the attack breaks"
    source = f"{PAPER}: 95 %"
    if not isinstance(defense, Network) or defense.bank_of is not None:
        why = f"{type(defense).__name__} shows no network whose last layer to replace; audit it as a Deterministic or Smoothed"
        return [not_run("binarization", what, source, why)]
    stream = stream.at(positions(stream, len(images)))
    try:
        layer = _Layer(last_weighted(defense, images[:1], stream.at(None)))  # any noise will do
        binary, sound = _fit(defense, layer, images, threat, stream, settings)
    except (LookupError, RushBenchError) as error:
        return [not_run("binarization", what, source, str(error))]
    chosen = sound.nonzero()[:, 0]
    count, own = len(chosen), stream.at(positions(stream, len(images))[chosen.cpu()])
    left_out = f"{len(images) - count} of {len(images)} images left out: no layer tells their planted point from the inner ones"
    if 2 * count < len(images):
        return [not_run("binarization", what, source, left_out)]
    labels = torch.zeros(count, dtype=torch.int64, device=images.device)
    attack = attack or (ATTACK if defense.deterministic else RANDOMISED)
    try:
        attacked = attack.run(binary, images[chosen], labels, threat, own.named("attack"))
    except RushBenchError as error:  # its gradient is not finite, which other checks flag
        return [not_run("binarization", what, source, str(error))]
    lucky, judge = _random_search(binary, images[chosen], threat, own.named("random"), settings), own.named("judge")
    success = int((binary.median_log_odds(attacked, judge, settings.judging) > 0).sum())
    chance = float((binary.median_log_odds(lucky, judge, settings.judging) > 0).double().mean())
    low, high = clopper_pearson(success, count)
    random = judged(
        "binarization-random",
        f"share of binarized images that the best of {settings.points} random points on the edge breaks",
        chance,
        "<=",
        0.5,
        f"ours: where luck does as well, success means nothing ({PAPER} reports it beside)",
        otherwise="not run",
    )
    note = left_out if count < len(images) else ""
    if random.status == "not run":
        return [not_run("binarization", what, source, f"random points break {chance:.0%}: the test is too easy here"), random]
    found = judged("binarization", what, success / count, ">=", 0.95, source, note=note, low=float(low), high=float(high))
    return [within_chance(found), random]


def _random_search(binary: "_Binarized", images: Tensor, threat: Threat, stream: Stream, settings: Binarization) -> Tensor:
    """The best of the random points on the edge of each ball, by a few draws held apart from those that judge."""
    best, value = images, torch.full((len(images),), -torch.inf, device=images.device)
    for number in range(settings.points):
        points = boundary_point(images, threat, stream.named(f"point{number}"))
        worth = binary.median_log_odds(points, stream.named("select"), settings.draws)
        best = torch.where((worth > value)[:, None, None, None], points, best)
        value = torch.maximum(worth, value)
    return best


def boundary_point(images: Tensor, threat: Threat, stream: Stream) -> Tensor:
    """A random point of the edge of each image's ball: a corner for l-inf, uniform on the sphere for l2; in the box."""
    uniform = stream.uniform(len(images), 1, tuple(images.shape[1:]), images.device)[:, 0]
    if threat.norm == "linf":
        return threat.project(images + torch.where(uniform < 0.5, -threat.eps, threat.eps), images)
    delta = threat.ascend(torch.erfinv(2 * uniform - 1)) * threat.eps
    for _ in range(10):  # the box takes some of its length away; what is left grows again
        delta = (images + delta).clamp(0, 1) - images
        delta = delta * (threat.eps / threat.size(delta).clamp_min(1e-12))[:, None, None, None]
    return threat.project(images + delta, images)


def fisher(inside: Tensor, planted: Tensor) -> Tensor:
    """The direction (F,), of length 1, along which features (F,) of one point stand out from those (P, F) of others.

    Fisher's discriminant with one point on one side, (S + r I)^-1 (planted - mean) with a small ridge r, in place of the
    paper's logistic regression: in closed form, and the furthest point in units of the others' spread.
    """
    inside, planted = inside.double(), planted.double()
    apart = inside - inside.mean(0)
    scatter = apart.T @ apart / len(apart)
    ridge = 1e-6 * scatter.diagonal().mean().clamp_min(1e-30)
    direction = torch.linalg.solve(scatter + ridge * torch.eye(len(scatter), device=scatter.device), planted - inside.mean(0))
    return (direction / direction.norm().clamp_min(1e-300)).float()


def last_weighted(defense: Network, image: Tensor, stream: Stream) -> dict[bool, nn.Module]:
    """The last layer with weights that a prediction (True) and a gradient (False) run through; LookupError if there is none.

    Of networks of ours it is the head, whatever it holds.
    """
    found = {}
    for exact, network in ((True, defense.body.network), (False, defense.body.search)):
        called: list[nn.Module] = []

        def note(module: nn.Module, given: tuple[Any, ...], seen: list[nn.Module] = called) -> None:
            if given and isinstance(given[0], Tensor) and given[0].ndim > 1:
                seen.append(module)

        head = getattr(network, "head", None)
        # a matrix at least, as a normalisation's weights are a vector; of a module of its own, whose input can be read
        layers = [module for module in network.modules() if module is not network]
        weighted = [m for m in layers if any(p.ndim > 1 for p in [*m.parameters(False), *m.buffers(False)])]
        watched = [head] if isinstance(head, nn.Module) else weighted
        handles = [module.register_forward_pre_hook(note) for module in watched]
        try:
            if exact:
                defense.predict(image, stream)
            else:
                label = torch.zeros(1, dtype=torch.int64, device=image.device)
                defense.gradient(image, label, "ce", 1, stream)
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise LookupError(f"{defense.name} calls no layer with weights (a module such as Linear or Conv2d) to replace")
        found[exact] = called[-1]
    return found


class _Layer:
    """Reads features off a body, or log-probabilities of two classes from a layer of each image's own.

    `heads` (b, F + 1), weights and threshold of the images that come next; None for features. Rows are b images x k draws.
    """

    def __init__(self, last: dict[bool, nn.Module]) -> None:
        self.last = last
        self.heads: Tensor | None = None

    def __call__(self, body: Body, batch: Tensor, exact: bool) -> Tensor:
        caught: list[Tensor] = []
        handle = self.last[exact].register_forward_pre_hook(lambda module, given: caught.append(given[0]))
        try:
            # what the network itself makes of them follows: the spread of its logits is that of the new layer
            scores = log_probabilities(body, batch, exact)
        finally:
            handle.remove()
        features = _flat(caught[-1].float())
        if len(features) != len(batch):
            raise LookupError(f"the last layer with weights reads {len(features)} rows for {len(batch)} images")
        if self.heads is None:
            return torch.cat([features, (scores.amax(1) - scores.amin(1))[:, None]], 1)
        weights = self.heads.to(features.device)
        score = (features.unflatten(0, (len(weights), -1)) * weights[:, None, :-1]).sum(2) - weights[:, -1:]
        return torch.stack([-score, score], 2).flatten(0, 1).div(2).log_softmax(1)


def _flat(features: Tensor) -> Tensor:
    """What the last layer reads as (R, F); of maps of more than FEATURES numbers their means over positions."""
    flat = features.flatten(1)
    return flat if flat.shape[1] <= FEATURES or features.ndim < 3 else features.flatten(2).mean(2)


class _Heads(Sampler):
    """The draws of another sampler, each image before a layer of its own, found by its position in the stream.

    `heads` (n, F + 1) are filled in once they are fitted.
    """

    def __init__(self, sampler: Sampler, layer: _Layer, place: Tensor) -> None:
        self.drawn, self.layer, self.draws_per_image = sampler, layer, sampler.draws_per_image
        self.row = {int(position): k for k, position in enumerate(place)}
        self.heads = torch.empty(0)

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        inner = self.drawn.forward(body, stream, batch)
        heads = self.heads[[self.row[int(position)] for position in positions(stream, batch)]]

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            self.layer.heads = heads[i]
            return inner(x, i, j, exact)

        def one_by_one(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            each = [(x[k : k + 1], slice(i.start + k, i.start + k + 1)) for k in range(len(x))]
            return torch.cat([forward(image, place, j, exact) for image, place in each])

        return one_by_one if self.drawn.one_call_per_draw else forward

    def fixed(self, body: Body, size: int, seed: int) -> Fixed:
        raise BadInput(NO_STREAM)


class _Binarized(Network):
    """The defence with a layer of its own for each image."""

    sampler: _Heads

    def __init__(self, defense: Network, layer: _Layer, place: Tensor) -> None:
        body, sampler = defense.body.variant(read=layer, classes=2), _Heads(defense.sampler, layer, place)
        options: dict[str, Any] = {"averaging": defense.averaging, "by_vote": defense.by_vote, "about": defense.about}
        super().__init__(body, sampler, name=f"{defense.name}-binarized", draws=defense.draws, **options)

    def as_module(self, stream: Stream) -> nn.Module:
        raise BadInput(NO_STREAM)

    def base(self) -> Defense:
        raise BadInput("the binarization test has no source to transfer from; take a white-box attack: eot-apgd or pgd")

    def features(self, points: Tensor, stream: Stream, draws: int) -> Tensor:
        """Features and, last, the spread of the logits, of points (P, C, H, W): (P, k, F + 1)."""
        self.sampler.layer.heads = None
        return self._rows(self.sampler.drawn.forward(self.body, stream, len(points)), points, draws).float()

    def median_log_odds(self, points: Tensor, stream: Stream, draws: int) -> Tensor:
        """The median over draws (n,) of the log-odds of class 1: above 0 where more than half of the draws predict it."""
        log_p = self._rows(self.sampler.forward(self.body, stream, len(points)), points, draws)
        return (log_p[..., 1] - log_p[..., 0]).median(1).values.to(points.device)

    def _rows(self, forward: Any, points: Tensor, draws: int) -> Tensor:
        """What the exact network gives for each point and draw, in as many pieces as memory asks for."""
        draws = 1 if self.deterministic else draws
        rows: list[Tensor] = []
        with torch.no_grad():
            for i, j in blocks(len(points), draws, self.body.forward_block(draws)):
                piece = forward(points[i].to(self.device), i, j, True)
                if j.start == 0:
                    rows.append(piece)
                else:
                    rows[-1] = torch.cat([rows[-1], piece], 1)
        return torch.cat(rows).clone()


def _fit(
    defense: Network, layer: _Layer, images: Tensor, threat: Threat, stream: Stream, settings: Binarization
) -> tuple[_Binarized, Tensor]:
    """The binarized defence, and for which images (n,) it is sound: the planted point is of class 1, the image of class 0."""
    place = positions(stream, len(images))
    binary, planted = _Binarized(defense, layer, place), boundary_point(images, threat, stream.named("planted"))
    inner = settings.inner or (999 if defense.deterministic else 200)
    shrunk = dataclasses.replace(threat, eps=INNER * threat.eps)
    heads, gaps = [], []
    for k in range(len(images)):
        own, many = stream.at(place[k : k + 1]), stream.at(torch.arange(inner) + inner * place[k])
        inside = shrunk.start(images[k].expand(inner, -1, -1, -1), many.named("inner"))
        points = torch.cat([planted[k : k + 1], images[k : k + 1], inside])
        found = binary.features(points, own.named("fit"), settings.draws)
        features, spread = found[..., :-1], found[..., -1].mean()
        direction = fisher(features[1:].mean(1), features[0].mean(0))
        medians = (features @ direction).median(1).values
        # draws shift the scores of all points alike: the gap is taken on the same ones, the planted point on those that judge
        gap = medians[0] - medians[1:].max()
        judged_features = binary.features(points[:1], own.named("judge"), settings.judging)[..., :-1]
        threshold = (judged_features @ direction).median() - (1 - settings.closeness) * gap
        size = spread / (features @ direction - threshold).abs().max().clamp_min(1e-30)
        heads.append(torch.cat([direction, threshold[None]]) * size)
        gaps.append(gap)
    binary.sampler.heads = torch.stack(heads)
    right, wrong = (binary.median_log_odds(x, stream.named("judge"), settings.judging) > 0 for x in (planted, images))
    return binary, (torch.stack(gaps).to(images.device) > 0) & right & ~wrong
