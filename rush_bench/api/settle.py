"""`rush_bench.settle`."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from rush_bench.api.named import ByName, Target, say_where, subjects
from rush_bench.audits import settle as runner
from rush_bench.audits.experiments import EXPERIMENTS
from rush_bench.audits.forecast import Planned
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.report import settle as report
from rush_bench.report.settle_figures import write_figures
from rush_bench.report.table import Table, text_table
from rush_bench.threats import Norm


@dataclass(repr=False)
class SettleRun(runner.SettleRun):
    """What it leaves: the evidence of each defence, and the files that show it."""

    paths: list[Path] = field(default_factory=list)

    def __repr__(self) -> str:
        trials = [entry for evidence in self.evidence for entry in evidence.entries]
        done = sum(entry.complete for entry in trials)
        return f"SettleRun({done} of {len(trials)} trials of {len(self.evidence)} defences complete, in {str(self.folder)!r})"

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def tables(self) -> list[Table]:
        """A table per defence: an experiment after another, with how it is to be read, and its trials."""
        return [
            text_table(report.frame(evidence), *report.lay_out(evidence), title=report.title(evidence))
            for evidence in self.evidence
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """The same as plain values, JSON-able."""
        return [report.plain(evidence) for evidence in self.evidence]


def settle(
    defenses: Defense | Sequence[Defense] | str | Sequence[str] | Target,
    data: Any = None,
    *,
    budget: str = "standard",
    norm: Norm = "linf",
    eps: float | str = 8 / 255,
    only: Iterable[str] | None = None,
    out: Path | str = "results",
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
    precision: str | None = None,
    before: Callable[[list[Planned]], bool] = lambda planned: True,
    **named: Unpack[ByName],
) -> SettleRun:
    """Run the experiments T0 to T16 that settle a defence's claim. The same call again finishes what is left.

    Args:
        defenses: one or several, or names in the store of models.
        data: as for `attack`; how many images of a named data set are taken, the budget says.
        budget: `quick` (a CPU), `standard`, or `full` (the protocol).
        norm: of the threat, linf or l2.
        eps: its radius, in pixel units; text such as `8/255`, too.
        only: these experiments alone, such as `["T1", "T10"]` (`rush-bench list experiments`).
        out: results folder; records, tables and figures go to `settle/` in it.
        seed: of everything that is random.
        repeats: K, predictions per image. None: by votes.
        chunk: images kept as one file.
        shard: (k, n) takes every n-th chunk.
        max_minutes: stop between chunks after this time.
        quiet: say neither the cost beforehand nor the progress.
        precision: of the search, of models that are loaded by name.
        before: receives the plan with its cost, and may cancel it by returning False: then nothing is written.
        named: see `ByName`; the store is also where other models come from (transfer, ablations).

    Returns:
        A run whose `tables()` print as the command does.

    Raises:
        BadInput: a wrong name, a radius that is none, images that do not fit.

    Sources: `rush-bench docs protocol`, section 7.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        >>> digits = rb.load_dataset("digits", "test", n=5)
        >>> defense = rb.Deterministic(net, shape=digits.shape, name="linear")
        >>> run = rb.settle(defense, digits, only=["T1"], out=folder, quiet=True, before=lambda planned: False)
        >>> run.complete
        False
    """
    chosen, deadline, begun = runner.budget_named(budget), Deadline.after(max_minutes), False
    found = subjects(defenses, data, out, most=chosen.images, searched=True, precision=precision, **named)

    def go(planned: list[Planned]) -> bool:
        nonlocal begun
        if not quiet:
            print("\n".join(costs(planned)), file=sys.stderr)
        if not before(planned):
            return False
        found.begin()
        begun = True
        return True

    run = SettleRun([], {}, Path(out) / runner.FOLDER)
    options: dict[str, Any] = {"budget": budget, "norm": norm, "eps": eps, "seed": seed, "repeats": repeats, "chunk": chunk}
    options |= {"only": None if only is None else list(only), "store": named.get("store", "models"), "out": out, "shard": shard}
    for group, images in found.groups:
        own = group[-1:] if isinstance(defenses, Target) else group  # smoothed at its votes, not the single draw beside it
        settled = runner.settle(own, images, max_minutes=deadline, quiet=quiet, before=go, **options, **found.options)
        run.evidence += settled.evidence
        run.pairs += settled.pairs
        run.failed |= settled.failed
        run.done = run.done and settled.done
        run.contradictions += settled.contradictions
    if begun:
        say_where(run.folder, quiet)
        run.paths = [*report.write(run.evidence, run.folder), *write_figures(run.evidence, run.folder)]
    return run


def costs(planned: Iterable[Planned]) -> list[str]:
    """What each experiment is expected to cost, in words, from the rates measured on this machine a moment ago."""
    lines = []
    for plan in planned:
        total = sum(cost.seconds for cost in plan.costs.values())
        lines.append(f"{plan.defense.name}: about {total / 60:.1f} min for what is not done yet")
        for name, cost in plan.costs.items():
            rows = f"{cost.forwards:.3g} rows forward, {cost.backwards:.3g} back"
            lines.append(f"  {name:>3} {EXPERIMENTS[name].title}: {cost.jobs} cells, {rows}, about {cost.seconds:.0f} s")
        lines += [f"  T12 certificates in {norm}: {how.draws} draws per image at most" for norm, how in plan.certificates]
    return lines
