"""Every system on scikit-learn's digits: train each at `short`, attack it at l-inf 0.1, write the table.

    python benchmarks/digits.py [--jobs 2] [--recipes 'acl*,rush'] [--out results/digits]

The same command again goes on. Systems train side by side, one thread each. Exit code 1 if a system fails.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite
from rush_bench.defenses import load_defenses
from rush_bench.registry import match, recipes
from rush_bench.report import tables

SUITE, COLUMNS = "linf25.5-quick", ("clean", "pgd", "eot", "square")  # 25.5/255 = 0.1
IMAGES = 200


def train(recipe: str, out: Path) -> int:
    """Train one system in a process of its own; its log lies beside the models. The exit code."""
    line = [sys.executable, "-m", "rush_bench", "train", recipe, "--dataset", "digits", "--store", str(out / "models")]
    with (out / "models" / f"{recipe}.log").open("a") as log:
        done = subprocess.run(line, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    print(f"{recipe}: {'trained' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipes", default="all")
    parser.add_argument("--out", type=Path, default=Path("results/digits"))
    args = parser.parse_args()
    names = match("recipe", args.recipes.split(","), [name for name in recipes.entries if name != "finetune"])
    (args.out / "models").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = any(list(pool.map(lambda name: train(name, args.out), names)))
    images = rb.load_dataset("digits", "test", IMAGES)
    defenses = load_defenses(["all"], store=args.out / "models", dataset="digits")
    run = rb.attack(defenses, parse_suite(SUITE, COLUMNS), images, out=args.out)
    frame = run.table()
    tables.to_csv(frame, args.out / "table.csv")
    tables.to_markdown(frame, args.out / "table.md")
    print((args.out / "table.md").read_text())
    sys.exit(failed or not run.complete)


if __name__ == "__main__":
    main()
