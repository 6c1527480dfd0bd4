"""How long `rush-bench table` takes: records read for the first time, and the same again when nothing has changed.

    python benchmarks/table_speed.py [--cells 3000] [--chunks 1] [--rounds 5]

Synthetic cells of 100 images a chunk (five to a row of the table, as a suite leaves them), in a temporary folder. Processor
time of the whole command, in a process of its own; the ways alternate with a bare import of pandas, which every table needs and
which tells how slow the machine is at that moment. Target for 3,000 cells: 8 s, then 1 s.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from clock import process, spread

from rush_bench.records import FORMAT, Cell, CellStore

ATTACKS = ("clean", "pgd", "eot", "aa", "worst")
TABLE = ("-m", "rush_bench", "table", "--results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.cells, args.chunks)
        time.sleep(3)  # what is younger is not remembered
        ways = {"first": [*TABLE, folder], "again": [*TABLE, folder], "pandas": ["-c", "import pandas"]}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            (Path(folder) / "runs" / ".index.json").unlink(missing_ok=True)
            for way, command in ways.items():
                found[way].append(process(*command))
    print(f"{args.cells} cells of {args.chunks} chunks, {args.rounds} rounds, one thread: seconds, median (least to most)")
    for way, times in found.items():
        print(f"  {way:6} {spread(times)}")


def make(folder: Path, cells: int, chunks: int) -> None:
    """Finished cells of randomised defences with one vote, K = 100."""
    store, rng, n = CellStore(folder), np.random.default_rng(0), 100 * chunks
    labels = rng.integers(10, size=n)
    for k in range(cells):
        name, attack = f"d{k // len(ATTACKS)}@1", ATTACKS[k % len(ATTACKS)]
        threat = {"norm": "linf", "eps": 8 / 255}
        identity = {
            "format": FORMAT,
            "weights": name,
            "defense": {"votes": 1},
            "attack": {"name": attack},
            "threat": None if attack == "clean" else threat,
            "images": "synthetic",
            "seed": 0,
            "repeats": 100,
            "chunk": 100,
        }
        about = {"defense": name, "dataset": "cifar10", "attack": attack, "suite": "linf8", "deterministic": False, "n": n}
        cell = Cell(identity, {**about, **threat, "votes": 1, "classes": 10})
        store.open(cell)
        for c in range(chunks):
            rows = np.array(cell.rows(c))
            right = rng.binomial(100, rng.beta(0.5, 0.5, 100))
            counts = np.zeros((100, 10), np.int64)
            counts[np.arange(100), labels[rows]] = right
            counts[np.arange(100), (labels[rows] + 1) % 10] = 100 - right
            arrays = dict.fromkeys(("margin", "distance", "forwards", "backwards", "seconds"), np.zeros(100))
            arrays |= {"index": rows, "label": labels[rows], "correct": right, "repeats": np.full(100, 100), "counts": counts}
            store.write(cell, c, arrays, None if attack == "clean" else np.zeros((100, 1, 4, 4), np.float32))


if __name__ == "__main__":
    main()
