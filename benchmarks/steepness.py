"""At which scale of the logits does cross-entropy break most? What `rush_bench.defenses.aggregate.APART` rests on.

    python benchmarks/steepness.py [--data-dir DIR] [--store models] [--images 200] [--eps 8/255]

Deterministic networks of `models/`, whose weights are in the repository, on test images of CIFAR-10: the accuracy that
PGD-10 and APGD-CE of 20 steps (ours) leave, with logits as they are and multiplied, each image's by itself, so that the largest
is at least so far above the smallest where the attack begins. The classifier is the same in every column of a row. What the
margin and DLR towards nine targets leave is beside it: those know no scale.
"""

import argparse
from pathlib import Path

import torch

import rush_bench.defenses.aggregate as aggregate
from rush_bench.attacks.apgd import EOTAPGD, TargetedEOTAPGD
from rush_bench.attacks.base import Attack
from rush_bench.attacks.pgd import PGD
from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses import Network, load_defense
from rush_bench.defenses.body import usual_spread
from rush_bench.noise import Stream
from rush_bench.settings import radius
from rush_bench.threats import Threat

SPREADS = (5, 7, 10, 20, 40, 80)
MODELS = ("ssp_rotation", "pgd_at", "trades", "rush-slf", "rocl", "free", "dynacl", "simclr", "deacl", "standard")


def left(defense: Network, attack: Attack, data: Images, threat: Threat) -> str:
    """Accuracy in percent, chunks of 50 images."""
    right = 0
    for rows in torch.arange(len(data)).split(50):
        images, labels, stream = data.floats()[rows], data.labels[rows], Stream(0, "attack", rows)
        attacked = attack.run(defense, images, labels, threat, stream)
        right += int((defense.predict(attacked, stream).labels == labels).sum())
    return f"{100 * right / len(data):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--store", default="models", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--eps", type=radius, default=8 / 255)
    parser.add_argument("--models", nargs="*", default=[f"{name}-c10-tiny" for name in MODELS])
    options = parser.parse_args()
    data = load_dataset("cifar10", "test", n=options.images, data_dir=options.data_dir)
    threat = Threat("linf", options.eps)
    print(f"PGD-10 / APGD-CE-20, {len(data)} images, l-inf {options.eps:.4f}; columns: logits apart (largest less smallest)")
    print(f"{'network':22}  apart  {'as they are':>11}  " + "  ".join(f"{spread:>11}" for spread in SPREADS) + "  targeted")
    for name in options.models:
        defense = load_defense(name, store=options.store)
        assert isinstance(defense, Network)
        own, cells = usual_spread(defense.predict(data.floats(), Stream(0, "spread")).logs), []
        for spread in (0, *SPREADS):
            aggregate.APART, steeper = float(spread), spread > 0
            tried = (PGD(steps=10, steeper=steeper), EOTAPGD(steps=20, losses=("ce",), steeper=steeper))
            cells.append(" / ".join(left(defense, attack, data, threat) for attack in tried))
        row = "  ".join(f"{cell:>11}" for cell in cells)
        print(f"{name:22}  {own:5.1f}  {row}  {left(defense, TargetedEOTAPGD(), data, threat):>8}", flush=True)


if __name__ == "__main__":
    main()
