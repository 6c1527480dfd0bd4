"""Table 1 on real CIFAR-10 at equal training cost, on a CPU: a ResNet-18 of width 16 (0.70 M parameters) for every system.

    python benchmarks/table1_cpu.py plan                     # what each system gets, without training
    python benchmarks/table1_cpu.py train [rush pgd_at ...]  # in the order below; resumes; one thread
    python benchmarks/table1_cpu.py measure [rush ...]       # suites, certificates and the table of what is trained

Needs RUSH_BENCH_DATA, a folder with cifar10.npz. Cost is counted in passes of an image through the encoder (forward 1, backward
2; `training_cost.PASSES`), so that the budget is the same on any machine: what RUSH spends in 16 epochs and 3 of its head. The
rule that stretches each paper's schedule to it:

1. A linear head (SLF, NSLF) gets 3 epochs, as RUSH's. Full fine-tuning (AFF) gets half of the budget.
2. The stages before share the rest as their paper shares it: each gets the whole number of epochs nearest to what that buys.
3. Decays, warm-ups and what else is counted in epochs keep their place in the stage. All other settings are the paper's.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rush_bench.registry import recipes
from rush_bench.settings import override

SHAPE, WIDTH, HEAD = (3, 32, 32), 16, 3
PRETRAIN = 16  # epochs of RUSH that set the budget
BUDGET = PRETRAIN * 6 + HEAD * 2
ORDER = (
    *("rush", "noise_sup", "pgd_at", "simclr", "trades", "cohen", "smoothadv", "acl", "free", "rocl", "advcl"),
    *("random_probe", "dynacl", "deacl", "ssp_rotation", "dataaug"),
)
SEEDS = {"rush": 3, "noise_sup": 3}
FRACTIONS = {"rush": (0.25, 4.0), "noise_sup": (0.25, 4.0)}  # of the budget, besides 1
COUNTED_IN_EPOCHS = ("warmup_epochs", "milestones", "ramp", "ramp_epochs", "anneal_every")
SUITES = ("linf8", "linf4", "linf2")
COST = {"SLF": 1, "ALF": 1, "NSLF": 2}  # passes of a linear head: forward; and back to BatchNorm's biases


@dataclass(frozen=True)
class Job:
    """One training: its name in the store, its settings, the passes it spends."""

    system: str
    seed: int
    fraction: float
    sets: dict[str, Any]
    passes: float

    @property
    def name(self) -> str:
        share = "" if self.fraction == 1 else f"-x{self.fraction:g}"
        return f"{self.system}-c10-w{WIDTH}{share}" + (f"-s{self.seed}" if self.seed else "")

    def command(self, store: Path) -> list[str]:
        """The command that trains it."""
        sets = [part for key, value in self.sets.items() for part in ("--set", f"{key}={_text(value)}")]
        line = ["train", self.system, "--dataset", "cifar10", "--preset", "paper", *sets, "--name", self.name]
        return [*line, "--seed", str(self.seed), "--store", str(store)]


def passes_table() -> dict[str, Any]:
    """`training_cost.PASSES`: passes of an image in each stage before fine-tuning, by `recipe stage`."""
    spec = importlib.util.spec_from_file_location("training_cost", Path(__file__).with_name("training_cost.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**module.PASSES, "aff": module.trades}


def plan(system: str, seed: int = 0, fraction: float = 1.0) -> Job:
    """The settings of a system at this share of the budget, by the rule at the top."""
    recipe, costs, budget = recipes.load(system), passes_table(), fraction * BUDGET
    settings = override(recipe.settings, recipe.adapt("paper", SHAPE))
    stages = recipe.plans(settings)
    each: dict[str, float] = {}  # passes of an image and epoch
    epochs: dict[str, int] = {}
    last = stages[-1]
    left, before = budget, stages
    if f"{system} {last.name}" not in costs or system == "random_probe":
        before = stages[:-1]
        protocol = "AFF" if last.name == "aff" else settings.finetune.protocol
        each[last.name] = COST[protocol] if protocol in COST else full(costs, settings, last)
        epochs[last.name] = HEAD if protocol in COST else max(1, round(budget / 2 / each[last.name]))
        left -= epochs[last.name] * each[last.name]
    each |= {stage.name: costs[f"{system} {stage.name}"](settings) for stage in before}
    paper = sum(each[stage.name] * stage.settings.epochs for stage in before)
    for stage in before:
        epochs[stage.name] = max(1, round(stage.settings.epochs * left / paper))
    sets: dict[str, Any] = {"network.width": WIDTH}
    for stage in stages:
        scale = epochs[stage.name] / stage.settings.epochs
        sets |= {f"{stage.name}.epochs": epochs[stage.name]} | stretched(stage.settings, f"{stage.name}.", scale)
    main = (before or stages)[-1]
    if hasattr(settings, "attack"):
        sets |= stretched(settings.attack, "attack.", epochs[main.name] / main.settings.epochs)
    return Job(system, seed, fraction, sets, sum(each[name] * count for name, count in epochs.items()))


def full(costs: dict[str, Any], settings: Any, stage: Any) -> float:
    """Passes of full fine-tuning: TRADES, or PGD-AT as in Chen 2020b."""
    return costs["aff"](settings.aff.attack) if stage.name == "aff" else costs["pgd_at train"](settings)


def stretched(settings: Any, prefix: str, scale: float) -> dict[str, Any]:
    """What these settings count in epochs, at `scale` of the paper's epochs."""
    made: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if name not in COUNTED_IN_EPOCHS or not value:
            continue
        if isinstance(value, tuple):
            made[prefix + name] = tuple(round(part * scale, 2) for part in value)
        else:
            made[prefix + name] = max(1, round(value * scale)) if hint is int else round(value * scale, 2)
    return made


def jobs(systems: list[str]) -> list[Job]:
    """First every system once, then the other shares of the budget, then the other seeds."""
    found = [plan(system) for system in systems]
    found += [plan(system, 0, share) for system in systems for share in FRACTIONS.get(system, ())]
    return found + [plan(system, seed) for system in systems for seed in range(1, SEEDS.get(system, 1))]


def _text(value: Any) -> str:
    return f"[{','.join(f'{part:g}' for part in value)}]" if isinstance(value, tuple) else str(value)


def run(line: list[str]) -> int:
    """One command of rush-bench in a process of one thread; its exit code."""
    print("rush-bench", " ".join(line), flush=True)
    return subprocess.run([sys.executable, "-m", "rush_bench", *line], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def measure(systems: list[str], store: Path, out: Path, n: int) -> int:
    """Attack and certify what is trained, write the table; the worst exit code."""
    there = [job for job in jobs(systems) if (store / job.name / "card.json").exists()]
    if not there:
        sys.exit(f"nothing of {', '.join(systems)} is trained in {store}")
    names = ",".join(job.name for job in there)
    place = ["--store", str(store), "--out", str(out)]
    codes = [run(["attack", "--models", names, "--suite", suite, "--n", str(n), *place]) for suite in SUITES]
    gaussian = [job.name for job in there if job.system in ("cohen", "smoothadv")]
    if gaussian:
        codes.append(run(["certify", *gaussian, "--n", "500", *place]))
    codes.append(run(["table", "--results", str(out)]))
    return max(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "train", "measure"))
    parser.add_argument("systems", nargs="*", help=f"Of {', '.join(ORDER)}.  [default: all, in this order]")
    parser.add_argument("--store", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, default=Path("results/table1-cpu"))
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    if unknown := set(args.systems) - set(ORDER):
        parser.error(f"no system {', '.join(sorted(unknown))}; known: {', '.join(ORDER)}")
    systems = args.systems or list(ORDER)
    if args.what == "measure":
        sys.exit(measure(systems, args.store, args.out, args.n))
    for job in jobs(systems):
        if args.what == "train":
            if code := run(job.command(args.store)):
                sys.exit(code)
        else:
            print(f"{job.name:28} {job.passes:6.1f} of {job.fraction * BUDGET:6.1f} passes  {job.sets}")


if __name__ == "__main__":
    main()
