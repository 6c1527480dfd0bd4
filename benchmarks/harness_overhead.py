"""What the runner costs over the bare forward and gradient calls that it makes. Target: at most 5 %.

    python benchmarks/harness_overhead.py [--images 96] [--rounds 5]

PGD on a smoothed ResNet-18 of width 16 through `rb.attack` (noise, records, files, locks, scoring), against a loop that calls
the network and autograd alone, on the same numbers of rows with ready-made noise, and the look at gradients that a chunk begins
with: it costs as much whatever the attack is, so that in a cell as small as this one it is a share of its own.
Processor time on one thread, in turn.
"""

import argparse
from itertools import count

import torch
from clock import interleaved, ratio, spread

import rush_bench as rb
from rush_bench.attacks.health import health
from rush_bench.attacks.suites import parse_suite
from rush_bench.evaluation.runner import attack
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.threats import Threat

STEPS, VOTES, REPEATS, SELECT = 10, 8, 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = build({"name": "resnet18", "width": 16}).eval()
    folded = network.folded().to(memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(0)
    images = rb.as_images(
        torch.randint(0, 256, (args.images, 3, 32, 32), generator=random, dtype=torch.uint8), torch.arange(args.images) % 10
    )
    defense = rb.Smoothed(network, noise=rb.Uniform(0.3), votes=VOTES, name="net@8")
    suite = parse_suite("linf8-quick", only=("pgd",), overrides={"pgd.select_every": STEPS, "pgd.select_draws": SELECT})
    rows = defense.body.block(VOTES) // VOTES * VOTES  # whole images, as the defence cuts them
    seeds = count()  # a cell of its own each time

    def harness() -> None:
        attack([defense], suite, images, repeats=REPEATS, seed=next(seeds), quiet=True)  # into a temporary folder

    def bare() -> None:
        gradient_rows(folded, args.images * VOTES * STEPS, rows)
        forward_rows(network, args.images * (SELECT + VOTES * REPEATS), 4 * defense.body.block(VOTES) // VOTES * VOTES)

    def look() -> None:
        health(defense, images.floats(), images.labels, Threat("linf", 8 / 255), Stream(next(seeds), "gradients", images.index))

    ways = {"harness": harness, "bare": bare, "look": look}
    for way in ways.values():
        way()  # to warm up
    times = interleaved(ways, args.rounds)
    print(f"{args.images} images, {STEPS} steps, {VOTES} votes, {args.rounds} rounds, one thread, torch {torch.__version__}")
    print(f"processor seconds, median (least to most): {', '.join(f'{name} {spread(taken)}' for name, taken in times.items())}")
    made = [bare + look for bare, look in zip(times["bare"], times["look"], strict=True)]
    print(f"harness / (bare calls and the look): {ratio(times['harness'], made)} (target at most 1.05)")


def gradient_rows(network: torch.nn.Module, count: int, rows: int) -> None:
    """Forward and input gradient of `count` rows, in blocks."""
    for start in range(0, count, rows):
        x = torch.rand(min(rows, count - start), 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
        torch.autograd.grad(network(x).logsumexp(1).sum(), x)


@torch.inference_mode()
def forward_rows(network: torch.nn.Module, count: int, rows: int) -> None:
    """Forward of `count` rows, in blocks."""
    for start in range(0, count, rows):
        network(torch.rand(min(rows, count - start), 3, 32, 32))


if __name__ == "__main__":
    main()
