"""Square on a deterministic network against pyautoattack's: the same network, images and queries, none of which breaks.

    python benchmarks/square_against_reference.py [--queries 40] [--rounds 5]

Processor time on one thread, in turn. `network` are the queries' forward passes alone, of the network as it was given: what
the peer cannot do without. Asked for: at least 1.2 times as fast as the peer.
"""

import argparse
import statistics
from functools import partial

import torch
from clock import interleaved, ratio
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from rush_bench.attacks.square import Square
from rush_bench.defenses import Deterministic
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.threats import Threat

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 16, "classes": 10}
KINDS = (("digits, 1x16x16", 1, 16, 50), ("digits, 1x16x16", 1, 16, 200), ("CIFAR-10's shape, 3x32x32", 3, 32, 50))
THREATS = {"linf": 1e-4, "l2": 1e-3}  # so small that every image stands to the end
PEERS = {"linf": "Linf", "l2": "L2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.queries} queries, {args.rounds} rounds, one thread, torch {torch.__version__}")
    print("CPU time per query: ours, the peer's, the network's; speed against the peer: median (least to most)")
    for what, channels, size, n in KINDS:
        network = build({**SPEC, "channels": channels, "size": size}, seed=1).eval()
        defense = Deterministic(network, shape=(channels, size, size))
        images = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            labels = network(images).argmax(1)
        for norm, eps in THREATS.items():
            calls = {
                "ours": partial(ours, defense, images, labels, Threat(norm, eps)),
                "peer": partial(peer, network, images, labels, norm, eps),
                "network": partial(forwards, network, images),
            }
            for call in calls.values():
                call(queries=3)  # to warm up
            times = interleaved({name: partial(call, queries=args.queries) for name, call in calls.items()}, args.rounds)
            each = ", ".join(f"{1000 * statistics.median(seconds) / args.queries:5.2f}" for seconds in times.values())
            print(f"{what:26} {n:4} images {norm:5} {each} ms  {ratio(times['peer'], times['ours'])}", flush=True)


def ours(defense: Deterministic, images: Tensor, labels: Tensor, threat: Threat, queries: int) -> None:
    Square(queries=queries).on(defense).run(defense, images, labels, threat, Stream(0, "square"))


def peer(network: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, queries: int) -> None:
    attack = SquareAttack(network, norm=PEERS[norm], n_queries=queries, eps=eps, device="cpu", resc_schedule=False, seed=0)
    attack.perturb(images, labels)


def forwards(network: nn.Module, images: Tensor, queries: int) -> None:
    with torch.no_grad():
        for _ in range(queries):
            network(images)


if __name__ == "__main__":
    main()
