"""What the runner costs over the bare forward and gradient calls that it makes. Target: at most 5 %.

    python benchmarks/harness_overhead.py

PGD on a smoothed ResNet through `rb.attack` (noise, records, files, locks, scoring), against a loop that calls the network
and autograd alone, on the same numbers of rows with ready-made noise. Rounds alternate; the quotient of the sums is printed.
"""

import time

import torch

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite
from rush_bench.evaluation.runner import attack
from rush_bench.networks import build

STEPS, VOTES, IMAGES, REPEATS, SELECT = 10, 8, 24, 4, 32
ROUNDS = 2


def main() -> None:
    network = build({"name": "resnet18"}).eval()
    folded = network.folded().to(memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(0)
    images = rb.as_images(
        torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=random, dtype=torch.uint8), torch.arange(IMAGES) % 10
    )
    defense = rb.Smoothed(network, noise=rb.Uniform(0.3), votes=VOTES, name="net@8")
    suite = parse_suite("linf8-quick", only=("pgd",), overrides={"pgd.select_every": STEPS, "pgd.select_draws": SELECT})
    rows = defense.body.block(VOTES) // VOTES * VOTES  # whole images, as the defence cuts them
    totals = [0.0, 0.0]
    for round_ in range(ROUNDS + 1):
        begun = time.perf_counter()
        attack([defense], suite, images, repeats=REPEATS, seed=round_, quiet=True)  # into a temporary folder
        harness = time.perf_counter() - begun
        begun = time.perf_counter()
        gradient_rows(folded, IMAGES * VOTES * STEPS, rows)
        forward_rows(network, IMAGES * (SELECT + VOTES * REPEATS), 4 * defense.body.block(VOTES) // VOTES * VOTES)
        bare = time.perf_counter() - begun
        if round_:  # the first one warms up
            totals = [totals[0] + harness, totals[1] + bare]
    print(f"{IMAGES} images, {STEPS} steps, {VOTES} votes, {ROUNDS} rounds, threads {torch.get_num_threads()}")
    print(f"harness {totals[0]:.1f} s, bare calls {totals[1]:.1f} s: {totals[0] / totals[1] - 1:+.1%} (target at most +5 %)")


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
