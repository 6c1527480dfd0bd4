"""Controls for the audit: a small network on digits, the ways to make it look robust that it is not, and sound ones."""

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.audits.evidence import Entry, Evidence
from rush_bench.audits.experiments import BUDGETS, Budget
from rush_bench.datasets import load_dataset
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.records import CellResult
from rush_bench.store import save_model

EPS = 0.1
SHAPE = (1, 16, 16)


class Net(nn.Sequential):
    """Two convolutions and a linear layer, (B, 1, 16, 16) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 4, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
        )


class Killed(torch.autograd.Function):
    """The identity, with no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        return torch.zeros_like(upstream)


class Before(nn.Module):
    """A function of the images, then the network."""

    def __init__(self, function, network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.function(x))


def dct_matrix(size: int = 8) -> Tensor:
    """The orthonormal DCT-II."""
    k, n = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


# JPEG's luminance table (ITU-T T.81, annex K.1), of quality 50
LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).float()


def jpeg(x: Tensor) -> Tensor:
    """JPEG's lossy part on grey images whose sides are multiples of 8: blocks of 8, DCT, rounding by LUMINANCE, and back."""
    matrix, (height, width) = dct_matrix(), x.shape[2:]
    tiles = (255 * x - 128).reshape(-1, height // 8, 8, width // 8, 8).transpose(2, 3)
    kept = (matrix @ tiles @ matrix.T / LUMINANCE).round() * LUMINANCE
    back = (matrix.T @ kept @ matrix).transpose(2, 3).reshape(x.shape)
    return ((back + 128) / 255).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class ResizePad:
    """Random resizing and padding (Xie et al. 2018): a side of `least` to 16 pixels, put anywhere on black."""

    least: int = 14

    def __call__(self, images: Tensor, stream: Stream, draws: int) -> Tensor:
        u = stream.uniform(len(images), draws, (3,), images.device)
        return torch.stack([self.placed(images, row) for row in u.transpose(0, 1).tolist()], 1)

    def placed(self, images: Tensor, drawn: list[list[float]]) -> Tensor:
        """Each image (B, C, H, W) by its numbers for side, top and left, (B, 3) in [0, 1)."""
        height, width = images.shape[2:]
        small = [F.interpolate(images, (side, side), mode="bilinear", antialias=True) for side in range(self.least, height + 1)]
        made = []
        for k, (size, top, left) in enumerate(drawn):
            image = small[int(size * len(small))][k]
            side = image.shape[1]
            y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
            made.append(F.pad(image, (x, width - side - x, y, height - side - y)))
        return torch.stack(made)


class HiddenResizePad(nn.Module):
    """The same as a module that draws from the global generator, as it is usually given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.pad = network, ResizePad()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.pad.placed(x, torch.rand(len(x), 3).tolist()))


class StochasticActivationPruning(nn.Module):
    """Dhillon et al. 2018: of each activation map, units drawn with replacement by their size are kept and scaled up."""

    def __init__(self, network: Net) -> None:
        super().__init__()
        self.layers = nn.ModuleList(network)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                x = self.pruned(x.flatten(1)).view_as(x)
        return x

    def pruned(self, h: Tensor) -> Tensor:
        p = h.detach().clamp_min(1e-9)
        p = p / p.sum(1, keepdim=True)
        count = h.shape[1]
        drawn = torch.multinomial(p, count, replacement=True)
        kept = torch.zeros_like(h).scatter(1, drawn, 1.0)
        return h * kept / -torch.expm1(count * torch.log1p(-p))  # by the chance of being drawn at all


class BatchNormalised(nn.Module):
    """BatchNorm in train mode, in a module that says it is in eval mode: the statistics are those of the batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.batch_norm(x, None, None, training=True))


class Coin(nn.Module):
    """Right with probability 0.9 whatever the input: the label is read off a stripe too bright to hide, then a coin falls."""

    def forward(self, x: Tensor) -> Tensor:
        stripes = x[:, 0, :10].mean(2)  # row k is white where the label is k
        label = stripes.argmax(1)
        wrong = (label + 1 + (9 * torch.rand(len(x), device=x.device)).long().clamp_max(8)) % 10
        shown = torch.where(torch.rand(len(x), device=x.device) < 0.9, label, wrong)
        return 3 * F.one_hot(shown, 10) + stripes.softmax(1)


def fit(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    attacked: bool = False,
    batch: int = 100,
    lr: float = 3e-3,
    sigma: float = 0.0,
):
    """Adam on cross-entropy, on PGD-3 at EPS if `attacked`, under Gaussian noise of `sigma`; seeded, and back in eval mode."""
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            images = x[rows]
            if attacked:
                images = pgd(network, images, y[rows], EPS * min(1.0, (epoch + 1) / (epochs / 2)), generator)
            if sigma:
                images = images + sigma * torch.randn(images.shape, generator=generator)
            optimiser.zero_grad()
            F.cross_entropy(network(images), y[rows]).backward()
            optimiser.step()
    return network.eval().requires_grad_(False)


def pgd(network: nn.Module, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    x = (images + eps * (2 * torch.rand(images.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(3):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), labels), x)
        x = (x.detach() + 0.4 * eps * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return x


def made(network: type[nn.Module] | nn.Module, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network()


class Scaled(nn.Module):
    """The network's logits through a function."""

    def __init__(self, network: nn.Module, function) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.network(x))


def striped(labels: Tensor) -> Tensor:
    """Images for the coin: row k is white where the label is k, all else grey."""
    images = torch.full((len(labels), *SHAPE), 0.5)
    images[torch.arange(len(labels)), 0, labels] = 1.0
    return images


@pytest.fixture(scope="session")
def zoo() -> SimpleNamespace:
    """Trained networks (`base`, `robust`, `line`), what was made of `base` to look robust (`broken`), and test images.

    `broken["normalised"]` is a network for (x - mean) / std that is fed x; `inside` is the same done right.
    """
    train, test = load_dataset("digits", "train", 800), load_dataset("digits", "test", 200)
    x, y = train.floats(), train.labels
    mean, std = 0.5, 0.05
    base = fit(made(Net), x, y, 12)
    normalised = fit(made(Net, 2), (x - mean) / std, y, 12, lr=1e-3)
    rows = (base(test.floats()).argmax(1) == test.labels).nonzero()[:40, 0]
    broken = {
        "killed gradient": Before(Killed.apply, base),
        "quantised": Before(lambda images: (4 * images).round() / 4, base),
        "jpeg": Before(jpeg, base),
        "temperature": Scaled(base, lambda logits: 1000 * logits),
        "sigmoids": Scaled(base, torch.sigmoid),
        "probabilities": Scaled(base, lambda logits: logits.softmax(1)),
        "detached": Before(torch.Tensor.detach, base),
        "normalised": normalised,
        "batch statistics": BatchNormalised(base),
        "pruned": StochasticActivationPruning(base),
        "resized": HiddenResizePad(base),
    }
    return SimpleNamespace(
        base=base,
        robust=fit(made(Net, 1), x, y, 8, attacked=True, batch=50, lr=6e-3),
        line=fit(made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 10))), x, y, 20),
        inside=Before(lambda images: (images - mean) / std, normalised).eval(),
        broken={name: network.eval() for name, network in broken.items()},
        images=test.floats()[rows],
        labels=test.labels[rows],
        resize_pad=ResizePad(),
        coin=Coin().eval(),
        striped=striped,
        dct_matrix=dct_matrix,
        jpeg=jpeg,
        eps=EPS,
        shape=SHAPE,
    )


def made_entry(does, experiment: str, trial: str, correct, repeats=1, *, attack="eot-apgd", complete=True, votes=4, **labels):
    """A trial with a record made by hand: `correct` (n,) right predictions of `repeats`."""
    right = np.asarray(correct)
    of = np.broadcast_to(np.asarray(repeats), right.shape)
    deterministic = bool((of == 1).all()) and votes == 0
    said = {"experiment": experiment, "trial": trial, "attack": attack, "on": "", "scale": 1.0, "norm": "linf", "eps": 0.1}
    said |= {"defense": f"made@{votes}", "dataset": "made", "split": "test", "deterministic": deterministic, "n": len(right)}
    extra, settings = labels.pop("columns", {}), {"queries": 1_000, "points": 20, "draws": 64}
    settings |= {**does(experiment, trial), **labels.pop("settings", {})}
    said |= labels
    who = {"weights": "w", "noise": {"law": "gaussian", "scale": 0.5}, "votes": votes, "outputs": "logits"}
    identity = {"defense": who, "attack": {"name": attack, **settings}, "threat": {"norm": said["norm"], "eps": said["eps"]}}
    identity |= {"repeats": int(of[0])}
    result = CellResult(identity, said, Path(f"{experiment}-{trial}"), 1, int(complete))
    columns = {"index": np.arange(len(right)), "label": 0, "correct": right, "repeats": of, **extra}
    result.__dict__["frame"] = pd.DataFrame(columns)
    return Entry(experiment, trial, result)


def made_certificate(bounds, radii, n: int, votes_noise=0.5) -> CellResult:
    """A certificate of the same defence: lower bounds on the label's probability, and radii (l2)."""
    who = {"weights": "w", "noise": {"law": "gaussian", "scale": votes_noise}, "outputs": "logits"}
    identity = {"defense": who, "attack": {"name": "certify", "alpha": 0.001, "dimension": 256, "draws": 1000}}
    identity |= {"threat": {"norm": "l2", "eps": None}, "images": "i"}
    result = CellResult(identity, {"dataset": "made", "split": "test", "norm": "l2", "n": n}, Path("certificate"), 1, 1)
    columns = {"index": np.arange(n), "label": 0, "predict": 0, "bound": bounds, "radius": radii, "correct": 1, "repeats": 1}
    result.__dict__["frame"] = pd.DataFrame(columns)
    return result


def made_evidence(*entries: Entry, certificates=(), deterministic=False, **labels) -> Evidence:
    said = {
        "norm": "linf",
        "eps": 0.1,
        "diameter": 0.8,
        "classes": 10,
        "deterministic": deterministic,
        "dataset": "made",
        "n": 100,
    }
    return Evidence("made", {**said, "budget_name": "own", **labels}, entries, tuple(certificates))


@pytest.fixture(scope="session")
def made_by_hand(does) -> SimpleNamespace:
    """Evidence without a network: `entry`, `certificate`, `evidence`, and `share(n, q)`, (n,) of which q are 1."""

    def share(q: float, n: int = 100) -> np.ndarray:
        return (np.arange(n) < round(q * n)).astype(int)

    return SimpleNamespace(
        entry=functools.partial(made_entry, does), certificate=made_certificate, evidence=made_evidence, share=share
    )


@pytest.fixture(scope="session")
def tiny() -> Budget:
    """A budget that settles a small digits network in seconds."""
    return dataclasses.replace(
        BUDGETS["quick"],
        points=10,
        sweep=(1, 4, 16),
        steps=10,
        draws=4,
        lengths=(5, 10, 20),
        restarts=2,
        losses_steps=10,
        rand=(4,),
        rand_steps=4,
        banks=(8,),
        part_steps=15,
        queries=(20,),
        sweep_steps=10,
        votes=(1, 4),
        certificate=400,
        published={"steps": 2, "queries": 10, "targets": 1},
        long=20,
        targets=2,
    )


@pytest.fixture(scope="session")
def noisy() -> nn.Module:
    """A network trained under Gaussian noise of deviation 1: what smoothing is made for."""
    train = load_dataset("digits", "train", 800)
    return fit(made(Net, 3), train.floats(), train.labels, 40, sigma=1.0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one network for digits, as it was drawn: a source of transfer and another arm of experiments."""
    shape = {"name": "resnet", "blocks": [1], "width": 8, "classes": 10, "channels": 1, "size": 16}
    network = made(lambda: build(shape)).eval()
    card = {"name": "other-digits", "recipe": "simclr", "dataset": "digits", "pretrain_dataset": "digits", "protocol": "SLF"}
    card |= {"extra_data": None, "preset": "smoke", "network": network.spec, "noise": None, "votes": [0], "settings": {}}
    store = tmp_path_factory.mktemp("store") / "models"
    save_model(store / "other-digits", card, network.state_dict())
    return store
