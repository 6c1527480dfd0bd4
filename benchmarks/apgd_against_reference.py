"""Our APGD against pyautoattack's APGD-CE with eot_iter = m, on one smoothed network, the same images, steps and draws.

    python benchmarks/apgd_against_reference.py [--images 60] [--steps 100] [--draws 16] [--rounds 5]

A small network is trained on noisy digits first (some seconds), then the attacks run in turn, on one thread; times are
processor seconds. Each x' is scored on 400 fresh draws per image, as a defence of one vote and of 16. The peer gets the plain
network with noise added, which is how a user would hand it over; ours gets the same through `Smoothed`. The first of our rows
has the peer's loss and precision, the second our default loss. Asked for: at least twice as fast, at equal or lower accuracy.

`fe` are forward equivalents per image, a row forward being 1 and its input gradient 2. `bound` is what the first row could
reach at best: the peer's fe over ours, times the cost of a row of the plain network over one of the network that we search
(BatchNorm folded, channels_last), both without noise. Also: the agreement without noise.
"""

import argparse
import statistics
import warnings
from functools import partial

import torch
from clock import interleaved, ratio
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.datasets import load_dataset
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.evaluation.score import score
from rush_bench.networks import build
from rush_bench.noise import Stream, Uniform
from rush_bench.threats import Threat

LAW, SHAPE = Uniform(0.3), (1, 16, 16)


class Noisy(nn.Module):
    """The network on one noisy copy an image, noise from the global generator: what the peer's `eot_iter` averages over."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.forwards = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        return self.network(images + LAW.scale * (2 * torch.rand_like(images) - 1))


def train(epochs: int = 8) -> nn.Module:
    data = load_dataset("digits", "train")
    network = build({"name": "resnet", "blocks": [1, 1], "width": 16, "classes": 10, "channels": 1, "size": 16}, seed=1)
    optimiser = torch.optim.Adam(network.parameters())
    generator, images, batch = torch.Generator().manual_seed(0), data.floats(), 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            loss = nn.functional.cross_entropy(
                network(images[rows] + LAW.sample(images[rows].shape, generator)), data.labels[rows]
            )
            optimiser.zero_grad(), loss.backward(), optimiser.step(), schedule.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eps", type=float, default=24 / 255)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    network, test = train(), load_dataset("digits", "test", n=args.images)
    images, labels, threat, n = test.floats(), test.labels, Threat("linf", args.eps), args.images

    def accuracy(attacked: Tensor) -> str:
        rates = []
        for votes in (1, 16):
            judge = Smoothed(network, noise=LAW, votes=votes, shape=SHAPE)
            repeats = 400 // votes
            right = score(judge, attacked, labels, test.index, Stream(9, "score"), repeats)["correct"].mean() / repeats
            rates.append(f"{right:7.1%}")
        return "  ".join(rates)

    noisy, ours = Noisy(network), Smoothed(network, noise=LAW, votes=1, shape=SHAPE)
    found: dict[str, Tensor] = {}
    passes: dict[str, tuple[int, int]] = {}

    def peer(best_loss: bool, steps: int = args.steps) -> None:
        attack = APGDAttack(noisy, n_iter=steps, eps=args.eps, loss="ce", device="cpu", eot_iter=args.draws)
        noisy.forwards = 0
        torch.manual_seed(0)
        name = "pyautoattack APGD-CE" + ", best_loss" * best_loss
        found[name], passes[name] = attack.perturb(images, labels, best_loss=best_loss), (noisy.forwards, noisy.forwards)

    def mine(loss: str, steps: int = args.steps) -> None:
        ours.passes.forwards = ours.passes.backwards = 0
        attack, name = EOTAPGD(steps=steps, losses=(loss,), draws=args.draws), f"eot-apgd {loss}"
        found[name] = attack.run(ours, images, labels, threat, Stream(0, "attack", test.index))
        passes[name] = ours.passes.forwards, ours.passes.backwards

    ways = {
        "pyautoattack APGD-CE": partial(peer, False),
        "pyautoattack APGD-CE, best_loss": partial(peer, True),
        "eot-apgd ce": partial(mine, "ce"),
        "eot-apgd ce@vote:3": partial(mine, "ce@vote:3"),
    }
    for way in ways.values():
        way(steps=2)  # to warm up
    times = interleaved(ways, args.rounds)
    first, _, same, _ = ways
    print(
        f"{n} digits, linf {args.eps:.4f}, {args.steps} steps, m={args.draws}, float32, one thread, {args.rounds} rounds, "
        f"torch {torch.__version__}: accuracy at 1 and 16 votes, CPU time and fe per image, speed against the peer"
    )
    print(f"{'clean':34} {accuracy(images)}")
    for name, seconds in times.items():
        forwards, backwards = passes[name]
        cost = f"{1000 * statistics.median(seconds) / n:6.0f} ms {(forwards + backwards) / n:6.0f} fe"
        print(f"{name:34} {accuracy(found[name])} {cost}  {ratio(times[first], seconds)}")
    rows = torch.rand(args.images, *SHAPE, requires_grad=True)
    block = torch.rand(ours.body.block(args.draws), *SHAPE, requires_grad=True)
    repeats = 40

    def gradients(network: nn.Module, rows: Tensor, count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(network(rows).logsumexp(1).sum(), rows)

    each = {
        "plain": partial(gradients, network, rows, repeats),
        "searched": partial(gradients, ours.body.search, block, round(repeats * len(rows) / len(block))),
    }
    for way in each.values():
        way()
    row = {name: statistics.median(seconds) for name, seconds in interleaved(each, args.rounds).items()}
    fe = sum(passes[first]) / sum(passes[same])
    print(f"bound: fe {fe:.2f} x row {row['plain'] / row['searched']:.2f} = {fe * row['plain'] / row['searched']:.2f}")
    agree(network)


def agree(network: nn.Module) -> None:
    """Without noise, from the same starts, image by image, on 200 digits."""
    test = load_dataset("digits", "test", n=200)
    images, labels, stream = test.floats(), test.labels, Stream(0, "attack", test.index)
    for norm, eps, loss in (("linf", 8 / 255, "ce"), ("linf", 16 / 255, "ce"), ("linf", 16 / 255, "dlr"), ("l2", 0.5, "ce")):
        threat = Threat(norm, eps)
        attacked = EOTAPGD(losses=(loss,)).run(Deterministic(network, shape=SHAPE), images, labels, threat, stream)
        peer = APGDAttack(network, n_iter=100, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, loss=loss, device="cpu")
        peer.init_hyperparam(images)
        _, right, _, _ = peer.attack_single_run(images, labels, x_init=threat.start(images, stream.named(f"start/{loss}/0")))
        with torch.no_grad():
            mine = network(attacked).argmax(1) == labels
        theirs = right.bool()
        rates = (
            f"right {mine.float().mean():.1%}, peer {theirs.float().mean():.1%}, agree {(mine == theirs).float().mean():.1%}"
        )
        print(f"no noise, {norm} {eps:.4f} {loss}: {rates}")


if __name__ == "__main__":
    main()
