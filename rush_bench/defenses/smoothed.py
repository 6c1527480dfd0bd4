"""Deterministic classifiers and the randomised-smoothing adapter (RUSH eqs. 3-7; Cohen et al. 2019; Salman et al. 2019)."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.defenses.aggregate import MEAN_PROBABILITY, Aggregation, objective_named
from rush_bench.defenses.base import Defense, Gradient, Prediction, against, check_images, cross_entropy
from rush_bench.defenses.body import DEFAULT_MEMORY, FLAT, ROUNDED, Body, Precision, blocks, whole_blocks
from rush_bench.defenses.owner import device_of
from rush_bench.errors import BadInput
from rush_bench.noise import Noise, Stream, noise_from

FAINT = 1e-20  # the least slope of CE: a gradient keeps its direction where it would vanish

# (the images x (b, C, H, W) at these positions of the batch, positions, draws, exact) -> log-probabilities (b, k, K)
Forward = Callable[[Tensor, slice, slice, bool], Tensor]


class _Network(Defense):
    """A defence made of one network and, perhaps, randomness; `_forward` says what a call draws."""

    noise: Noise | None = None
    how: Aggregation = MEAN_PROBABILITY  # of `probabilities`, and of a loss that does not say another
    hard: bool = True  # the label is the one with the most votes, not the likeliest

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        shape: tuple[int, int, int] = (3, 32, 32),
        device: torch.device | str | None = None,
        outputs: Literal["logits", "probabilities"] = "logits",
        precision: Precision = "float32",
        memory: int = DEFAULT_MEMORY,
        about: dict[str, Any] | None = None,
        before: Callable[[Tensor], Tensor] | None = None,
        random: bool = False,
    ) -> None:
        if device is None:
            device = device_of(network)
        self.precision = precision
        self.name, self.shape, self.device = name, (shape[0], shape[1], shape[2]), torch.device(device)
        self.about = about or {}
        self.body = Body(
            network,
            shape=self.shape,
            device=self.device,
            outputs=outputs,
            precision=precision,
            memory=memory,
            before=before,
            random=random,
        )
        self.classes, self.passes = self.body.classes, self.body.passes
        self.steepness = 1.0 if self.how.geometric else self.body.steepness(FLAT)
        self.weights = self.body.weights

    def identity(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "noise": self.noise.to_dict() if self.noise else None,
            "votes": self.draws,
            "outputs": self.body.outputs,
        }

    def labels(self) -> dict[str, Any]:
        return {"defense": self.name, "model": self.name.split("@")[0], **self.about, "votes": self.draws}

    def as_module(self, stream: Stream) -> nn.Module:
        """See the function `as_module`."""
        return _Module(self, stream).eval()

    def _forward(self, stream: Stream, batch: int) -> tuple[Forward, int]:
        """What one call sends through the network, and its number of draws; a network without noise has one draw of none."""
        return (lambda x, i, j, exact: self._fold(x[:, None], exact)), 1

    def predict(self, images: Tensor, stream: Stream) -> Prediction:
        one = self._predictions(images, stream, 1)
        return Prediction(*(part[0] for part in (one.labels, one.votes, one.probabilities, one.logs)))

    def predictions(self, images: Tensor, stream: Stream, repeats: int, *, exact: bool = True) -> Prediction:
        # a network that draws by itself may have one draw for all rows of a call, and one without draws needs but one call
        if repeats > 1 and (self.deterministic or not self.keyed):
            return super().predictions(images, stream, repeats)
        return self._predictions(images, stream, repeats, exact or self.precision != "float32")

    def _predictions(self, images: Tensor, stream: Stream, repeats: int, exact: bool = True) -> Prediction:
        """All draws of all predictions in as few blocks as memory allows."""
        check_images(images, self.shape)
        forward, draws = self._forward(stream, len(images))
        shape, geometric = (repeats, len(images), self.classes), self.how.geometric
        kinds = torch.arange(self.classes, device=self.device)
        votes = torch.zeros(shape, dtype=torch.int64, device=self.device)
        total = torch.empty(shape, dtype=self.body.wide, device=self.device)
        with torch.no_grad():  # what a network keeps of it may meet a gradient later, which inference_mode would not take
            # nothing is saved for a backward pass here, so four times the rows fit in the same budget
            for i, j in whole_blocks(len(images), repeats, draws, 4 * self.body.block(draws)):
                log_p = forward(images[i].to(self.device), i, j, exact)
                log_p = log_p.unflatten(1, (-1, min(draws, j.stop - j.start))).transpose(0, 1)
                k = slice(j.start // draws, -(-j.stop // draws))
                if draws == 1:  # its own sum and its own vote
                    total[k, i] = log_p[:, :, 0]
                    continue
                votes[k, i] += (log_p.argmax(3, keepdim=True) == kinds).sum(2)
                more = log_p.sum(2) if geometric else log_p.logsumexp(2)
                total[k, i] = self.how.join(total[k, i], more) if j.start % draws else more
        scores = self.how.scores(self.how.mean(total, draws))
        probabilities = scores.exp()
        if draws == 1:
            labels = total.argmax(2)
            votes.scatter_(2, labels[..., None], 1)
        else:
            # The most votes win; a tie goes to the higher mean probability, which is below 1 vote's worth (sources S5.23).
            labels = (votes + 0.5 * probabilities if self.hard else total).argmax(2)
        return Prediction(labels, votes, probabilities.float(), scores)

    def gradient(self, images: Tensor, labels: Tensor, loss: str, draws: int, stream: Stream) -> Gradient:
        function, how = objective_named(loss, self.how)
        forward, fixed = self._forward(stream, len(images))
        draws = fixed if self.deterministic else draws
        if function is cross_entropy and not how.geometric:
            return self._gradient_of_ce(images, labels, how, draws, forward)
        gradients, losses = torch.empty_like(images), torch.empty(len(images), dtype=self.body.wide, device=images.device)
        means = losses[:, None].repeat(1, self.classes)
        for i, j in blocks(len(images), draws, self.body.block(draws)):
            if j.start > 0:  # all the draws of these images were gone through below, twice
                continue
            with torch.enable_grad():
                x = images[i].detach().requires_grad_()
                if whole := draws <= self.body.rows:
                    mean = how.mean(how.total(how.each(forward(x, i, j, False))), draws)
                else:
                    mean = _Chunked.apply(x, self.body, forward, i, draws, how)
                scores = how.scores(mean)
                value = (against if function is cross_entropy else function)(scores, labels[i])
                if whole:
                    self.body.count_backward(len(x) * draws)
                (gradient,) = torch.autograd.grad(value.sum(), x)
            if function is cross_entropy:
                value = F.softplus(value.detach())
                gradient = gradient * _slope(-torch.expm1(-value), gradient)
            gradients[i], losses[i], means[i] = gradient, value.detach(), mean.detach()
        return Gradient(gradients, losses.float(), how.scores(means).float())

    def _gradient_of_ce(self, images: Tensor, labels: Tensor, how: Aggregation, draws: int, forward: Forward) -> Gradient:
        """CE of the mean probability p over draws, in one pass: sum_j p_j (1 - p_j) d odds_j / sum_j p_j, odds against y.

        So written, nothing cancels where draws are sure: the direction is that of CE at every scale of the logits. Pieces of
        draws are weighed by a running log-sum-exp, which is exact.
        """
        gradients, weights = torch.empty_like(images), torch.empty(len(images), dtype=self.body.wide, device=images.device)
        means = weights[:, None].repeat(1, self.classes)
        for i, j in blocks(len(images), draws, self.body.block(draws)):
            with torch.enable_grad():
                x = images[i].detach().requires_grad_()
                each = how.each(forward(x, i, j, False))
                known = labels[i, None].expand(each.shape[:2])
                odds = against(each, known)
                share = (odds + 2 * each.gather(2, known[..., None])[..., 0]).detach()  # log p_j (1 - p_j)
                weight = share.logsumexp(1)
                objective = ((share - weight[:, None]).exp() * odds).sum()
                gradient = self.body.gradient(objective, x, len(x) * (j.stop - j.start))
            mean = how.mean(how.total(each), draws).detach()
            if j.start == 0:
                gradients[i], weights[i], means[i] = gradient, weight, mean
                continue
            means[i], total = how.join(means[i], mean), torch.logaddexp(weights[i], weight)
            gradients[i] += (weight - total).exp()[:, None, None, None].float() * (gradient - gradients[i])
            weights[i] = total
        size = (weights - math.log(draws) + cross_entropy(means, labels)).exp()
        return Gradient(
            gradients * _slope(size, gradients), F.softplus(against(means, labels)).float(), how.scores(means).float()
        )

    def base(self) -> Defense:
        """The network without its noise: smoothing removed, the same weights and no copy of them."""
        if self.noise is None:
            return self
        base = object.__new__(Deterministic)
        base.__dict__ |= self.__dict__
        base.name, base.draws, base.noise = f"{self.name}-base", 0, None
        return base

    def _fold(self, copies: Tensor, exact: bool) -> Tensor:
        """Log-probabilities (B, k, K) of copies (B, k, C, H, W): the draws are folded into the batch."""
        log_p = self.body.log_probabilities(copies.flatten(0, 1), exact=exact)
        return log_p.unflatten(0, copies.shape[:2])


class _Chunked(torch.autograd.Function):
    """The mean over draws with memory for one block only: the backward pass computes each block again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, body: Body, forward: Forward, where: slice, draws: int, how: Aggregation) -> Tensor:
        pieces: list[Tensor] = []
        for i, j in blocks(len(x), draws, body.rows):
            total = how.total(how.each(forward(x[i], _within(where, i), j, False)))
            if j.start == 0:
                pieces.append(total)
            else:
                pieces[-1] = how.join(pieces[-1], total)
        mean = how.mean(torch.cat(pieces), draws)
        ctx.save_for_backward(x, mean)
        ctx.rest = body, forward, where, draws, how
        return mean

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        body, forward, where, draws, how = ctx.rest
        out = torch.zeros_like(x)
        for i, j in blocks(len(x), draws, body.rows):
            with torch.enable_grad():
                part = x[i].detach().requires_grad_()
                each = how.each(forward(part, _within(where, i), j, False))
                share = how.share(each.detach(), mean[i], draws)
                objective = (upstream[0][i, None] * share * each).sum()
                out[i] += body.gradient(objective, part, len(part) * (j.stop - j.start))
        return out, None, None, None, None, None


def _slope(size: Tensor, like: Tensor) -> Tensor:
    """The slope of CE in the odds (B,), to multiply a gradient with; where it fades, a number that float32 can hold."""
    return size.clamp_min(FAINT).to(like.dtype)[:, None, None, None]


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


class Deterministic(_Network):
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

    def __init__(self, network: nn.Module, *, name: str | None = None, **options: Any) -> None:
        super().__init__(network, name=name or type(network).__name__.lower(), **options)


class _Random(_Network):
    """A randomised defence: it says how it draws (`_forward`), and how it draws the same for all (`_banked`)."""

    def bank(self, size: int, seed: int) -> "Bank":
        """The same defence with `size` draws fixed for all images, hence a deterministic classifier (protocol 4)."""
        return Bank(self, size, seed)

    def of_votes(self, votes: int) -> "Defense":
        other = copy.copy(self)  # the same network and counters
        other.draws = votes
        return other

    def _banked(self, size: int, seed: int) -> Forward:
        raise NotImplementedError


class Smoothed(_Random):
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
        self, network: nn.Module, *, noise: Noise | str, votes: int = 64, name: str | None = None, **options: Any
    ) -> None:
        law = noise_from(noise)
        if law is None or votes < 1:
            raise BadInput("Smoothed takes a noise law and at least 1 vote; use Deterministic for a network without noise")
        self.noise, self.draws = law, votes
        super().__init__(network, name=name or f"{type(network).__name__.lower()}@{votes}", **options)

    def _forward(self, stream: Stream, batch: int) -> tuple[Forward, int]:
        law, images = self.noise, positions(stream, batch)
        assert law is not None

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            own = stream.at(images[i]).skip(j.start)
            return self._fold(x[:, None] + own.noise(law, len(x), j.stop - j.start, self.shape, self.device), exact)

        return forward, self.draws

    def _banked(self, size: int, seed: int) -> Forward:
        law = self.noise
        assert law is not None
        fixed = everyone(seed).noise(law, 1, size, self.shape, self.device)
        return lambda x, i, j, exact: self._fold(x[:, None] + fixed[:, j], exact)


class Bank(_Network):
    """A randomised defence on a fixed bank of draws, shared by all images: deterministic, so that AutoAttack is valid on it."""

    def __init__(self, defense: "_Random", size: int, seed: int) -> None:
        self.__dict__ |= defense.__dict__  # the same network, not a second copy of it
        self.name, self.size, self.seed, self.draws = f"{defense.name}-bank{size}", size, seed, 0
        self.whole, self.fixed, self.keyed = defense, defense._banked(size, seed), True

    def identity(self) -> dict[str, Any]:
        return {**self.whole.identity(), "votes": 0, "bank": self.size, "bank_seed": self.seed}

    def base(self) -> Defense:
        return self.whole.base()

    def _forward(self, stream: Stream, batch: int) -> tuple[Forward, int]:
        return self.fixed, self.size


def everyone(seed: int) -> Stream:
    """The stream of a bank: the same draws for every image."""
    return Stream(seed, "bank", torch.zeros(1, dtype=torch.int64))


def positions(stream: Stream, batch: int) -> Tensor:
    """The positions of the batch's images in their data set (B,), on the CPU."""
    return torch.arange(batch) if stream.images is None else stream.images.cpu().expand(batch)


class _Module(nn.Module):
    def __init__(self, defense: _Network, stream: Stream) -> None:
        super().__init__()
        self.defense, self.stream = defense, stream

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0,1] to (B, K): the log of the mean probability, or the mean logits where the defence has those.

        Logits that float32 would not tell apart are multiplied (see `Body.steepness`).
        """
        defense, how, images = self.defense, self.defense.how, images.contiguous()
        forward, draws = defense._forward(self.stream, len(images))
        # a third-party attack does not say which images these are: a randomised defence draws anew at each call
        self.stream = self.stream.skip(draws)
        if len(images) * draws > defense.body.rows:
            mean = _Chunked.apply(images, defense.body, forward, slice(0, len(images)), draws, how)
            return self._steep(how.scores(mean))
        log_p = forward(images, slice(0, len(images)), slice(0, draws), False)
        scores = self._steep(how.scores(how.mean(how.total(how.each(log_p)), draws)))
        if scores.requires_grad:
            scores.register_hook(lambda _: defense.body.count_backward(len(images) * draws))
        return scores

    def _steep(self, scores: Tensor) -> Tensor:
        by = 1.0 if self.defense.how.geometric else self.defense.body.steepness(ROUNDED)
        return (by * scores).log_softmax(1).float()
