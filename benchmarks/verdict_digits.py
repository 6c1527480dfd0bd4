"""The verdict on RUSH, its control and two baselines on scikit-learn's digits: reports, figures and verdicts.

    python benchmarks/verdict_digits.py [--images 50] [--jobs 2] [--out results/digits] [--reference FOLDER]

Trains at `short` what the store lacks, then runs `rush-bench audit` at l-inf 0.1 in `--jobs` processes of one thread, and the
sweep of draws (T1) on a Gaussian-trained network in l2; `--reference` holds prediction logs of SmoothAdv to draw beside it
(PGD_eps<eps>_m<draws>.tsv). The same command again goes on. Exit code 1 if anything fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from rush_bench.audits.evidence import Evidence
from rush_bench.audits.settle import settle
from rush_bench.datasets import load_dataset
from rush_bench.defenses import load_defenses
from rush_bench.files import write_text
from rush_bench.records.statistics import Estimate, clopper_pearson
from rush_bench.report import settle as tables
from rush_bench.report.settle_figures import Line, sweep, write_figures

RECIPES = ("rush", "simclr", "noise_sup", "cohen", "pgd_at")
DEFENCES = ("rush@64", "rush@1", "noise_sup@64", "simclr", "pgd_at")
SWEPT, SWEPT_EPS = "cohen@64", 1.0  # l2, where neither all images stand nor all fall
EPS = 0.1
HEADER = ["Defence", "Clean", "Claim", "Worst case", "Verdict", "Rule", "Decided by"]


def run(line: Sequence[str], log: Path, answers: Sequence[int] = (0,)) -> str:
    """One command of rush-bench in a process of one thread, its progress appended to `log`; what it prints."""
    with log.open("a") as file:
        whole = [sys.executable, "-m", "rush_bench", *line]
        done = subprocess.run(
            whole, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
    if done.returncode not in answers:
        sys.exit(f"rush-bench {' '.join(line)} ended with {done.returncode}; see {log}")
    return done.stdout


def together(line: Sequence[str], jobs: int, log: Path) -> None:
    """The same command in several processes, which share its chunks."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda k: run(line, log.with_suffix(f".{k}.log"), answers=(0, 3)), range(jobs)))


def only(store: Path, names: Sequence[str], folder: Path) -> Path:
    """A store of these models alone: what else was trained must not become a source of transfer or an ablation."""
    for name in names:
        shutil.copytree(store / name, folder / name)
    return folder


def reference(folder: Path) -> Line:
    """Accuracy against draws from prediction logs of another project: a file per number of draws, `correct` of each image."""
    points = []
    for path in folder.glob("PGD_eps*_m*.tsv"):
        correct = pd.read_csv(path, sep="\t")["correct"]
        found = Estimate(float(correct.mean()), *clopper_pearson(int(correct.sum()), len(correct)))
        points.append((float(re.findall(r"_m(\d+)", path.stem)[0]), found))
    if not points:
        sys.exit(f"{folder} has no PGD_eps<eps>_m<draws>.tsv")
    return Line(f"Cohen et al., CIFAR-10, n={len(correct)} (SmoothAdv's logs)", tuple(sorted(points)))


def evidence_of(
    names: Sequence[str], images: int, chunk: int, norm: str, eps: float, store: Path, out: Path, **more
) -> list[Evidence]:
    """What is on disk of these defences; nothing is run."""
    defenses = load_defenses(list(names), store=store, dataset="digits")
    data = load_dataset("digits", "test", images)
    how = {"norm": norm, "eps": eps, "store": store, "out": out, "chunk": chunk, "quiet": True, **more}
    return settle(defenses, data, budget="quick", before=lambda planned: False, **how).evidence


def verdicts(audits: Sequence[dict], found: Sequence[Evidence]) -> list[list[str]]:
    """A row per defence, as text."""
    clean = {evidence.subject: tables.percent(evidence.clean.estimate) for evidence in found if evidence.clean is not None}
    rows = []
    for audit in audits:
        said = audit["verdict"]
        if said is None:
            sys.exit(f"{audit['defense']} has no verdict: experiments are missing; run the same command again")
        claim = f"{100 * said['claim']['value']:.1f} ({said['claim']['source']})"
        worst = tables.percent(Estimate(**said["worst"]))
        # a claim that stands has passed all that is required; one at chance has nothing that could be decided
        short = {0: "the claim is chance", 5: "worst case, all required checks"}
        decided = short.get(said["rule"], ", ".join(said["decided_by"]))
        rows.append([audit["defense"], clean[audit["defense"]], claim, worst, said["word"], str(said["rule"]), decided])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/digits"))
    parser.add_argument("--models", type=Path, help="Folder of the trained models.  [default: models in --out]")
    parser.add_argument("--reference", type=Path)
    args = parser.parse_args()
    begun, models = time.monotonic(), args.models or args.out / "models"
    models.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        line = ["train", "--dataset", "digits", "--store", str(models)]
        list(pool.map(lambda name: run([*line, name], models / f"{name}.log"), RECIPES))
    print(f"trained after {(time.monotonic() - begun) / 60:.1f} min", flush=True)

    chunk = -(-args.images // args.jobs)  # a chunk per process
    shared = {"images": args.images, "chunk": chunk, "out": args.out}
    with tempfile.TemporaryDirectory() as made:
        store = only(models, [f"{recipe}-digits" for recipe in RECIPES], Path(made))
        common = ["--dataset", "digits", "--budget", "quick", "--n", str(args.images), "--chunk", str(chunk)]
        common += ["--store", str(store), "--out", str(args.out)]
        audit = ["audit", ",".join(DEFENCES), "--eps", str(EPS), *common]
        together(audit, args.jobs, models / "audit.log")
        audits = json.loads(run([*audit, "--json"], models / "report.log"))["audits"]
        print(f"audited after {(time.monotonic() - begun) / 60:.1f} min", flush=True)
        together(
            ["settle", SWEPT, "--only", "T1", "--norm", "l2", "--eps", str(SWEPT_EPS), *common], args.jobs, models / "sweep.log"
        )
        found = evidence_of(DEFENCES, norm="linf", eps=EPS, store=store, **shared)
        swept = evidence_of([SWEPT], norm="l2", eps=SWEPT_EPS, store=store, only=["T1"], **shared)

    folder = args.out / "settle"
    tables.write([*found, *swept], folder)
    write_figures(found, folder)
    sweep(swept, folder / f"{tables.group(swept[0])}-sweep.png", [reference(args.reference)] if args.reference else ())
    text = tables.markdown(HEADER, verdicts(audits, found))
    about = (
        f"On digits at l-inf {EPS}, n={args.images}, budget quick; percent, 95 % intervals. Rules: `rush-bench docs verdict`."
    )
    write_text(args.out / "verdicts.md", f"{text}\n{about}\n")
    print(text + f"all of it after {(time.monotonic() - begun) / 60:.1f} min")


if __name__ == "__main__":
    main()
