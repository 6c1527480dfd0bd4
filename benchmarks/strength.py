"""Our attacks without AutoAttack, against AutoAttack and brute force, on small networks that are trained on the spot.

    python benchmarks/strength.py [--images 60] [--data-dir DIR] [--seeds 0,1]

Deterministic networks, plain and PGD-trained, on 8x8 digits and (with --data-dir) 16x16 CIFAR-10: the worst case per image of
`pgd` and `eot-apgd-t` against AutoAttack standard. Randomised ones, trained under noise, at one vote: the worst case of `pgd`
and `eot-apgd` against EOT by brute force (m=32, 100 steps, no image leaves) and AutoAttack rand. Which x' is the worst of an
image is decided on one set of draws and scored on another (A2); 400 draws per image. Cost is counted, not timed: rows forward
plus rows backward, per image (`fe`; an input gradient is 2).

Asked for: no higher accuracy anywhere, at a fifth of AutoAttack's cost on the deterministic networks.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rush_bench.attacks.base import Attack
from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses import Defense, Deterministic, Smoothed
from rush_bench.evaluation.score import check, score
from rush_bench.networks import build
from rush_bench.noise import Stream, Uniform
from rush_bench.records.statistics import interval, paired_difference
from rush_bench.registry import attacks
from rush_bench.threats import Threat


@dataclass(frozen=True)
class Subject:
    """A network to train: on noise of this scale, and against PGD of this eps; `eps` of the threat it is then put under."""

    data: str
    noise: float
    trained: float
    eps: float
    epochs: int


SUBJECTS = {
    "digits, plain": Subject("digits", 0.0, 0.0, 0.06, 15),
    "digits, PGD-trained": Subject("digits", 0.0, 0.1, 0.12, 15),
    "CIFAR-10, PGD-trained": Subject("cifar10", 0.0, 4 / 255, 4 / 255, 3),
    "digits, noise": Subject("digits", 0.3, 0.0, 0.12, 15),
    "digits, noise and PGD": Subject("digits", 0.2, 0.08, 0.15, 15),
}


def train(subject: Subject, data: Images, seed: int) -> nn.Module:
    channels, size, _ = data.shape
    spec = {"name": "resnet", "blocks": [1], "width": 8, "classes": 10, "channels": channels, "size": size}
    network = build(spec, seed=seed)
    generator, images, batch = torch.Generator().manual_seed(seed), data.floats(), 64
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=subject.epochs * -(-len(images) // batch))
    for _ in range(subject.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            x, y = images[rows], data.labels[rows]
            noisy = x + Uniform(subject.noise).sample(x.shape, generator)
            if subject.trained:
                noisy = _pgd(network.eval(), noisy, y, subject.trained)
                network.train()
            loss = nn.functional.cross_entropy(network(noisy), y)
            optimiser.zero_grad(), loss.backward(), optimiser.step(), schedule.step()
    return network.eval()


def _pgd(network: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int = 4) -> Tensor:
    moved = images
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(network(moved), labels), moved)
        moved = (moved + eps / 2 * slope.sign()).clamp(images - eps, images + eps)
    return moved.detach()


@dataclass
class Worst:
    """The worst case per image of some attacks: how often right on fresh draws, and the cost of them all."""

    correct: Tensor
    repeats: int
    cost: float

    def row(self, name: str, deterministic: bool) -> str:
        found = interval(self.correct.numpy(), torch.full_like(self.correct, self.repeats).numpy(), deterministic=deterministic)
        return f"  {name:34} {found.value:6.1%} [{found.low:.1%}, {found.high:.1%}]  {self.cost:6.0f} fe"


def worst(makers: Sequence[Attack], defense: Defense, data: Images, threat: Threat, seed: int) -> Worst:
    images, labels, repeats = data.floats(), data.labels, 1 if defense.deterministic else 400
    before = defense.passes.forwards + defense.passes.backwards
    points = [attack.run(defense, images, labels, threat, Stream(seed, "attack", data.index)) for attack in makers]
    cost = (defense.passes.forwards + defense.passes.backwards - before) / len(images)
    for x in points:
        check(x, images, data.index, threat)
    rates = [
        torch.from_numpy(score(defense, x, labels, data.index, Stream(seed, "choose"), repeats)["correct"]) for x in points
    ]
    chosen = torch.stack(points)[torch.stack(rates).argmin(0), torch.arange(len(images))]
    right = score(defense, chosen, labels, data.index, Stream(seed, "score"), repeats)["correct"]
    return Worst(torch.from_numpy(right), repeats, cost)


def compare(name: str, ours: Worst, theirs: Worst) -> str:
    repeats = torch.full_like(ours.correct, ours.repeats).numpy()
    less = paired_difference(ours.correct.numpy(), repeats, theirs.correct.numpy(), repeats)
    missed = int((ours.correct > theirs.correct + 0.1 * ours.repeats).sum())
    gained = int((theirs.correct > ours.correct + 0.1 * ours.repeats).sum())
    share = ours.cost / theirs.cost
    return (
        f"  ours minus {name:23} {less.value:+6.1%} [{less.low:+.1%}, {less.high:+.1%}]  {share:.2f} of its cost; "
        f"right 10 % more often on {missed} images, less often on {gained}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--seeds", default="0", help="of networks and attacks, with commas between")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = {name: attacks.load(name)() for name in ("pgd", "eot-apgd", "eot-apgd-t", "aa", "aa-rand")}
    brute = attacks.load("eot")(draws=32, stop=False)
    for title, subject in SUBJECTS.items():
        if subject.data != "digits" and args.data_dir is None:
            continue
        size = 8 if subject.data == "digits" else 16
        pool = load_dataset(subject.data, "train", None if size == 8 else 5000, size=size, data_dir=args.data_dir)
        test = load_dataset(subject.data, "test", args.images, size=size, data_dir=args.data_dir)
        threat = Threat("linf", subject.eps)
        for seed in map(int, args.seeds.split(",")):
            network = train(subject, pool, seed)
            shape = test.shape
            if subject.noise:
                defense: Defense = Smoothed(network, noise=Uniform(subject.noise), votes=1, shape=shape)
                suites = {"pgd": ("pgd",), "ours": ("pgd", "eot-apgd")}
                peers = {"EOT m=32, 100 steps": [brute], "AutoAttack rand": [made["aa-rand"]]}
            else:
                defense = Deterministic(network, shape=shape)
                suites = {"pgd": ("pgd",), "eot-apgd": ("eot-apgd",), "ours": ("pgd", "eot-apgd-t")}
                peers = {"AutoAttack": [made["aa"]]}
            clean = worst([attacks.load("clean")()], defense, test, threat, seed)
            print(f"{title}, seed {seed}, linf {subject.eps:.4f}, {args.images} images", flush=True)
            print(clean.row("clean", defense.deterministic), flush=True)
            for name, parts in suites.items():
                ours = worst([made[part] for part in parts], defense, test, threat, seed)
                print(ours.row(name, defense.deterministic), flush=True)
            for name, parts in peers.items():
                theirs = worst(parts, defense, test, threat, seed)
                print(theirs.row(name, defense.deterministic), flush=True)
                print(compare(name, ours, theirs), flush=True)


if __name__ == "__main__":
    main()
