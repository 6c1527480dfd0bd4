"""Deterministic classifiers and the randomised-smoothing adapter (RUSH eqs. 3-7; Cohen et al. 2019; Salman et al. 2019)."""

import copy
import dataclasses
import math
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.defenses.aggregate import MEAN_PROBABILITY, Aggregation, objective_named
from rush_bench.defenses.base import Defense, Gradient, Prediction, check_images, check_shown
from rush_bench.defenses.body import SURE, Body, blocks, whole_blocks
from rush_bench.defenses.losses import Loss, against, cross_entropy
from rush_bench.defenses.samplers import BankSampler, Forward, NoiseSampler, Sampler, StreamTransform, positions
from rush_bench.errors import BadInput
from rush_bench.noise import Noise, Stream, noise_from
from rush_bench.settings import MOST, Count, fits

FAINT = 1e-20  # the least slope of CE: a gradient keeps its direction where it would vanish
SEEN = 2  # draws that tell how far apart an image's logits are


class Network(Defense):
    """A body and its draws: the one class of all defences that are made of a network.

    `sampler` says how it draws and `draws` how many votes one prediction counts; `of_votes`, `bank` and `base` are the same
    body with others. `averaging` is that of `probabilities`, and of a loss that does not say another; `by_vote`: the label is
    the one with the most votes, not the likeliest. `bank_of`: for a bank, the defence whose draws it holds. `spreads`: how far
    apart the logits of images are, once an attack has begun on them.
    """

    steepens = True
    spreads: "Spreads | None" = None

    def __init__(
        self,
        body: Body,
        sampler: Sampler,
        *,
        name: str,
        draws: int = 0,
        about: dict[str, Any] | None = None,
        averaging: Aggregation = MEAN_PROBABILITY,
        by_vote: bool = True,
        bank_of: "Network | None" = None,
    ) -> None:
        check_shown(name)
        self.sampler, self.name, self.draws, self.about = sampler, name, draws, about or {}
        self.averaging = averaging if by_vote else dataclasses.replace(averaging, late=True)
        self.by_vote, self.bank_of, self.draws_per_image = by_vote, bank_of, sampler.draws_per_image
        self._take(body)

    def _take(self, body: Body) -> None:
        self.body, self.passes, self.weights = body, body.passes, body.weights
        self.shape, self.device, self.precision, self.classes = body.shape, body.device, body.precision, body.classes
        self.saturated = self.averaged == 1 and body.lead > SURE

    @property
    def noise(self) -> Noise | None:
        """The law of its noise, a bank's too."""
        return (self.bank_of or self).sampler.noise

    @property
    def transform(self) -> StreamTransform | None:
        """The transform that draws from the stream in front of the body, a bank's too."""
        return (self.bank_of or self).sampler.transform

    @property
    def averaged(self) -> int:
        """Draws that one prediction averages: m, a bank's size, or 1."""
        return self.draws or self.sampler.size

    def identity(self) -> dict[str, Any]:
        if self.bank_of is not None:
            return {**self.bank_of.identity(), "votes": 0, **self.sampler.identity()}
        law = self.noise.to_dict() if self.noise else None
        about = {"weights": self.weights, "noise": law, "votes": self.draws, "outputs": self.body.outputs}
        return {**about, **self.sampler.identity()}

    def labels(self) -> dict[str, Any]:
        return {"defense": self.name, "model": self.name.split("@")[0], **self.about, "votes": self.draws}

    def as_module(self, stream: Stream) -> nn.Module:
        """See the function `as_module`."""
        return _Module(self, stream).eval()

    def to_climb(self, images: Tensor, stream: Stream) -> "Network":
        draws, varied = self.averaged if self.deterministic else SEEN, self.body.varied
        forward, found = self.sampler.forward(self.body, stream.named("spread"), len(images)), list[Tensor]()
        with torch.no_grad():
            for i, j in blocks(len(images), draws, self.body.block(draws)):
                log_p = forward(images[i].to(self.device), i, j, False)
                least = (log_p if varied is None else log_p[..., varied]).amin(-1)
                part = (log_p.amax(-1) - least).sum(1) / draws  # a class that wins is not masked, whatever it was on probes
                if j.start == 0:
                    found.append(part)
                else:
                    found[-1] = found[-1] + part
        return self._with(spreads=Spreads(positions(stream, len(images)), torch.cat(found)))

    def unsaturated(self) -> "Network":
        return self.with_body(self.body.unsaturated()) if self.saturated else self

    def predict(self, images: Tensor, stream: Stream) -> Prediction:
        prediction = self._predictions(images, stream, 1)
        return Prediction(
            *(part[0] for part in (prediction.labels, prediction.votes, prediction.probabilities, prediction.logs))
        )

    def predictions(self, images: Tensor, stream: Stream, repeats: int, *, exact: bool = True) -> Prediction:
        # a network that draws by itself may have one draw for all rows of a call, and one without draws needs but one call
        own = not is_network(self)  # what a subclass predicts is to be scored
        if own or (repeats > 1 and (self.deterministic or not self.draws_per_image)):
            return super().predictions(images, stream, repeats)
        return self._predictions(images, stream, repeats, exact or self.precision != "float32")

    def _predictions(self, images: Tensor, stream: Stream, repeats: int, exact: bool = True) -> Prediction:
        """All draws of all predictions in as few blocks as memory allows."""
        check_images(images, self.shape)
        forward, draws = self.sampler.forward(self.body, stream, len(images)), self.averaged
        shape, averaging = (repeats, len(images), self.classes), self.averaging
        kinds = torch.arange(self.classes, device=self.device)
        votes = torch.zeros(shape, dtype=torch.int64, device=self.device)
        total = torch.empty(shape, dtype=self.body.wide, device=self.device)
        with torch.no_grad():  # what a network keeps of it may meet a gradient later, which inference_mode would not take
            for i, j in whole_blocks(len(images), repeats, draws, self.body.forward_block(draws)):
                log_p = forward(images[i].to(self.device), i, j, exact)
                log_p = log_p.unflatten(1, (-1, min(draws, j.stop - j.start))).transpose(0, 1)
                k = slice(j.start // draws, -(-j.stop // draws))
                if draws == 1:  # its own sum and its own vote
                    total[k, i] = log_p[:, :, 0]
                    continue
                votes[k, i] += (log_p.argmax(3, keepdim=True) == kinds).sum(2)
                more = log_p.sum(2) if averaging.geometric else log_p.logsumexp(2)
                total[k, i] = averaging.join(total[k, i], more) if j.start % draws else more
        scores = averaging.scores(averaging.mean(total, draws))
        probabilities = scores.exp()
        if draws == 1:
            labels = total.argmax(2)
            votes.scatter_(2, labels[..., None], 1)
        else:
            # The most votes win; a tie goes to the higher mean probability, which is below 1 vote's worth (sources S5.23).
            labels = (votes + 0.5 * probabilities if self.by_vote else total).argmax(2)
        return Prediction(labels, votes, probabilities.float(), scores)

    def gradient(self, images: Tensor, labels: Tensor, loss: str, draws: int, stream: Stream) -> Gradient:
        function, averaging = self._objective(loss, images, stream)
        forward = self.sampler.forward(self.body, stream, len(images))
        draws = self.averaged if self.deterministic else draws
        if function is cross_entropy and averaging.by_draw:
            return self._gradient_of_ce(images, labels, averaging, draws, forward)
        gradients, losses = torch.empty_like(images), torch.empty(len(images), dtype=self.body.wide, device=images.device)
        means = losses[:, None].repeat(1, self.classes)
        for i, j in blocks(len(images), draws, self.body.block(draws)):
            if j.start > 0:  # all the draws of these images were gone through below, twice
                continue
            with torch.enable_grad():
                x = images[i].detach().requires_grad_()
                if fits := draws <= self.body.rows:
                    mean = averaging.mean(averaging.total(averaging.of(i).each(forward(x, i, j, False))), draws)
                else:
                    mean = _Chunked.apply(x, self.body, forward, i, draws, averaging.of(i))
                scores = averaging.of(i).scores(mean)
                value = (against if function is cross_entropy else function)(scores, labels[i])
                if fits:
                    self.body.count_backward(len(x) * draws)
                (gradient,) = torch.autograd.grad(value.sum(), x)
            if function is cross_entropy:
                value = F.softplus(value.detach())
                gradient = gradient * _slope(-torch.expm1(-value), gradient)
            gradients[i], losses[i], means[i] = gradient, value.detach(), mean.detach()
        return Gradient(gradients, losses.float(), averaging.scores(means).float())

    def _objective(self, loss: str, images: Tensor, stream: Stream) -> tuple[Loss, Aggregation]:
        function, averaging = objective_named(loss, self.averaging)
        if not averaging.apart:
            return function, averaging
        spreads = self.spreads if self.spreads is not None else self.to_climb(images, stream).spreads
        assert spreads is not None
        return function, averaging.sharpened(spreads.of(positions(stream, len(images))))

    def _gradient_of_ce(self, images: Tensor, labels: Tensor, averaging: Aggregation, draws: int, forward: Forward) -> Gradient:
        """CE of the mean probability p over draws, in one pass: sum_j p_j (1 - p_j) d odds_j / sum_j p_j, odds against y.

        So written, nothing cancels where draws are sure: the direction is that of CE at every scale of the logits. Pieces of
        draws are weighed by a running log-sum-exp, which is exact.
        """
        gradients, weights = torch.empty_like(images), torch.empty(len(images), dtype=self.body.wide, device=images.device)
        means = weights[:, None].repeat(1, self.classes)
        for i, j in blocks(len(images), draws, self.body.block(draws)):
            with torch.enable_grad():
                x = images[i].detach().requires_grad_()
                each = averaging.of(i).each(forward(x, i, j, False))
                known = labels[i, None].expand(each.shape[:2])
                odds = against(each, known)
                share = (odds + 2 * each.gather(2, known[..., None])[..., 0]).detach()  # log p_j (1 - p_j)
                weight = share.logsumexp(1)
                objective = ((share - weight[:, None]).exp() * odds).sum()
                gradient = self.body.gradient(objective, x, len(x) * (j.stop - j.start))
            mean = averaging.mean(averaging.total(each), draws).detach()
            if j.start == 0:
                gradients[i], weights[i], means[i] = gradient, weight, mean
                continue
            means[i], total = averaging.join(means[i], mean), torch.logaddexp(weights[i], weight)
            gradients[i] += (weight - total).exp()[:, None, None, None].float() * (gradient - gradients[i])
            weights[i] = total
        size = (weights - math.log(draws) + cross_entropy(means, labels)).exp()
        return Gradient(
            gradients * _slope(size, gradients), F.softplus(against(means, labels)).float(), averaging.scores(means).float()
        )

    def of_votes(self, votes: int) -> "Network":
        return self if self.deterministic else self._with(draws=votes)

    def with_body(self, body: Body) -> "Network":
        """The same draws in front of another body."""
        other = self._with()
        other._take(body)
        return other

    def with_sampler(self, sampler: Sampler) -> "Network":
        """The same body behind other draws."""
        return self._with(sampler=sampler)

    def bank(self, size: int, seed: int) -> "Network":
        """The same defence with `size` draws fixed for all images, hence a deterministic classifier, so that AutoAttack is
        valid on it (protocol 4)."""
        if self.deterministic:
            return self
        fixed = BankSampler(self.sampler, self.body, size, seed)
        same: dict[str, Any] = {"about": self.about, "averaging": self.averaging, "by_vote": self.by_vote, "bank_of": self}
        return Network(self.body, fixed, name=f"{self.name}-bank{size}", **same)

    def base(self) -> Defense:
        """The network without its draws: its noise or transform removed, or the `plain` of a network that draws inside."""
        if self.bank_of is not None:
            return self.bank_of.base()
        if self.deterministic:
            return self
        body = self.sampler.body_without_draws(self.body)
        if body is None:
            raise BadInput(
                f"{self.name} draws inside its network, so its base is not known; give the network without its randomness "
                "as Randomised(..., plain=...), or give the transfer attack another source"
            )
        return Network(body, Sampler(), name=f"{self.name}-base", about=self.about)

    def _with(self, **changed: Any) -> "Network":
        other = copy.copy(self)  # of the same class: what a subclass does otherwise stays
        vars(other).update(changed)
        return other


def is_network(defense: Defense) -> TypeGuard[Network]:
    """Whether a defence predicts what the network behind it says: one of ours, and no subclass with a `predict` of its own."""
    kind = type(defense)
    return isinstance(defense, Network) and (kind.predict, kind.predictions) == (Network.predict, Network.predictions)


class Spreads:
    """How far apart the logits of images are: `values` (B,) on the device, of images at `places` (B,) of their data set."""

    def __init__(self, places: Tensor, values: Tensor) -> None:
        self.values, self.rows = values, {place: row for row, place in enumerate(places.tolist())}
        self.last = places, values

    def of(self, places: Tensor) -> Tensor:
        """(b,), of images at these places; a step that asks for those of the step before waits for nothing."""
        if not torch.equal(places, self.last[0]):
            rows = torch.tensor([self.rows[place] for place in places.tolist()])
            self.last = places, self.values[rows.to(self.values.device)]
        return self.last[1]


class _Chunked(torch.autograd.Function):
    """The mean over draws with memory for one block only: the backward pass computes each block again.

    For draws of one image that do not fit (CE alone has a running sum): how the slopes of the classes in a margin or DLR
    stand to each other is known when all draws are, and a sum for each class would be a backward pass for each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, body: Body, forward: Forward, where: slice, draws: int, averaging: Aggregation) -> Tensor:
        pieces: list[Tensor] = []
        for i, j in blocks(len(x), draws, body.rows):
            total = averaging.total(averaging.of(i).each(forward(x[i], _within(where, i), j, False)))
            if j.start == 0:
                pieces.append(total)
            else:
                pieces[-1] = averaging.join(pieces[-1], total)
        mean = averaging.mean(torch.cat(pieces), draws)
        ctx.save_for_backward(x, mean)
        ctx.rest = body, forward, where, draws, averaging
        return mean

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        body, forward, where, draws, averaging = ctx.rest
        out = torch.zeros_like(x)
        for i, j in blocks(len(x), draws, body.rows):
            with torch.enable_grad():
                part = x[i].detach().requires_grad_()
                each = averaging.of(i).each(forward(part, _within(where, i), j, False))
                share = averaging.share(each.detach(), mean[i], draws)
                objective = (upstream[0][i, None] * share * each).sum()
                out[i] += body.gradient(objective, part, len(part) * (j.stop - j.start))
        return out, None, None, None, None, None


def _slope(size: Tensor, like: Tensor) -> Tensor:
    """The slope of CE in the odds (B,), to multiply a gradient with; where it fades, a number that float32 can hold."""
    return size.clamp_min(FAINT).to(like.dtype)[:, None, None, None]


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def check_votes(votes: Any) -> None:
    """Refuse what is no number of votes."""
    if not fits(Count, votes):
        raise BadInput(f"votes = {votes!r}: a vote takes at least 1 vote, a whole number, at most {MOST}")


class _Module(nn.Module):
    def __init__(self, defense: Network, stream: Stream) -> None:
        super().__init__()
        self.defense, self.stream = defense, stream

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0,1] to (B, K): the log of the mean probability, or the mean logits where the defence has those.

        Logits that float32 would not tell apart are multiplied (see `Body.legible`).
        """
        defense, averaging, images = self.defense, self.defense.averaging, images.contiguous()
        forward, draws = defense.sampler.forward(defense.body, self.stream, len(images)), defense.averaged
        # a third-party attack does not say which images these are: a randomised defence draws anew at each call
        self.stream = self.stream.skip(draws)
        if len(images) * draws > defense.body.rows:
            mean = _Chunked.apply(images, defense.body, forward, slice(0, len(images)), draws, averaging)
            return self._shown(averaging.scores(mean))
        log_p = forward(images, slice(0, len(images)), slice(0, draws), False)
        scores = self._shown(averaging.scores(averaging.mean(averaging.total(averaging.each(log_p)), draws)))
        if scores.requires_grad:
            scores.register_hook(lambda _: defense.body.count_backward(len(images) * draws))
        return scores

    def _shown(self, scores: Tensor) -> Tensor:
        return (self.defense.body.legible * scores).log_softmax(1).float()


class Deterministic(Network):
    """A network without noise. `draws` and `stream` of its methods are ignored.

    Options, here and for Smoothed: `shape` (C, H, W) of the images, default (3, 32, 32); `device`, default the network's;
    `outputs="probabilities"` for a network that ends in softmax; `precision="bfloat16"` for a faster search (float32 alone
    judges); `memory`, bytes that one block of an attack step may take. The network is copied and never changed.
    Errors: BadInput for a network in train mode, one that returns probabilities, one that does not take `shape`, or one
    whose answer for an image depends on the rest of its batch.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> rb.Deterministic(net, shape=(1, 8, 8), name="linear")
        Deterministic(linear, deterministic, 1x8x8 to 10 classes)
    """

    def __init__(
        self, network: nn.Module, *, name: str | None = None, about: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(Body(network, **options), Sampler(), name=name or type(network).__name__.lower(), about=about)


class Smoothed(Network):
    """Randomised smoothing: `votes` noisy copies, hard vote (RUSH eq. 4), gradients by eq. 7.

    `noise` is Uniform(scale), Gaussian(sigma) or text such as `uniform:0.3`; noisy copies are not clipped (sources S5.9).
    The noise of image i, draw j depends on the stream's (seed, purpose) and on i and j alone.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> rb.Smoothed(net, noise=rb.Uniform(0.3), votes=16, shape=(1, 8, 8), name="mine")
        Smoothed(mine, Uniform(scale=0.3), 16 votes, 1x8x8 to 10 classes)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        noise: Noise | str,
        votes: int = 64,
        name: str | None = None,
        about: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        law = noise_from(noise)
        if law is None:
            raise BadInput("Smoothed takes a noise law and at least 1 vote; use Deterministic for a network without noise")
        check_votes(votes)
        name = name or f"{type(network).__name__.lower()}@{votes}"
        super().__init__(Body(network, noise=law, **options), NoiseSampler(law), name=name, draws=votes, about=about)
