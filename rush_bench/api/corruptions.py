"""`rush_bench.corruptions`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rush_bench.api.named import check_count, patterns_of, refuse_for_given, say_where
from rush_bench.datasets.corruptions import ALL, USUAL, CorruptedImages, load_corrupted
from rush_bench.defenses import Defense, as_defenses, load_defense
from rush_bench.defenses.load import resolve
from rush_bench.devices import choose_device
from rush_bench.errors import BadInput
from rush_bench.evaluation import corruptions as runner
from rush_bench.evaluation.work import Run
from rush_bench.records import load_results
from rush_bench.report import corruptions as report
from rush_bench.report.table import Table, text_table

MOST = 1000  # images of each corruption and severity where no number is asked for
Which = Literal["set15", "all19"]


@dataclass(repr=False)
class CorruptionsRun(Run):
    """What it leaves: a cell per defence, corruption and severity; `reference` names what mCE is relative to."""

    reference: str | None = None
    paths: list[Path] = field(default_factory=list)

    def table(self) -> Table:
        """A row per defence and corruption, the mean and mCE last, in percent."""
        frame = report.table(self.results, self.reference)
        return text_table(frame, *report.lay_out(frame), title=report.caption(frame))


def corruptions(
    defenses: Defense | Sequence[Defense] | str | Sequence[str],
    dataset: str = "cifar10",
    *,
    which: Which = "set15",
    reference: str | None = None,
    n: int | str | None = None,
    out: Path | str = "results",
    seed: int = 0,
    repeats: int | None = None,
    chunk: int = 500,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
    store: Path | str = "models",
    data_dir: Path | str | None = None,
    device: str | None = None,
    memory: int | None = None,
) -> CorruptionsRun:
    """Accuracy under common corruptions, at five severities each (CIFAR-10-C, CIFAR-100-C), and mCE.

    Args:
        defenses: one or several, or names in the store of models.
        dataset: `cifar10` or `cifar100`, whose corruptions to take; their files lie in `data_dir`.
        which: the 15 usual corruptions, or all 19.
        reference: the defence, by name, that mCE is relative to; without it mCE is NaN.
        n: images of each corruption and severity, 1000 if None, or "all".
        out: results folder; records and table go to `corruptions/` in it. The written table has what is finished there of
            other defences on the same images, too.
        seed: of the subset and of what a defence draws.
        repeats: K, predictions per image and cell. None: by votes.
        chunk: images kept as one file.
        shard: (k, n) takes every n-th chunk.
        max_minutes: stop between chunks after this time.
        quiet: no progress on stderr.
        store: folder of the models.
        data_dir: folder that holds `CIFAR-10-C`.
        device: of models that are loaded by name: auto, cpu, cuda:1.
        memory: bytes that a pass of them may use.

    Returns:
        A run with its `table()`; the same call again finishes what is left.

    Raises:
        BadInput: a missing or foreign file, a wrong name, images that do not fit.

    Sources: Hendrycks and Dietterich 2019, section 4.1.

    Examples:
        >>> import rush_bench as rb
        >>> rb.corruptions("rush@64", "digits")
        Traceback (most recent call last):
        rush_bench.errors.BadInput: there are no corruptions of 'digits'; choose cifar10 or cifar100
    """
    refuse_for_given(defenses, device=device, memory=memory)
    found, data, reference = asked_for(
        defenses, dataset, which, reference, n=n, seed=seed, store=store, data_dir=data_dir, device=device, memory=memory
    )
    shared: dict[str, Any] = {"seed": seed, "repeats": repeats, "chunk": chunk, "shard": shard}
    finished = runner.evaluate(found, data, out=out, max_minutes=max_minutes, quiet=quiet, **shared)
    run = CorruptionsRun(finished.results, finished.failed, Path(out), finished.done, reference=reference)
    say_where(Path(out) / runner.FOLDER, quiet)
    if any(result.complete for result in run.results):
        folder = Path(out) / runner.FOLDER
        everything = report.with_earlier(run.results, load_results(folder))
        run.paths = report.write(report.table(everything, reference), folder / f"{dataset}-{which}")
    return run


def asked_for(
    defenses: Any,
    dataset: str,
    which: Which,
    reference: str | None,
    *,
    n: int | str | None,
    seed: int,
    store: Path | str,
    data_dir: Path | str | None,
    device: str | None,
    memory: int | None,
) -> tuple[list[Defense], CorruptedImages, str | None]:
    """The defences, the reference among them, the corrupted images, and the reference's full name."""
    check_count(n)
    named: dict[str, Any] = {"seed": seed, "data_dir": data_dir}
    chosen = {"set15": USUAL, "all19": ALL}[which]
    data = load_corrupted(dataset, chosen, **named)
    if n != "all":
        data = load_corrupted(dataset, chosen, int(n) if n else min(MOST, len(data)), **named)
    wanted = patterns_of(defenses)
    if not wanted:
        return as_defenses(defenses), data, reference
    names = resolve([p.strip() for p in wanted if p.strip()], Path(store), dataset)
    if reference is not None:
        found = resolve([reference], Path(store), dataset)
        if len(found) > 1:
            raise BadInput(f"--reference {reference} is more than one model: {', '.join(found)}; name one of them")
        reference = found[0]
        names = list(dict.fromkeys([*names, reference]))
    options: dict[str, Any] = {"device": choose_device(device or "auto"), **({"memory": memory} if memory else {})}
    return [load_defense(name, store=store, **options) for name in names], data, reference
