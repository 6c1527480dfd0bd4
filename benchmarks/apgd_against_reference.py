"""Our APGD against pyautoattack's APGD-CE with eot_iter = m, on one smoothed network, the same images, steps and draws.

    python benchmarks/apgd_against_reference.py [--images 60] [--steps 100] [--draws 16]

A small network is trained on noisy digits first (some seconds), then each attack runs in turn, on one thread; times are
processor seconds, so a busy machine does not favour either. Each x' is scored on 400 fresh draws an image, as a defence of
one vote and of 16. The peer gets the plain network with noise added, which is how a user would hand it over; ours gets the
same through `Smoothed`. Asked for: at least twice as fast, at equal or lower accuracy. Also: the agreement without noise.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
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


def timed(attack: Callable[[], Tensor]) -> tuple[Tensor, float]:
    begun = time.process_time()
    attacked = attack()
    return attacked, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=16)
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

    def row(name: str, attacked: Tensor, seconds: float, forwards: float, backwards: float) -> None:
        speed = f"{peer_seconds / seconds:5.2f}x" if seconds else "     -"
        print(
            f"{name:34} {accuracy(attacked)}  {1000 * seconds / n:7.0f} ms  {forwards / n:6.0f} {backwards / n:6.0f}  {speed}"
        )

    print(
        f"{n} digits, linf {args.eps:.4f}, {args.steps} steps, m={args.draws}: accuracy at 1 and 16 votes, CPU time, ", end=""
    )
    print("forward and backward passes an image, speed against the peer")
    peer_seconds = 0.0
    row("clean", images, 0.0, 0, 0)
    for best in (False, True):
        noisy = Noisy(network)
        peer = APGDAttack(noisy, n_iter=args.steps, eps=args.eps, loss="ce", device="cpu", eot_iter=args.draws)
        torch.manual_seed(0)
        attacked, seconds = timed(lambda peer=peer, best=best: peer.perturb(images, labels, best_loss=best))
        peer_seconds = peer_seconds or seconds  # the quicker of the two: it leaves out what is wrong on one noisy pass
        row("pyautoattack APGD-CE" + (", best_loss" if best else ""), attacked, seconds, noisy.forwards, noisy.forwards)
    for loss in ("ce", "ce@vote:3"):
        for precision in ("float32", "bfloat16"):
            mine = Smoothed(network, noise=LAW, votes=1, shape=SHAPE, precision=precision)
            attack = EOTAPGD(steps=args.steps, losses=(loss,), draws=args.draws)
            attacked, seconds = timed(
                lambda a=attack, d=mine: a.run(d, images, labels, threat, Stream(0, "attack", test.index))
            )
            row(f"eot-apgd {loss} {precision}", attacked, seconds, mine.passes.forwards, mine.passes.backwards)

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
