"""What full suites cost in GPU hours: passes of an image, as `rush-bench run --plan` counts them, at a rate measured once.

    python benchmarks/scaling.py [--rate PASSES_A_SECOND] [--images N] [--models N]

The rate is that of an H100 (results/h100.txt): EOT at one draw took 5.4 s for 500 images, about 580 passes each as
results/full-size counts them, loading and checks included. Counts are from above: attacks that stop early are counted whole.
"""

import argparse

import torch

from rush_bench.attacks.suites import parse_suite
from rush_bench.bench.plan import passes_of
from rush_bench.datasets import as_images
from rush_bench.defenses.load import of_network
from rush_bench.evaluation import runner
from rush_bench.networks import build
from rush_bench.noise import noise_from

RATE = 54_000


def passes(votes: int, suite: str) -> float:
    """Passes of an image through the network for every column of a suite and its scoring, of a ResNet-18."""
    network = build({"name": "resnet18", "classes": 10, "channels": 3, "size": 32})
    images = as_images(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10), classes=list("abcdefghij"), name="any")
    about = {"name": f"any@{votes}", "about": {"dataset": "any", "model": "any"}, "device": torch.device("cpu")}
    defense = of_network(network, noise_from("uniform:0.3") if votes else None, votes, **about)
    return sum(sum(passes_of(job)) for job in runner.plan(defense, parse_suite(suite), images, 0, None, 500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=1_000)
    args = parser.parse_args()
    print(f"| defence | suite | passes per image | GPU hours per model, {args.images:,} images | {args.models:,} models |")
    print("|---|---|---|---|---|")
    for votes, name in ((0, "deterministic"), (1, "one draw"), (64, "64 votes")):
        for suite in ("linf8-quick", "linf8"):
            each = passes(votes, suite)
            hours = each * args.images / args.rate / 3600
            print(f"| {name} | `{suite}` | {each:,.0f} | {hours:,.2f} | {hours * args.models:,.0f} |")


if __name__ == "__main__":
    main()
