"""`rb.attack` and `rb.certify` in Python against the command line: the same work, the same processor time? Target: within 5 %.

    python benchmarks/python_against_command.py [--images 100] [--rounds 5]

A small network on digits, smoothed; each run is a fresh interpreter, start and imports included, on one thread; both ways
alternate, after one run of each that is not counted. A script of one line `import rush_bench as rb` and one call, as a user
would write it: whatever the command line sets up must be set up by the package.
"""

import argparse
import tempfile
from pathlib import Path

from clock import process, ratio, spread

NETWORK = """
from rush_bench.networks import build


def net():
    return build({"name": "resnet", "blocks": [1, 1], "width": 16, "classes": 10, "channels": 1, "size": 16}, seed=1).eval()
"""
CALL = """
import rush_bench as rb
from small import net

{call}(rb.Smoothed(net(), noise=rb.Uniform(0.3), votes={votes}, shape=(1, 16, 16)), {given}, out="{out}", quiet=True)
"""
CASES = {
    "certify": ("rb.certify", 1, 'data="digits", n={n}, draws=2000', ["certify", "--n", "{n}", "--draws", "2000"]),
    "attack": (
        "rb.attack",
        16,
        'suite="linf8-quick", data="digits", n={n}, attacks=["pgd"]',
        ["attack", "--suite", "linf8-quick", "--n", "{n}", "--attacks", "pgd", "--votes", "16"],
    ),
}
MODEL = ["--model", "small:net", "--noise", "uniform:0.3", "--dataset", "digits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.images} digits, {args.rounds} rounds, one thread: processor seconds, median (least to most)")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "small.py").write_text(NETWORK, encoding="utf-8")
        for name, (call, votes, given, command) in CASES.items():
            times: dict[str, list[float]] = {"python": [], "command": []}
            for k in range(args.rounds + 1):
                script = CALL.format(call=call, votes=votes, given=given.format(n=args.images), out=f"python-{name}-{k}")
                line = ["-m", "rush_bench", *(part.format(n=args.images) for part in command), *MODEL]
                ways = {"python": ("-c", script), "command": (*line, "--out", f"command-{name}-{k}")}
                for way, arguments in ways.items():
                    times[way].append(process(*arguments, cwd=folder))
            python, command_line = (each[1:] for each in times.values())  # the first warms the files' caches
            print(f"{name:8} python {spread(python)}, command line {spread(command_line)}: {ratio(python, command_line)}")


if __name__ == "__main__":
    main()
