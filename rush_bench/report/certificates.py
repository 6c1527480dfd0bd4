"""What certificates add up to: certified accuracy at radii, average certified radius, a table, a figure. No torch.

All functions take frames with the columns `predict`, `radius`, `correct` (see `rush_bench.certificates.tsv`).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from rush_bench.errors import BadInput
from rush_bench.files import write_atomic
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, clopper_pearson
from rush_bench.report.caveats import copies_caveat, label_caveat
from rush_bench.report.layout import DASH
from rush_bench.report.settle import percent
from rush_bench.report.table import Table, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_ALPHA = 0.001  # Cohen et al. 2019, and everyone since
DEFAULT_RADII = tuple(0.25 * k for k in range(10))
TITLE = "certified accuracy (%)"
BOUND = "≥ "


def certified_accuracy(frame: pd.DataFrame, radii: ArrayLike) -> NDArray[np.float64]:
    """Share of images with the right class certified at each radius: mean of (correct and radius >= r).

    ">=", because files in exchange hold rounded radii (Cohen's analyze.py does the same).
    """
    right = frame["radius"].to_numpy()[frame["correct"].to_numpy() == 1]
    return np.array([(right >= r).sum() / len(frame) for r in np.atleast_1d(np.asarray(radii, np.float64))])


def settles_every_radius(frame: pd.DataFrame) -> bool:
    """Whether each image's radius is as large as its draws allow: mode `fixed`, or certificates of others, which know no other.

    A mode that stops early settles the radii that it was given and no other: beyond them its certified accuracy is a lower
    bound far from that of `fixed`, and a mean of its radii measures where it stopped.
    """
    return "mode" not in frame or bool((frame["mode"] == "fixed").all())


def settles(frame: pd.DataFrame, radius: float) -> bool:
    """Whether the accuracy at a radius is more than a lower bound of unknown distance: `settles_every_radius`, or the mode
    decided this radius, or it is beyond the largest. Files that do not say what was settled settle nothing.
    """
    if settles_every_radius(frame):
        return True
    if "settled" not in frame:
        return False
    settled = [float(text) for text in str(frame["settled"].iloc[0]).split(";") if text]
    return radius in settled or radius > frame["largest"].iloc[0]


def average_radius(frame: pd.DataFrame) -> float | None:
    """Average certified radius (Zhai et al. 2020): the mean over all images, 0 where abstained or wrong.

    None where the mode stops early, see `settles_every_radius`.
    """
    return float((frame["radius"] * frame["correct"]).mean()) if settles_every_radius(frame) else None


def abstentions(frame: pd.DataFrame) -> int | None:
    """How many images have no certificate at all; None where radius 0 was not settled: some were given up for a larger one."""
    return int((frame["predict"] == -1).sum()) if settles(frame, 0.0) else None


def summary(frame: pd.DataFrame, radii: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Numbers of one set of certificates: n, abstained, ACR, and at each radius the accuracy with its interval.

    `lower_bounds`: whether the accuracies are that only, since the mode stopped early; the ACR is None then.

    The interval (Clopper-Pearson) is over images; it ends at 1 at a radius that was not settled. Beside it each certificate is
    wrong with a probability of at most alpha.
    """
    accuracy = certified_accuracy(frame, radii)
    low, high = clopper_pearson(np.rint(accuracy * len(frame)).astype(int), len(frame), level)
    at = [
        {"radius": float(r), "accuracy": float(a), "low": float(lo), "high": float(hi) if settles(frame, r) else 1.0}
        for r, a, lo, hi in zip(radii, accuracy, low, high, strict=True)
    ]
    found: dict[str, Any] = {"n": len(frame), "abstained": abstentions(frame), "acr": average_radius(frame), "certified": at}
    found["lower_bounds"] = not settles_every_radius(frame)
    if "draws" in frame:
        found["draws"] = float(frame["draws"].mean())
    return found


def table(sets: Mapping[str, pd.DataFrame], radii: Sequence[float], caveats: Sequence[str] = ()) -> Table:
    """A row per set of certificates: n, abstained, ACR, mean draws where known, certified accuracy at each radius with its
    95 % interval over images.

    A mode that stops early has no ACR, and its accuracies are marked as lower bounds; at a radius that it did not settle the
    interval ends at 100, and abstentions are not known unless it settled 0. The table's frame has the accuracies in
    percent as numbers, `r=0.5`, `r=0.5_low`, `r=0.5_high`, and `lower_bounds`. `caveats` stand below it, see `caveats_of`.
    """
    numbers, texts = [], []
    radii = list(dict.fromkeys(radii))
    digits = digits_apart(radii)
    for name, frame in sets.items():
        found = summary(frame, radii)
        row = {"certificates": name, "n": found["n"], "abstained": found["abstained"], "ACR": found["acr"]}
        if "draws" in found:
            row["draws"] = round(found["draws"])
        shown = row | {"ACR": None if found["acr"] is None else f"{found['acr']:.4f}"}
        row["lower_bounds"] = found["lower_bounds"]
        for at in found["certified"]:
            column, estimate = f"r={at['radius']:.{digits}g}", Estimate(at["accuracy"], at["low"], at["high"])
            shown[column] = (BOUND if found["lower_bounds"] else "") + percent(estimate)
            row |= {column + end: 100 * part for end, part in zip(("", "_low", "_high"), estimate, strict=True)}
        numbers.append(row)
        texts.append(shown)
    words = pd.DataFrame(texts, dtype=object).fillna(DASH)
    header, cells = [str(name) for name in words], words.to_numpy().tolist()
    return text_table(pd.DataFrame(numbers), header, cells, TITLE, [*notes(sets.values(), radii), *caveats])


def digits_apart(radii: Sequence[float]) -> int:
    """The fewest digits, 4 at least, to which no two different radii agree; 17 tell all floats apart."""
    return next(digits for digits in range(4, 18) if digits == 17 or len({f"{r:.{digits}g}" for r in radii}) >= len(set(radii)))


def notes(frames: Collection[pd.DataFrame], radii: Sequence[float]) -> list[str]:
    """What numbers of certificates are, in sentences."""
    said = "r: images of the right class whose radius is at least that. 95 % intervals are over images; "
    said += "each certificate is wrong with a chance of at most its alpha."
    if all(settles_every_radius(frame) for frame in frames):
        return [said]
    bound = f"{BOUND.strip()}: a lower bound, as the mode stopped early."
    if not all(settles(frame, radius) for frame in frames for radius in (0.0, *radii)):
        bound += (
            " At a radius that it did not settle the interval ends at 100; where it did not settle 0, abstentions are unknown."
        )
    return [said, bound]


def best_of(sets: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """At each radius the best certified accuracy (rounded to 4 digits) over several sets, and whose it is."""
    names = list(sets)
    accuracy = np.array([certified_accuracy(sets[name], radii) for name in names])
    best = accuracy.argmax(0)
    return pd.DataFrame(
        {
            "radius": list(radii),
            "accuracy": [round(float(accuracy[b, k]), 4) for k, b in enumerate(best)],
            "model": [names[b] for b in best],
        }
    )


def compare(sets: Mapping[str, pd.DataFrame], reference: Path) -> pd.DataFrame:
    """Each line of a reference table (radius, best_cert_accuracy, best_model) beside ours; column `same` is the verdict.

    Accuracies agree to the table's 4 digits. The model is compared by the last number in its name (`noise_0.25` with
    `sigma_0.25.tsv`) where both have one.
    """
    try:
        wanted = pd.read_csv(reference, sep="\t", dtype={"best_model": str})
    except (OSError, ValueError) as error:
        raise BadInput(f"{reference} cannot be read as tab-separated values: {error}") from error
    if missing := [name for name in ("radius", "best_cert_accuracy", "best_model") if name not in wanted]:
        raise BadInput(f"{reference} has no column {', '.join(missing)}; it must be a table of best models by radius")
    ours = best_of(sets, wanted["radius"].astype(float).tolist())
    ours["reference"], ours["reference model"] = wanted["best_cert_accuracy"], wanted["best_model"]
    number = ((ours["accuracy"] - ours["reference"]).abs() < 5e-5).to_numpy()
    pairs = zip(ours["model"], ours["reference model"], strict=True)
    model = [None in (key := (_last_number(a), _last_number(b))) or key[0] == key[1] for a, b in pairs]
    ours["same"] = number & np.array(model, bool)
    return ours


def figure(sets: Mapping[str, pd.DataFrame], path: Path, norm: str = "radius") -> Path:
    """The curve of certified accuracy against the radius as a PNG. Returns its path."""
    sheet = curve(sets, norm)
    write_atomic(path, lambda temporary: sheet.savefig(temporary))
    return path


def curve(sets: Mapping[str, pd.DataFrame], norm: str = "radius") -> "Figure":
    """The curve of certified accuracy against the radius, a line per set."""
    from matplotlib.figure import Figure

    from rush_bench.report.figures import COLOURS  # loads matplotlib, which a table does not need

    sheet = Figure(figsize=(6.2, 3.8), dpi=150, layout="constrained")
    axes = sheet.subplots()
    for k, (name, frame) in enumerate(sets.items()):
        radii = np.sort(frame["radius"][frame["correct"] == 1].to_numpy())
        # each image counts up to and including its own radius
        steps, share = np.concatenate([[0.0], radii]), (len(radii) - np.arange(len(radii) + 1)) / len(frame)
        axes.step(
            steps,
            100 * share,
            where="post",
            label=f"{name} (n={len(frame)}{'' if settles_every_radius(frame) else ', lower bound'})",
            linewidth=1.3,
            color=COLOURS[k % len(COLOURS)],
            linestyle=("-", "--", ":")[k // len(COLOURS) % 3],
        )
    axes.set_xlabel(f"{norm} radius (pixel units)" if norm != "radius" else "radius (pixel units)")
    axes.set_ylabel("certified accuracy (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    if sets:
        axes.legend(frameon=False, fontsize=8)
    return sheet


def name_of(result: CellResult) -> str:
    """What tables and legends call a certificate's cell; with its alpha where that is not the usual one."""
    labels, alpha = result.labels, result.identity["attack"].get("alpha", USUAL_ALPHA)
    name = f"{labels['defense']} {labels['law']}:{labels['scale']:g} {labels['norm']} on {labels['dataset']}, {labels['suite']}"
    chance = "" if alpha == USUAL_ALPHA else f", alpha={alpha:g}"
    return f"{name}{chance} [{result.folder.name[:6]}]"


def caveats_of(results: Iterable[CellResult]) -> list[str]:
    """What speaks against the images or labels of certificates, and against which."""
    names: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for caveat in filter(None, (copies_caveat(result), label_caveat(result))):
            names[caveat].append(name_of(result))
    return [f"{'; '.join(of)}: {caveat}" for caveat, of in names.items()]


def shared_radii(results: Sequence[CellResult]) -> tuple[float, ...]:
    """What to report where nothing was asked for: what staged cells settled, else thirds of the largest radius."""
    from rush_bench.certificates.check import theorem_of  # these import torch
    from rush_bench.certificates.sampling import THIRDS

    radii: set[float] = set()
    for result in results:
        attack = result.identity["attack"]
        largest = theorem_of(result).largest(attack["draws"], attack["alpha"])
        radii |= set(attack["radii"]) or {share * largest for share in THIRDS}
    return tuple(sorted(radii))


def _last_number(name: str) -> float | None:
    numbers = re.findall(r"\d+(?:\.\d+)?", Path(name).name.removesuffix(".tsv"))
    return float(numbers[-1]) if numbers else None
