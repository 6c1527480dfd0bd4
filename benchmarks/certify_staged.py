"""Forward passes that `staged` certificates save against `fixed` ones, in one run on one network.

    python benchmarks/certify_staged.py [--images 200] [--sigma 0.25] [--draws 100000]

A small network is trained on the built-in digits under Gaussian noise (seconds), then the same test images are certified
both ways at N0 = 100, alpha = 0.001, on the same draws. Printed: forward passes of each, their ratio, seconds, and the
certified accuracy of both at the radii that `staged` settles (0 and thirds of the largest radius unless given).
Exit code 1 unless the ratio is at least 15 and no settled radius differs by more than 0.5 points.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from rush_bench.certify import Sampling
from rush_bench.certify.tsv import frame_of
from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses import Smoothed
from rush_bench.evaluation import certify
from rush_bench.noise import Gaussian
from rush_bench.report.certificates import certified_accuracy


def trained(data: Images, sigma: float, epochs: int = 60) -> nn.Module:
    """A network of two layers trained by cross-entropy on noisy digits (Cohen et al. 2019, section 4)."""
    torch.manual_seed(0)
    size = data.pixels[0].numel()
    network = nn.Sequential(nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, len(data.classes)))
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    images, labels = data.floats(), data.labels
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            noisy = images[rows] + sigma * torch.randn_like(images[rows])
            loss = F.cross_entropy(network(noisy), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval()


def main() -> int:
    """Train, certify twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--radius", type=float, action="append", default=[])
    args = parser.parse_args()
    network = trained(load_dataset("digits", "train"), args.sigma)
    data = load_dataset("digits", "test", args.images)
    # blocks of some 1,000 rows stay in the cache of a CPU core
    defense = Smoothed(network, noise=Gaussian(args.sigma), votes=1, name="digits", shape=data.shape, memory=2**20)

    found = {}
    for mode in ("fixed", "staged"):
        settings = Sampling(mode, draws=args.draws, radii=tuple(args.radius) if mode == "staged" else ())
        before, begun = defense.passes.forwards, time.perf_counter()
        (result,) = certify([defense], data, settings, quiet=True).results
        found[mode] = {
            "forwards": defense.passes.forwards - before,
            "seconds": round(time.perf_counter() - begun, 1),
            "radii": result.identity["attack"]["radii"],
            "frame": frame_of(result),
        }
    radii = found["staged"]["radii"]
    accuracy = {mode: certified_accuracy(found[mode]["frame"], radii) for mode in found}
    ratio = found["fixed"]["forwards"] / found["staged"]["forwards"]
    worst = 100 * abs(accuracy["fixed"] - accuracy["staged"]).max()
    report = {
        "images": len(data),
        "sigma": args.sigma,
        "draws": args.draws,
        "forwards": {mode: found[mode]["forwards"] for mode in found},
        "seconds": {mode: found[mode]["seconds"] for mode in found},
        "fewer passes, times": round(ratio, 1),
        "settled radii": [round(r, 4) for r in radii],
        "certified accuracy, %": {mode: (100 * accuracy[mode]).round(2).tolist() for mode in found},
        "largest difference, points": round(float(worst), 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))
    return 0 if ratio >= 15 and worst <= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
