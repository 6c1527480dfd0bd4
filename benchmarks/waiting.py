"""How OpenMP's threads should wait on a machine that others use too: steps a second of a small network, quiet and under load.

    python benchmarks/waiting.py [--seconds 3] [--rounds 5]

A training step (conv network on 16x16 images, batch 128) in a process of its own, as torch is, as rush-bench sets it, and with
one thread; first alone, then beside four processes that compute. The ways alternate; medians over the rounds and their ranges.
Target: under load within 1.5 times of the best, alone within 3 % of torch as it is.
"""

import argparse
import os
import statistics
import subprocess
import sys

STEP = """
import os, sys, time
{prepare}
import torch
net = torch.nn.Sequential(*[m for i, o in ((1, 16), (16, 32), (32, 32)) for m in (
    torch.nn.Conv2d(i, o, 3, 1, 1), torch.nn.BatchNorm2d(o), torch.nn.ReLU())], torch.nn.Flatten(), torch.nn.Linear(8192, 10))
x, y, end, steps = torch.rand(128, 1, 16, 16), torch.arange(128) % 10, None, 0
while end is None or time.perf_counter() < end:
    torch.nn.functional.cross_entropy(net(x), y).backward()
    steps += 1
    if end is None and steps == 10:
        end, steps = time.perf_counter() + {seconds}, 0
print(steps / {seconds})
"""
WAYS = {
    "torch as it is": "",
    "rush_bench imported first": "import rush_bench",
    "one thread": "os.environ['OMP_NUM_THREADS'] = '1'",
}
LOADS = {"alone": 0, "beside four that compute": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{os.cpu_count()} processors, {args.rounds} rounds of {args.seconds:g} s")
    for title, load in LOADS.items():
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
        try:
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way, prepare in WAYS.items():
                    found[way].append(rate(prepare, args.seconds))
        finally:
            for other in others:
                other.kill()
                other.wait()
        best = max(statistics.median(rates) for rates in found.values())
        print(f"\n{title}: steps a second, median (least to most), and the best's median over it")
        for way, rates in found.items():
            middle = statistics.median(rates)
            print(f"  {way:28} {middle:6.1f} ({min(rates):.1f} to {max(rates):.1f})  {best / middle:.2f}")


def rate(prepare: str, seconds: float) -> float:
    """Steps a second in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = STEP.format(prepare=prepare, seconds=seconds)
    return float(subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
