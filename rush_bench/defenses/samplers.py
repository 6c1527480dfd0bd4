"""How a defence draws: what one call sends through its body, drawn anew for each image or fixed in a bank."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.defenses.body import Body
from rush_bench.defenses.owner import own_generators
from rush_bench.noise import Noise, Stream

# (the images x (b, C, H, W) at these positions of the batch, positions, draws, exact) -> log-probabilities (b, k, K)
Forward = Callable[[Tensor, slice, slice, bool], Tensor]
Fixed = Callable[[Body, Tensor, slice, bool], Tensor]  # (body, x, draws, exact), the same draws for every image
# images (B, C, H, W), a stream, k -> copies (B, k, C', H', W'), for draws 0..k-1 of the stream
StreamTransform = Callable[[Tensor, Stream, int], Tensor]


class Sampler:
    """Draws nothing: each image goes through the body once. Never changed once it is made."""

    noise: Noise | None = None
    transform: StreamTransform | None = None
    size: int = 1  # draws of a prediction where they are fixed
    draws_per_image: bool = True  # see `Defense.draws_per_image`
    one_call_per_draw: bool = False  # image by image and draw by draw, as the rows of a call would share a draw

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        """What a call on a batch of images with this stream sends through the body."""
        return lambda x, i, j, exact: body.fold(x[:, None], exact)

    def fixed(self, body: Body, size: int, seed: int) -> Fixed:
        """The first `size` draws of a seed, for all images alike."""
        raise NotImplementedError

    def body_without_draws(self, body: Body) -> Body | None:
        """The body without what is drawn; None where that is not known."""
        return body

    def identity(self) -> dict[str, Any]:
        """What decides its draws, for the key of a record, beside the noise law and the votes."""
        return {}


class NoiseSampler(Sampler):
    """Noise of a law, added to each copy."""

    noise: Noise

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        images = positions(stream, batch)

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            own = stream.at(images[i]).skip(j.start)
            return body.fold(x[:, None] + own.noise(self.noise, len(x), j.stop - j.start, body.shape, body.device), exact)

        return forward

    def fixed(self, body: Body, size: int, seed: int) -> Fixed:
        noise = bank_stream(seed).noise(self.noise, 1, size, body.shape, body.device)
        return lambda body, x, j, exact: body.fold(x[:, None] + noise[:, j], exact)


class TransformSampler(Sampler):
    """A transform that draws from the stream; `plain` is the network without it, where that is another than the body's.

    `facts` are its identity.
    """

    transform: StreamTransform

    def __init__(self, transform: StreamTransform, facts: dict[str, Any], plain: nn.Module | None = None) -> None:
        self.transform, self.facts, self.plain = transform, facts, plain

    def with_transform(self, transform: StreamTransform) -> "TransformSampler":
        """The same with another transform, which goes by the same identity."""
        return TransformSampler(transform, self.facts, self.plain)

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        images = positions(stream, batch)

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            return body.fold(self.transform(x, stream.at(images[i]).skip(j.start), j.stop - j.start), exact)

        return forward

    def fixed(self, body: Body, size: int, seed: int) -> Fixed:
        bank = bank_stream(seed)
        return lambda body, x, j, exact: body.fold(self.transform(x, bank.skip(j.start), j.stop - j.start), exact)

    def body_without_draws(self, body: Body) -> Body:
        return Body(body.network if self.plain is None else self.plain, **body.options)

    def identity(self) -> dict[str, Any]:
        return self.facts


class NetworkSampler(Sampler):
    """A network that draws from torch's global generators.

    `facts` are its identity, `plain` is the network without its randomness.
    """

    draws_per_image = False

    def __init__(self, one_call_per_draw: bool, facts: dict[str, Any], plain: nn.Module | None = None) -> None:
        self.one_call_per_draw, self.facts, self.plain = one_call_per_draw, facts, plain

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        images = positions(stream, batch)

        def forward(x: Tensor, i: slice, j: slice, exact: bool) -> Tensor:
            own, count = stream.at(images[i]).skip(j.start), j.stop - j.start
            if not self.one_call_per_draw:
                return _seeded(body, x, own, count, exact)
            each = [(x[k : k + 1], own.at(images[i][k : k + 1])) for k in range(len(x))]
            return torch.cat([_draw_by_draw(body, image, its, count, exact) for image, its in each])

        return forward

    def fixed(self, body: Body, size: int, seed: int) -> Fixed:
        bank, rows = bank_stream(seed), body.rows

        def fixed(body: Body, x: Tensor, j: slice, exact: bool) -> Tensor:
            if self.one_call_per_draw:
                each = [_draw_by_draw(body, image, bank.skip(j.start), j.stop - j.start, exact) for image in x.split(1)]
                return torch.cat(each)
            # One image per call, its draws in pieces that start at multiples of `rows`: the same for every batch and block.
            pieces = [(start, min(start + rows, j.stop) - start) for start in range(j.start, j.stop, rows)]
            each = [
                torch.cat([_seeded(body, image, bank.skip(start), count, exact) for start, count in pieces], 1)
                for image in x.split(1)
            ]
            return torch.cat(each)

        return fixed

    def body_without_draws(self, body: Body) -> Body | None:
        return None if self.plain is None else Body(self.plain, **body.options)

    def identity(self) -> dict[str, Any]:
        return {**self.facts, **({"calls": "one an image and draw"} if self.one_call_per_draw else {})}


class BankSampler(Sampler):
    """`size` draws of a seed of another sampler, the same for every image."""

    def __init__(self, sampler: Sampler, body: Body, size: int, seed: int) -> None:
        self.size, self.seed, self.draw = size, seed, sampler.fixed(body, size, seed)

    def forward(self, body: Body, stream: Stream, batch: int) -> Forward:
        return lambda x, i, j, exact: self.draw(body, x, j, exact)

    def identity(self) -> dict[str, Any]:
        return {"bank": self.size, "bank_seed": self.seed}


def bank_stream(seed: int) -> Stream:
    """The stream of a bank: the same draws for every image."""
    return Stream(seed, "bank", torch.zeros(1, dtype=torch.int64))


def positions(stream: Stream, batch: int) -> Tensor:
    """The positions of the batch's images in their data set (B,), on the CPU."""
    return torch.arange(batch) if stream.images is None else stream.images.cpu().expand(batch)


def seed_of(stream: Stream) -> int:
    """A seed for a generator, from all that a stream is: seed, purpose, images and first draw."""
    images = b"" if stream.images is None else stream.images.to(torch.int64).numpy().tobytes()
    text = f"{stream.seed}\0{stream.purpose}\0{stream.first_draw}\0".encode()
    return int.from_bytes(hashlib.sha256(text + images).digest()[:8], "little") >> 1


def _seeded(body: Body, x: Tensor, stream: Stream, draws: int, exact: bool) -> Tensor:
    """Log-probabilities (B, k, K) of a network that draws from the global generators, all draws in one call."""
    with own_generators(body.device, seed_of(stream)):
        return body.fold(x[:, None].expand(-1, draws, -1, -1, -1), exact)


def _draw_by_draw(body: Body, image: Tensor, stream: Stream, draws: int, exact: bool) -> Tensor:
    """The same (1, k, K) of one image, a call for each draw."""
    return torch.cat([_seeded(body, image, stream.skip(k), 1, exact) for k in range(draws)], 1)
