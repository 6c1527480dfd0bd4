"""Noise laws with their certificates, and counter-based streams of noise for evaluation.

A stream is (seed, purpose). The noise of image i, draw j, pixel p depends on (seed, purpose, i, j, p) and on nothing else:
the same for every batch size, order, shard and device (protocol 3). No generator is kept, none is disturbed.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import fits

Floats = NDArray[np.float64]
Bits = NDArray[np.uint32]


LARGEST = 5.0  # scale of a law: pixels lie in [0,1], so that a larger one is of grey levels


def check_seed(seed: Any) -> int:
    """The seed as an int, numpy's too, or BadInput: records and tables keep it as a 64-bit integer."""
    if not fits(int, seed) or not 0 <= int(seed) < 2**63:
        raise BadInput(f"seed {seed!r} is not a whole number from 0 to 2**63 - 1")
    return int(seed)


@dataclass(frozen=True)
class Noise:
    """A law of additive noise, i.i.d. per pixel and channel: how it is drawn, and what smoothing by it certifies.

    `scale` is in pixel units ([0,1]). `norms` are those that it has a theorem in, the usual one first, last the one that
    attacks are compared with. For such a norm, `dimension` pixels times channels, and p a lower bound on the probability that
    one noisy copy of an image gets the class: `radius(p)`, within which no x' has another top class (below 0 where
    p < 1/2); `probability(radius)`, its inverse (above 1 where no bound does); `moved(p, distance)`, what the class keeps of
    p at any x' so far away. All three are vectorised, float64.
    """

    scale: float
    norms: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        scale = self.scale
        if not fits(float, scale) or scale < 0:
            raise BadInput(f"noise scale {scale!r} must be a finite number >= 0, such as {type(self).__name__}(0.25)")
        if scale > LARGEST:
            raise BadInput(
                f"noise scale {scale:g} is beyond {LARGEST:g}, where pixels lie in [0,1]; divide one of grey levels by 255: "
                f"{scale:g}/255 = {scale / 255:.4g}"
            )
        if isinstance(scale, np.generic):
            object.__setattr__(self, "scale", scale.item())

    def transform(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in (0,1), any shape, to noise of the same shape (the inverse of the law's distribution)."""
        raise NotImplementedError

    def sample(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise from a torch generator, on its device: for training, where a step owns a generator."""
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        return self.transform(uniform.clamp_(2**-25, 1 - 2**-24))

    def radius(self, p: ArrayLike, norm: str, dimension: int) -> Floats:
        raise NotImplementedError

    def probability(self, radius: ArrayLike, norm: str, dimension: int) -> Floats:
        raise NotImplementedError

    def moved(self, p: ArrayLike, distance: ArrayLike, norm: str, dimension: int) -> Floats:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """`{"law": ..., "scale": ...}`, which `noise_from` reads back."""
        return {"law": type(self).__name__.lower(), **dataclasses.asdict(self)}


class Uniform(Noise):
    """U(-scale, scale); RUSH uses scale 0.3 (RUSH paper, section 5.1).

    Certifies in l1 (Lee et al. 2019; Yang et al. 2020), and in l-inf (Yang et al. 2020), where a shift by r in all d
    coordinates leaves the noise cubes an overlap of (1 - r / 2 scale)^d, and p can fall by what is not in it.

    Examples:
        >>> import rush_bench as rb
        >>> rb.Uniform(0.3)
        Uniform(scale=0.3)
    """

    norms = ("l1", "linf")

    def transform(self, uniform: Tensor) -> Tensor:
        return (uniform * 2 - 1) * self.scale

    def radius(self, p: ArrayLike, norm: str, dimension: int) -> Floats:
        p = np.asarray(p, np.float64)
        if norm == "l1":
            return 2 * self.scale * (p - 0.5)
        # At d = 3072 the root is 1 - 2e-4, so it is taken through log1p and expm1, which lose no digits.
        return -2 * self.scale * np.expm1(np.log1p(0.5 - p) / dimension)

    def probability(self, radius: ArrayLike, norm: str, dimension: int) -> Floats:
        radius = np.asarray(radius, np.float64)
        if norm == "l1":
            return 0.5 + radius / (2 * self.scale)
        share = np.minimum(radius / (2 * self.scale), 1 - 1e-16)  # beyond, the noise cubes do not meet
        return 0.5 - np.expm1(dimension * np.log1p(-share))

    def moved(self, p: ArrayLike, distance: ArrayLike, norm: str, dimension: int) -> Floats:
        return np.clip(np.asarray(p, np.float64) - (self.probability(distance, norm, dimension) - 0.5), 0, 1)


class Gaussian(Noise):
    """N(0, scale^2) (RUSH paper eq. 1). Certifies in l2 (Cohen et al. 2019, theorem 1 with p_B = 1 - p_A).

    Examples:
        >>> import rush_bench as rb
        >>> rb.Gaussian(0.25)
        Gaussian(scale=0.25)
    """

    norms = ("l2",)

    def transform(self, uniform: Tensor) -> Tensor:
        return torch.erfinv(uniform * 2 - 1) * (math.sqrt(2) * self.scale)

    def radius(self, p: ArrayLike, norm: str, dimension: int) -> Floats:
        return self.scale * special.ndtri(p)

    def probability(self, radius: ArrayLike, norm: str, dimension: int) -> Floats:
        return special.ndtr(np.asarray(radius, np.float64) / self.scale)

    def moved(self, p: ArrayLike, distance: ArrayLike, norm: str, dimension: int) -> Floats:
        return special.ndtr(special.ndtri(p) - np.asarray(distance, np.float64) / self.scale)


class Laplace(Noise):
    """Density exp(-|n| / scale) / 2 scale. Certifies in l1, -scale log 2(1 - p) (Teng et al. 2019; p_B = 1 - p_A).

    The worst shift in l1 is along one pixel, and of all sets of probability p the half-space loses most by it (Yang et al.
    2020: at the rate min(p, 1 - p) / scale), so that radius and distance add up on the law's own quantiles.

    Examples:
        >>> import rush_bench as rb
        >>> rb.Laplace(0.1)
        Laplace(scale=0.1)
    """

    norms = ("l1",)

    def transform(self, uniform: Tensor) -> Tensor:
        centred = uniform * 2 - 1
        return -centred.sign() * torch.log1p(-centred.abs()) * self.scale

    def radius(self, p: ArrayLike, norm: str, dimension: int) -> Floats:
        p = np.asarray(p, np.float64)
        with np.errstate(divide="ignore"):  # infinite at 0 and 1
            return self.scale * np.where(p < 0.5, np.log(2 * p), -np.log(2 * (1 - p)))

    def probability(self, radius: ArrayLike, norm: str, dimension: int) -> Floats:
        share = np.asarray(radius, np.float64) / self.scale
        tail = np.exp(-np.abs(share)) / 2
        return np.where(share < 0, tail, 1 - tail)

    def moved(self, p: ArrayLike, distance: ArrayLike, norm: str, dimension: int) -> Floats:
        return self.probability(self.radius(p, norm, dimension) - np.asarray(distance, np.float64), norm, dimension)


LAWS: dict[str, type[Noise]] = {law.__name__.lower(): law for law in (Uniform, Gaussian, Laplace)}


def noise_from(spec: str | dict[str, Any] | Noise | None) -> Noise | None:
    """A law from `uniform:0.3`, from `{"law": "uniform", "scale": 0.3}`, or from itself; `none` and None are no noise."""
    if spec is None or isinstance(spec, Noise):
        return spec
    if isinstance(spec, str):
        if spec == "none":
            return None
        law, separator, scale = spec.partition(":")
        if not separator:
            raise BadInput(f"noise {spec!r} has no scale; write uniform:0.3 or gaussian:0.25")
        from rush_bench.settings import parse_number

        spec = {"law": law, "scale": parse_number(scale)}
    if not isinstance(spec, dict) or "law" not in spec:
        raise BadInput(f"noise {spec!r} has no law; write uniform:0.3 or gaussian:0.25")
    if "scale" not in spec:
        raise BadInput(f"noise {spec!r} has no scale; write {spec['law']}:0.25")
    if spec["law"] not in LAWS:
        raise unknown_name("noise law", str(spec["law"]), LAWS)
    return LAWS[spec["law"]](spec["scale"])


def is_noise(spec: str | dict[str, Any] | Noise | None) -> bool:
    """Whether it is a law that draws anything: neither none nor one of scale 0."""
    law = noise_from(spec)
    return law is not None and law.scale > 0


@dataclass(frozen=True)
class Stream:
    """Where noise comes from: (seed, purpose), for these images, from this draw on.

    `images` are the positions (B,) of the batch's images in their data set; None means 0..B-1. One position for the whole
    batch (a tensor of one element) gives every image the same draws, which is what a fixed bank needs.
    """

    seed: int
    purpose: str
    images: Tensor | None = None
    first_draw: int = 0

    def at(self, images: Tensor | None) -> "Stream":
        """The same stream for other images."""
        return dataclasses.replace(self, images=images)

    def skip(self, draws: int) -> "Stream":
        """The same stream, `draws` draws further on."""
        return dataclasses.replace(self, first_draw=self.first_draw + draws)

    def named(self, purpose: str) -> "Stream":
        """An independent stream for a finer purpose; `first_draw` starts again at 0."""
        return dataclasses.replace(self, purpose=f"{self.purpose}/{purpose}", first_draw=0)

    def uniform(self, batch: int, draws: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in (0,1) on a grid of 2^-23: (batch, draws, *shape), float32."""
        images = np.arange(batch) if self.images is None else self.images.cpu().numpy().reshape(-1)
        if images.size not in (1, batch):
            raise ValueError(f"stream holds {images.size} image positions for a batch of {batch}")
        digest = hashlib.sha256(f"{self.seed}\0{self.purpose}".encode()).digest()
        salt = np.frombuffer(digest[:16], "<u4")[:, None]
        image = images.astype(np.int64).astype(np.uint32)
        draw = np.arange(self.first_draw, self.first_draw + draws, dtype=np.int64).astype(np.uint32)
        # Two 32-bit keys an (image, draw): with one alone, a million draws would hold a hundred equal pairs.
        keys = _mix(image ^ salt[::2])[:, :, None] + _mix(draw * np.uint32(_GOLDEN) + salt[1::2])[:, None, :]
        keys = np.broadcast_to(_mix(keys), (2, batch, draws)).reshape(2, -1, 1)
        pixels = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(_GOLDEN)
        hashed = _hashed if torch.device(device).type == "cpu" else _hashed_by_torch
        return hashed(keys, pixels, device).reshape(batch, draws, *shape)

    def noise(self, law: Noise, batch: int, draws: int, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Noise of a law: (batch, draws, *shape), float32."""
        return law.transform(self.uniform(batch, draws, shape, device))


_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, odd
BLOCK = 2**16  # numbers that are made at a time on a CPU: they stay in the cache, 4 times as fast as torch's passes over all


def _mix(x: Bits) -> Bits:
    """A bijective 32-bit finaliser (Wellons' "lowbias32" constants: bias 0.17, near the theoretical limit), in place."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


def _hashed(keys: Bits, pixels: Bits, device: torch.device | str) -> Tensor:
    """Uniform numbers (R, P) of the keys (2, R, 1) of rows and of pixels (P,), by numpy."""
    out = np.empty((keys.shape[1], pixels.size), np.float32)
    rows = max(1, BLOCK // pixels.size)
    for k in range(0, len(out), rows):
        first, second = keys[:, k : k + rows]
        part = out[k : k + rows]
        part[...] = _mix(_mix(pixels ^ first) + second) >> 9
        part += 0.5
        part *= 2.0**-23
    return torch.from_numpy(out)


def _hashed_by_torch(keys: Bits, pixels: Bits, device: torch.device | str) -> Tensor:
    """The same numbers, made on the device."""
    # non_blocking: the host need not wait until a GPU has done what it was asked before
    host = (torch.tensor(part.view(np.int32)) for part in (keys[0], keys[1], pixels))
    first, second, pixel = (part.to(device, non_blocking=True) for part in host)
    bits = _mix_int32(_mix_int32(pixel ^ first).add_(second))
    return bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _mix_int32(x: Tensor) -> Tensor:
    """`_mix` where shifts are arithmetic: torch shifts no uint32."""
    x = x.bitwise_xor_((x >> 16) & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x = x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)
