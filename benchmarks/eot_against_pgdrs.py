"""EOT-PGD through our interface against torchattacks' PGDRS (the RUSH author's attack): same network, steps, images, m.

    pip install --no-deps torchattacks==3.5.1
    python benchmarks/eot_against_pgdrs.py --data-dir DIR [--images 32] [--steps 5] [--m 16] [--rounds 5]

The network is the ResNet-18 that pyautoattack installs, smoothed with U(-.05, .05); eps is small, so that neither accuracy
is 0. Both attacks start at zero, and step by 2.5 eps / steps. Processor time on one thread, in turn.
Targets: at least 1x with float32, at least 2x with the bfloat16 search (left out on a processor that does not have it); robust
accuracy equal within the interval.
"""

import argparse
from functools import partial

import torch
from clock import interleaved, ratio, spread
from known_point import network
from torch import nn

import rush_bench as rb
from rush_bench.devices import has_bfloat16
from rush_bench.evaluation.score import check, score
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.records.statistics import interval, paired_difference
from rush_bench.registry import attacks
from rush_bench.threats import Threat

SCALE = 0.05


def same_weights() -> nn.Module:
    """The example network's weights in our ResNet-18, which can be folded for attacks; the arithmetic is the same."""
    theirs = network().state_dict()
    ours = build({"name": "resnet18"}).eval()
    names = {}
    for key in theirs:
        ours_key = key.replace("shortcut", "downsample").replace("linear", "head")
        names[ours_key if ours_key.startswith("head") else f"encoder.{ours_key}"] = theirs[key]
    ours.load_state_dict(names)
    return ours


def main() -> None:
    import torchattacks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--m", type=int, default=16)
    parser.add_argument("--eps", type=float, default=0.5 / 255)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = rb.load_dataset("cifar10", "test", args.images, data_dir=args.data_dir)
    images, labels = data.floats(), data.labels
    threat = Threat("linf", args.eps)
    alpha = 2.5 * args.eps / args.steps
    theirs = torchattacks.PGDRS(
        network(), eps=args.eps, alpha=alpha, steps=args.steps, noise_type="uniform", noise_sd=SCALE, noise_batch_size=args.m
    )
    options = {
        "steps": args.steps,
        "step": 2.5 / args.steps,
        "draws": args.m,
        "random_start": False,
        "select_every": args.steps,
    }
    ours = attacks.load("pgd")(**options, select_draws=args.m)
    precisions = ("float32", "bfloat16") if has_bfloat16(torch.device("cpu")) else ("float32",)
    defenses = {p: rb.Smoothed(same_weights(), noise=rb.Uniform(SCALE), votes=1, precision=p) for p in precisions}
    # a user's module that cannot be folded, as PGDRS has it
    defenses["float32, not folded"] = rb.Smoothed(network(), noise=rb.Uniform(SCALE), votes=1)
    names = ("PGDRS", *defenses)
    attacked = {name: torch.empty_like(images) for name in names}

    def run(name: str, most: int = len(images)) -> None:
        for start in range(0, most, args.batch):
            rows = slice(start, start + args.batch)
            if name == "PGDRS":
                attacked[name][rows] = theirs(images[rows], labels[rows])
            else:
                stream = Stream(0, "benchmark", data.index[rows])
                attacked[name][rows] = ours.run(defenses[name], images[rows], labels[rows], threat, stream)

    for name in names:
        run(name, args.batch)  # to warm up
    times = interleaved({name: partial(run, name) for name in names}, args.rounds)
    judge = defenses["float32"]
    scores = {}
    for name, x in attacked.items():
        check(x, images, data.index, threat)
        scores[name] = score(judge, x, labels, data.index, Stream(1, "judge"), 20)
    about = f"{args.images} images, {args.steps} steps, m={args.m}, eps {args.eps:.5f}, {args.rounds} rounds, one thread"
    print(f"{about}, torch {torch.__version__}: processor seconds and speed against PGDRS, median (least to most)")
    reference = scores["PGDRS"]
    for name, taken in times.items():
        found = interval(scores[name]["correct"], scores[name]["repeats"], deterministic=False)
        line = f"{name:20s} {spread(taken)} s  {ratio(times['PGDRS'], taken)}"
        line += f"  robust {found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"
        if name != "PGDRS":
            less = paired_difference(*(s[key] for s in (scores[name], reference) for key in ("correct", "repeats")))
            line += f"  minus PGDRS {less.value:+.1%} [{less.low:+.1%}, {less.high:+.1%}]"
        print(line)


if __name__ == "__main__":
    main()
