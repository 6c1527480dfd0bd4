"""Attacks and views of other packages against ours, on the same network, images and steps, without noise.

    pip install foolbox adv-lib adversarial-robustness-toolbox lightly; pip install --no-deps torchattacks==3.5.1
    python benchmarks/peers.py [--images 64] [--steps 10] [--batch 128] [--rounds 5]

PGD with cross-entropy from a random start at l-inf 8/255, float32; no network learns, so that no gradient of a weight is asked
of anybody. The first of our rows gets what the peers get, a module that cannot be folded; the second is a user's default, our
own network with BatchNorm folded. `fe` are forward equivalents per image, a row forward being 1 and its input gradient 2; those
that a package makes to check its result are counted. Robust accuracy is of a network made on the spot.

Then a batch of SimCLR's two views, and a whole step of it (views, encoder, projection, NT-Xent, SGD), against lightly's.
Processor time on one thread, in turn; a package that is not installed is left out.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from clock import interleaved, ratio, spread
from torch import Tensor, nn
from training_step import step_of

import rush_bench as rb
from rush_bench.datasets.views import SimCLRViews
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.registry import attacks
from rush_bench.threats import Threat
from rush_bench.training.loop import train_step

EPS, NETWORK = 8 / 255, {"name": "resnet18", "width": 16}
Attack = Callable[[Tensor, Tensor], Tensor]


class Counted(nn.Module):
    """A network that counts its rows: forward 1, and 2 where a gradient is recorded, which goes back once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.fe = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.fe += len(images) * (2 if images.requires_grad else 1)
        return self.network(images)


def peers(network: nn.Module, steps: int, step: float) -> dict[str, Attack]:
    """PGD of every package that is installed, by its name: images (B, C, H, W) and labels to x'."""
    found: dict[str, Attack] = {}
    if find_spec("torchattacks"):
        import torchattacks

        found["torchattacks"] = torchattacks.PGD(network, eps=EPS, alpha=step, steps=steps, random_start=True)
    if find_spec("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=True)
        found["foolbox"] = lambda images, labels: attack(model, images, labels, epsilons=EPS)[1]
    if find_spec("adv_lib"):
        from adv_lib.attacks import pgd_linf

        found["adv-lib"] = lambda images, labels: pgd_linf(network, images, labels, EPS, steps=steps, absolute_step_size=step)
    if find_spec("art"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu")
        options = {"eps": EPS, "eps_step": step, "max_iter": steps, "num_random_init": 1, "batch_size": 4096}
        art = ProjectedGradientDescentPyTorch(classifier, **options, verbose=False)
        found["ART"] = lambda images, labels: torch.from_numpy(art.generate(images.numpy(), labels.numpy()))
    return found


def attack(count: int, steps: int, rounds: int) -> None:
    step = 2.5 * EPS / steps
    network = build(NETWORK, seed=0).eval().requires_grad_(False)
    counted = Counted(network).eval()
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = rb.as_images(pixels, network(pixels / 255).argmax(1), classes=list("0123456789"))
    images, labels, threat = data.floats(), data.labels, Threat("linf", EPS)
    pgd = attacks.load("pgd")(steps=steps, step=step / EPS)
    ours = {
        "ours, the same module": rb.Deterministic(nn.Sequential(network).eval()),
        "ours, our network": rb.Deterministic(network),
    }

    def run(defense: rb.Defense, images: Tensor, labels: Tensor) -> Tensor:
        return pgd.run(defense, images, labels, threat, Stream(0, "benchmark", data.index))

    ways = peers(counted, steps, step) | {name: partial(run, defense) for name, defense in ours.items()}
    costs, robust = {}, {}
    for name, way in ways.items():  # to warm up
        counted.fe = 0
        before = {label: defense.passes.forwards + defense.passes.backwards for label, defense in ours.items()}
        x = way(images, labels)
        assert ((x - images).abs() <= EPS + 1e-6).all() and (x >= 0).all() and (x <= 1).all(), name
        spent = {label: defense.passes.forwards + defense.passes.backwards - before[label] for label, defense in ours.items()}
        costs[name] = spent.get(name, counted.fe) / count
        robust[name] = float((network(x).argmax(1) == labels).float().mean())
    times = interleaved({name: partial(way, images, labels) for name, way in ways.items()}, rounds)
    print(f"PGD, {count} images, {steps} steps: seconds, times as slow as ours on the same module, fe per image, robust")
    for name, taken in times.items():
        than = ratio(taken, times["ours, the same module"])
        print(f"  {name:22} {spread(taken)}  {than}  {costs[name]:5.1f} fe  {robust[name]:.1%}")


def views(batch: int, rounds: int) -> None:
    if not find_spec("lightly"):
        return
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = rb.as_images(pixels, torch.arange(batch) % 10)
    pictures = [Image.fromarray(np.ascontiguousarray(each)) for each in pixels.permute(0, 2, 3, 1).numpy()]
    transform = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)  # 0.4, 0.4, 0.4, 0.1 as ours

    def their_views() -> list[Tensor]:
        return [torch.stack(view) for view in zip(*map(transform, pictures), strict=True)]

    def our_views() -> list[Tensor]:
        make, images = SimCLRViews(), data.floats()
        return [make(images, random) for _ in range(2)]

    encoder = build(NETWORK).encoder.to(memory_format=torch.channels_last).train()
    head, loss = SimCLRProjectionHead(128, 128, 128), NTXentLoss(temperature=0.5)
    theirs = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)

    def their_step() -> None:
        first, second = (head(encoder(view.contiguous(memory_format=torch.channels_last))) for view in their_views())
        theirs.zero_grad()
        loss(first, second).backward()
        theirs.step()

    our_step = partial(train_step, *step_of("simclr", build(NETWORK), data))
    ways: dict[str, Callable[[], Any]] = {"views": our_views, "lightly's views": their_views}
    ways |= {"step": our_step, "lightly's step": their_step}
    for way in ways.values():
        way()  # to warm up
    times = interleaved(ways, rounds)
    print(f"SimCLR, batch {batch}: seconds, times as slow as ours")
    for name, taken in times.items():
        than = ratio(taken, times[name.removeprefix("lightly's ")])
        print(f"  {name:22} {spread(taken)}  {than}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("images", 64), ("steps", 10), ("batch", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.rounds} rounds, one thread, torch {torch.__version__}, {NETWORK}; median (least to most)")
    attack(args.images, args.steps, args.rounds)
    views(args.batch, args.rounds)


if __name__ == "__main__":
    main()
