"""Does the audit let honest networks stand, and nothing else? Small digits networks of known truth, made on the spot.

    python benchmarks/verdict_trial.py [--seeds 5] [--budget quick] [--images 100] [--out FOLDER]

Honest ones: four recipes x two radii x `--seeds`. None may raise a flag of strength; claims 3 points below what it has and
1 above must stand, 10 above must not. Masked ones: a noise-trained network behind each of MASKS. None may stand, at a claim
near what was measured neither. Five seeds take about 15 minutes of one core's time at 100 images. With `--out`, what an
earlier run measured there is not measured again.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rush_bench as rb
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.finding import Finding
from rush_bench.audits.run import judge, probe
from rush_bench.audits.settle import Budget, settle
from rush_bench.audits.verdict import ABOVE_CHANCE, STRENGTH, Claim
from rush_bench.datasets import Images
from rush_bench.threats import Threat

SHAPE, RADII = (1, 16, 16), (8 / 255, 0.1)


def plain() -> nn.Module:
    """A convolution and two linear layers."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    """BatchNorm, SiLU, max-pooling, and a 1x1 convolution for a head."""
    first, second = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 2, 1)
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Unflatten(1, (128, 1, 1)), nn.Conv2d(128, 10, 1), nn.Flatten())
    return nn.Sequential(first, nn.BatchNorm2d(16), nn.SiLU(), nn.MaxPool2d(2), second, nn.SiLU(), *head)


def noisy(x: Tensor, y: Tensor, network: nn.Module, eps: float) -> Tensor:
    """Gaussian noise in place of an attack."""
    return x + 0.25 * torch.randn_like(x)


def attacked(x: Tensor, y: Tensor, network: nn.Module, eps: float) -> Tensor:
    """PGD in five steps (Madry et al. 2017)."""
    start = x + eps * (2 * torch.rand_like(x) - 1)
    for _ in range(5):
        at = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(at), y), at)
        start = (start + 0.4 * eps * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return start


Views = Callable[[Tensor, Tensor, nn.Module, float], Tensor]
# network, what it is trained on, epochs
RECIPES: dict[str, tuple[Callable[[], nn.Module], Views, int]] = {
    "plain": (plain, lambda x, y, network, eps: x, 15),
    "noise": (plain, noisy, 30),
    "pgd_at": (plain, attacked, 15),
    "convolutional": (convolutional, noisy, 15),
}


def trained(recipe: str, eps: float, seed: int) -> nn.Module:
    """A network of a recipe on the training digits, in eval mode."""
    make, views, epochs = RECIPES[recipe]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        data, network = rb.load_dataset("digits", split="train"), make()
        x, y = data.floats(), data.labels
        optimiser = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                loss = F.cross_entropy(network(views(x[rows], y[rows], network, eps)), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return network.eval()


class Step(torch.autograd.Function):
    """A function of the input with another's gradient: `forward(x)`, `backward(upstream)`."""

    @staticmethod
    def forward(ctx, x, forward, backward):  # type: ignore[no-untyped-def]
        ctx.way = backward
        return forward(x)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return ctx.way(upstream), None, None


class Masked(nn.Module):
    """The network fed a function of its input, its logits times `factor`."""

    def __init__(self, network: nn.Module, before: Callable[[Tensor], Tensor], factor: float = 1.0) -> None:
        super().__init__()
        self.network, self.before, self.factor = network, before, factor
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.network(self.before(x))


def _grey(x: Tensor) -> Tensor:
    return (255 * x).round() / 255


def _some(share: float) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < share


MASKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "rounded": lambda net: Masked(net, _grey),
    "rounded, logits x 1e-7": lambda net: Masked(net, _grey, 1e-7),
    "wrong sign on a quarter": lambda net: Masked(
        net, lambda x: Step.apply(x, torch.clone, lambda g: torch.where(_some(0.25), -g, g))
    ),
    "scaled by pixel": lambda net: Masked(
        net, lambda x: Step.apply(x, torch.clone, lambda g: torch.where(_some(0.5), 1e-3 * g, g))
    ),
    "half detached": lambda net: Masked(net, lambda x: torch.where(_some(0.5), x.detach(), x)),
    "shattered": lambda net: Masked(net, lambda x: x + 0.01 * torch.sin(1e3 * x)),
}


@dataclass(frozen=True)
class Tried:
    """What an audit found of a network: its evidence and probes, from which every claim is judged."""

    evidence: Evidence
    probes: list[Finding]

    @property
    def worst(self) -> float:
        """The worst case that was measured, a fraction."""
        assert self.evidence.worst is not None
        return self.evidence.worst.estimate.value

    def word(self, claim: float) -> str:
        """The verdict on a claim."""
        said = judge(self.evidence, self.probes, Claim(min(claim, 1.0), "trial")).verdict
        assert said is not None
        return said.word

    def flags(self) -> list[str]:
        """The flags of strength."""
        findings = judge(self.evidence, self.probes, Claim(1.0, "trial")).findings
        return [f.check for f in findings if f.check in STRENGTH and f.status in ("flag", "bug")]

    def honest(self) -> bool:
        """Whether it came out as an honest network must; no claim near chance is ever settled."""
        chance = 1 / int(self.evidence.labels["classes"]) + ABOVE_CHANCE
        near = all(self.word(self.worst + gap) == "stands" for gap in (-0.03, 0.01) if self.worst + gap > chance)
        return near and self.word(self.worst + 0.10) != "stands" and not self.flags()

    def refused(self) -> bool:
        """Whether it came out as a masked network must."""
        return bool(self.flags()) and all(self.word(self.worst + gap) != "stands" for gap in (-0.03, 0.0, 0.01))


def tried(network: nn.Module, name: str, eps: float, data: Images, budget: str | Budget, out: Path) -> Tried:
    """Settle and probe a network at l-inf eps; files go to `out`."""
    defense = rb.Deterministic(network, shape=SHAPE, name=name)
    run = settle([defense], data, budget=budget, eps=eps, store=out / "models", out=out, quiet=True)
    failed = dict(run.failed)
    probes = probe([defense], data, Threat("linf", eps), out, quiet=True, failed=failed)
    if failed or not run.complete:
        raise RuntimeError(f"{name}: {failed or 'not complete'}")
    return Tried(run.evidence[0], probes[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--out", type=Path, help="keep what is measured here (a temporary folder otherwise)")
    args = parser.parse_args()
    data, seeds = rb.load_dataset("digits", split="test", n=args.images), range(args.seeds)
    honest = [(recipe, eps, seed) for recipe in RECIPES for eps in RADII for seed in seeds]
    print(f"{args.seeds} seeds, budget {args.budget}, n={args.images}")
    print("network, worst case, the word on claims 3 points below it, 1 and 10 above, flags of strength")
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        for recipe, eps, seed in honest:
            name = f"{recipe}, eps {eps:.3f}, seed {seed}"
            found = tried(trained(recipe, eps, seed), name, eps, data, args.budget, folder / name)
            wrong += _row(name, found, found.honest())
        for mask, seed in itertools.product(MASKS, seeds):
            name, network = f"{mask}, seed {seed}", MASKS[mask](trained("noise", RADII[1], seed))
            found = tried(network, name, RADII[1], data, args.budget, folder / name)
            wrong += _row(name, found, found.refused())
    print(f"{wrong} wrong of {len(honest)} honest and {len(MASKS) * args.seeds} masked")
    sys.exit(wrong > 0)


def _row(name: str, found: Tried, good: bool) -> bool:
    said = "".join(f"{found.word(found.worst + gap):<12}" for gap in (-0.03, 0.01, 0.10))
    print(f"{name:<34}{100 * found.worst:>6.1f}  {said}{', '.join(found.flags())}{'' if good else '  WRONG'}", flush=True)
    return not good


if __name__ == "__main__":
    main()
