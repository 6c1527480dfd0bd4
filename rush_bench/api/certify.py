"""`rush_bench.certify`."""

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

from rush_bench.api.named import ByName, Target, refuse_for_given, say_where, subjects
from rush_bench.api.table import load_results
from rush_bench.certificates import check
from rush_bench.certificates.check import FOLDER
from rush_bench.certificates.sampling import Sampling
from rush_bench.certificates.tsv import frame_of
from rush_bench.deadline import Deadline
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.evaluation import certificates as runner
from rush_bench.evaluation.work import Run
from rush_bench.report import certificates as report
from rush_bench.report.table import Table

MOST = 500  # images of a named data set where no number is asked for
Mode = Literal["fixed", "staged", "target"]


@dataclass(repr=False)
class CertifyRun(Run):
    """What certifying leaves: `results`, a cell per network and law of noise; `radii`, at which its table reports."""

    radii: tuple[float, ...] = ()

    def table(self) -> Table:
        """A row per certificate: n, abstentions, average certified radius, certified accuracy (%) at each radius and interval.

        BadInput where none is finished.
        """
        complete = [result for result in self.results if result.complete]
        if not complete:
            why = "; ".join(f"{name}: {error}" for name, error in self.failed.items())
            raise BadInput(f"no certificate in {self.folder} is finished{'; failed: ' + why if why else ''}")
        sets = {report.name_of(result): frame_of(result) for result in complete}
        return report.table(sets, self.radii or report.shared_radii(complete), report.caveats_of(complete))

    def summaries(self) -> list[dict[str, Any]]:
        """A dict per certificate, JSON-able: what it is of, how far it is, and its numbers where it is whole."""
        at = self.radii or report.shared_radii([result for result in self.results if result.complete])
        return [
            {key: result.labels.get(key) for key in ("defense", "dataset", "law", "scale", "norm", "alpha", "suite")}
            | {"folder": str(result.folder), "chunks": result.chunks, "chunks_done": result.chunks_done}
            | (report.summary(frame_of(result), at) | {"caveats": report.caveats_of([result])} if result.complete else {})
            for result in self.results
        ]


def certify(
    defenses: Defense | Sequence[Defense] | str | Sequence[str] | Target,
    data: Any = None,
    *,
    mode: Mode = "fixed",
    norm: str | None = None,
    radii: float | Sequence[float] = (),
    selection: int = 100,
    draws: int = 100_000,
    alpha: float = 0.001,
    give_up_level: float = 0.05,
    out: Path | str = "results",
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
    max_minutes: float | None = None,
    quiet: bool = False,
    **named: Unpack[ByName],
) -> CertifyRun:
    """Certify smoothed defences: radii within which no x' changes the vote, but for a chance of `alpha` per image.

    What is certified is the defence with infinitely many votes, so that `rush@1` and `rush@64` have one certificate. The same
    call again, from any number of processes, finishes what is left.

    Args:
        defenses: `Smoothed` ones, or names in the store of models.
        data: as for `attack`; of a named data set 500 images are taken unless `n` says how many.
        mode: `fixed` takes all draws; `staged` stops as soon as an image's radii are settled; `target` decides one radius.
        norm: of the radius: l2 for Gaussian noise, l1 or linf for uniform, l1 for Laplace noise. None: the first of the law.
        radii: one or several, in pixel units, where to report, to settle (staged) or decide (target). None given: thirds of
            the largest.
        selection: draws that select the class.
        draws: draws that bound its probability.
        alpha: chance that an image's certificate is wrong.
        give_up_level: level at which a radius is given up (staged, target).
        out: results folder; certificates, and the curve of certified accuracy, go to `certificates/` in it.
        seed: of the draws.
        shard: (k, n) takes every n-th chunk.
        max_minutes: stop between chunks after this time.
        quiet: no progress on stderr.
        named: see `ByName`.

    Returns:
        A run with its `table()`. `contradictions` are attacks in `out` that took more than a certificate leaves: a bug.

    Raises:
        BadInput: a defence without noise, a norm without a theorem for its law, images that do not fit.

    Sources: Cohen et al. 2019 (Gaussian), Yang et al. 2020 (uniform), Teng et al. 2019 (Laplace); `rush-bench docs protocol`.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        >>> digits = rb.load_dataset("digits", "test", n=5)
        >>> smoothed = rb.Smoothed(net, noise=rb.Gaussian(0.25), shape=digits.shape, name="linear")
        >>> run = rb.certify(smoothed, digits, draws=100, out=folder, quiet=True)
        >>> run.table().frame["n"].tolist()
        [5]
    """
    at: Any = (radii,) if isinstance(radii, numbers.Real) else radii
    if isinstance(at, str) or not isinstance(at, Iterable):
        raise BadInput(f"radii {radii!r} must be a number in pixel units, or several, such as (0.25, 0.5)")
    asked: tuple[float, ...] = tuple(at)
    settings = Sampling(mode, selection, draws, alpha, asked, give_up_level)
    deadline, out = Deadline.after(max_minutes), Path(out)
    refuse_for_given(defenses, **named)
    found = subjects(defenses, data, out, most=MOST, **named)
    run = CertifyRun([], folder=out, radii=asked)
    for group, images in found.groups:
        shared: dict[str, Any] = {"shard": shard, "max_minutes": deadline, "quiet": quiet}
        run.extend(runner.certify(group, images, settings, norm=norm, out=out, seed=seed, **shared))
    complete = [result for result in run.results if result.complete]
    if complete:
        norms = {str(result.labels["norm"]) for result in complete}
        sets = {report.name_of(result): frame_of(result) for result in complete}
        report.figure(sets, out / FOLDER / "curve.png", norms.pop() if len(norms) == 1 else "radius")
    attacks = [*load_results(out), *load_results(out / "settle")]
    say_where(out / FOLDER, quiet)
    run.contradictions = check.contradictions(complete, {result.folder: result for result in attacks}.values())
    return run
