"""`rush_bench.attack`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from rush_bench.api.named import ByName, Target, refuse_for_given, say_where, subjects
from rush_bench.attacks.suites import Suite, of_draws, parse_suite
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.evaluation import runner
from rush_bench.evaluation.work import Run
from rush_bench.report.table import Table, measured

MOST = 1000  # images of a named data set where no number is asked for


class AttackRun(Run):
    """What an attack leaves: `results` (a cell per defence and column), `failed`, `complete`, and its table."""

    def table(self, style: str = "plain") -> Table:
        """A row per defence; `paper` lays it out as Table 1 of the RUSH paper. Cells that are not finished are a dash."""
        return measured(self.results, style)


def attack(
    defenses: Defense | Sequence[Defense] | str | Sequence[str] | Target,
    suite: str | Suite = "linf8",
    data: Any = None,
    *,
    attacks: Sequence[str] | str = (),
    settings: Mapping[str, Any] | None = None,
    out: Path | str = "results",
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 100,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
    precision: str | None = None,
    **named: Unpack[ByName],
) -> AttackRun:
    """Run a suite of attacks on defences. The same call again, from any number of processes, finishes what is left.

    Args:
        defenses: one or several, or names in the store of models: `"rush@64"`, `"all"`.
        suite: `linf8` (l-inf 8/255), `l2-0.5`, `linf8-quick`, ... (`rush-bench list suites`).
        data: float images (N, C, H, W) in [0, 1] or uint8, and labels (N,), as `(x, y)`; a Dataset or DataLoader of
            (image, label); the name of a data set or a path, of which 1000 images are taken unless `n` says how many. For
            models of the store, None is what each was trained for.
        attacks: registered attacks to run in place of the suite's: `["clean", "pgd", "square", "eot-apgd"]`, or
            "clean,pgd" as the command line has it.
        settings: of attacks, by dotted names: `{"pgd.steps": 40}`.
        out: results folder. Records lie in `runs/` in it, a row per image and cell.
        seed: of everything that is random.
        repeats: K, the independent predictions that each attacked image is scored by. None: 1 if the defence is deterministic,
            100 at one vote, 16 at 64 votes; a fifth of that in quick suites.
        chunk: images worked on at once and kept as one file.
        shard: (k, n) takes every n-th chunk, the k-th of them.
        max_minutes: stop between chunks after this time.
        precision: of the search, of models loaded by name: float32, bfloat16, or None (by device). float32 alone judges.
        named: how what is asked for by name is loaded, see `ByName`.

    Returns:
        A run, whose `table()` is the table of the command line. Errors of one cell (an attack that returns rubbish, a loss that
        is not finite) fail that cell and are listed in `failed`.

    Raises:
        BadInput: before anything runs, for what cannot be used, with the fix.

    Sources: the protocol (`rush-bench docs protocol`), sections 1 to 4.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        >>> digits = rb.load_dataset("digits", "test", n=10)
        >>> defense = rb.Deterministic(net, shape=digits.shape, name="linear")
        >>> run = rb.attack(defense, quick, digits, out=folder, quiet=True)
        >>> run.complete, len(run.table().frame)
        (True, 1)
    """
    deadline = Deadline.after(max_minutes)
    if not isinstance(suite, str) and (attacks or settings):
        raise BadInput("attacks and settings go with the name of a suite; of a parsed one give them to parse_suite")
    parsed = parse_suite(suite, attacks, settings) if isinstance(suite, str) else suite
    refuse_for_given(defenses, precision=precision, **named)
    found = subjects(defenses, data, out, most=MOST, searched=True, precision=precision, **named)
    found.begin()
    run = AttackRun([], folder=Path(out))
    shared: dict[str, Any] = {"out": out, "seed": seed, "repeats": repeats, "chunk": chunk, "quiet": quiet}
    for group, images in found.groups:
        run.extend(runner.attack(group, parsed, images, shard=shard, max_minutes=deadline, **shared))
    say_where(out, quiet)
    if not quiet:
        _say_idle(parsed, [defense for group, _ in found.groups for defense in group])
    return run


def _say_idle(suite: Suite, defenses: Sequence[Defense]) -> None:
    """On stderr, the settings of draws that were asked for where no defence draws."""
    idle = [] if any(not defense.deterministic for defense in defenses) else [key for key in suite.asked if of_draws(key)]
    if idle:
        names = ", ".join(defense.name for defense in defenses)
        print(f"note: {', '.join(idle)} had no effect: no noise is drawn by {names}", file=sys.stderr)
