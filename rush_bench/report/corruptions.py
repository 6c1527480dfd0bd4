"""The table of common corruptions, from records alone: accuracy, its mean, and mCE (Hendrycks and Dietterich 2019).

With E[s, c] the error at severity s of corruption c, over the same images for the model and a reference network,

    CE[c] = sum over s of E[s, c] of the model / sum over s of E[s, c] of the reference,    mCE = mean over c of CE[c],

both in percent (their section 4.1; AlexNet is their reference on ImageNet-C, there is no agreed one for CIFAR).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rush_bench.errors import BadInput
from rush_bench.files import digest, write_text
from rush_bench.records import CellResult
from rush_bench.records.statistics import Estimate, interval
from rush_bench.report.layout import DASH
from rush_bench.report.writers import to_csv

SEVERITIES = (1, 2, 3, 4, 5)
MEAN = "mean"
NUMBERS = ("accuracy", "accuracy_low", "accuracy_high", *(f"severity_{s}" for s in SEVERITIES), "ce", "ce_low", "ce_high")
COLUMNS = ["defense", "dataset", "corruption", *NUMBERS, "reference", "n", "K"]
_SAMPLES = 2000
Floats = NDArray[np.float64]
Counts = tuple[NDArray[np.int64], NDArray[np.int64]]  # right and all predictions, (images, severities) each


def table(results: Sequence[CellResult], reference: str | None = None) -> pd.DataFrame:
    """A row per defence and corruption, and one for their mean, in percent; NaN where a cell is not finished.

    `results` are the cells of one data set, all corruptions asked for. `accuracy` is the mean over the five severities;
    `ce` in a row of a corruption is CE, in the row `mean` it is mCE, relative to the defence named `reference`. Intervals
    are 95 %: of accuracies `interval` on an image's predictions over all cells (a little wide, for cells differ), of
    CE and mCE the percentile bootstrap, paired by image.
    """
    by: dict[str, dict[str, dict[int, CellResult]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        labels = result.labels
        by[labels["defense"]][labels["corruption"]][labels["severity"]] = result
    if reference is not None and reference not in by:
        raise BadInput(f"the reference {reference!r} was not measured; there is {', '.join(by)}")
    counts = {name: {c: _counts(cells) for c, cells in found.items()} for name, found in by.items()}
    lines = []
    for name, found in counts.items():
        labels, repeats = _about(by[name])
        about = {"defense": name, "dataset": labels["dataset"], "reference": reference, "n": labels["n"], "K": repeats}
        relative = {} if reference is None else _ce(found, counts[reference])
        for corruption, cell in found.items():
            numbers = {} if cell is None else _accuracy([cell])
            lines.append(about | {"corruption": corruption} | numbers | relative.get(corruption, {}))
        complete = [cell for cell in found.values() if cell is not None]
        numbers = _accuracy(complete) if len(complete) == len(found) else {}
        lines.append(about | {"corruption": MEAN} | numbers | relative.get(MEAN, {}))
    return pd.DataFrame(lines, columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))


def with_earlier(results: Sequence[CellResult], known: Iterable[CellResult]) -> list[CellResult]:
    """These results, and what else is `known` and finished of the same images under all the same corruptions and severities.

    Whatever has a name that stands there already gets its weights, K and seed behind it.
    """
    images = {_place(result): result.identity["images"] for result in results}
    others: dict[str, dict[tuple[str, int], CellResult]] = defaultdict(dict)
    for result in known:
        if result.complete and images.get(_place(result)) == result.identity["images"]:
            others[_measured(result)][_place(result)] = result
    for own in {_measured(result) for result in results}:
        others.pop(own, None)
    found, names = list(results), {result.labels["defense"] for result in results}
    whole = (cells for cells in others.values() if len(cells) == len(images))
    for cells in sorted(whole, key=lambda cells: str(next(iter(cells.values())).labels["defense"])):
        first = next(iter(cells.values()))
        name, identity = first.labels["defense"], first.identity
        if name in names:
            name += f" ({identity['weights'][:6]}, K={identity['repeats']}, seed {identity['seed']})"
        names.add(name)
        found += [replace(cell, labels={**cell.labels, "defense": name}) for cell in cells.values()]
    return found


def _place(result: CellResult) -> tuple[str, int]:
    return result.labels["corruption"], result.labels["severity"]


def _measured(result: CellResult) -> str:
    return digest([result.identity[key] for key in ("weights", "defense", "seed", "repeats")])


def ce(model: Floats, reference: Floats, samples: int = _SAMPLES, seed: int = 0) -> list[Estimate]:
    """CE of each corruption, then their mean, which is mCE; fractions with 95 % percentile bootstrap over images.

    Both are errors of the same images (n, corruptions), each a mean over severities. CE is NaN for a corruption on which
    the reference makes no error, and mCE then too.
    """
    if model.shape != reference.shape or model.ndim != 2 or not model.size:
        raise BadInput(f"CE needs errors (images, corruptions) of both networks, not {model.shape} and {reference.shape}")
    rng, n = np.random.default_rng(seed), len(model)
    ratios = np.empty((samples, model.shape[1] + 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, samples, 100):  # 100 x 10,000 images: 8 MB at a time
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(100, samples - start)).astype(float)
            ratios[start : start + 100, :-1] = (drawn @ model) / (drawn @ reference)
        values = model.sum(0) / reference.sum(0)
    ratios = np.nan_to_num(ratios, nan=np.inf, posinf=np.inf)  # a sample without errors of the reference bounds nothing
    ratios[:, -1] = ratios[:, :-1].mean(1)
    values = np.where(reference.any(0), values, np.nan)
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0, method="inverted_cdf")  # it never mixes two infinities
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    found = zip([*values, values.mean()], low, high, strict=True)
    return [nothing if np.isnan(value) else Estimate(float(value), float(a), float(b)) for value, a, b in found]


def lay_out(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: a row per corruption, then mean and mCE; a column per defence."""
    names = list(dict.fromkeys(frame["defense"]))
    corruptions = list(dict.fromkeys(frame["corruption"]))
    lines = {(line["defense"], line["corruption"]): line for line in frame.to_dict(orient="records")}
    body = [[c, *(_text(lines[name, c], "accuracy") for name in names)] for c in corruptions]
    body.append(["mCE", *(_text(lines[name, MEAN], "ce") for name in names)])
    return ["corruption", *names], body


def write(frame: pd.DataFrame, stem: Path) -> list[Path]:
    """Write `<stem>.csv`, all numbers, and `<stem>.md`, the table for people; returns both paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("csv", "md")]
    header, body = lay_out(frame)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    to_csv(frame, paths[0])
    write_text(paths[1], f"{text}\n\n{caption(frame)}\n")
    return paths


def caption(frame: pd.DataFrame) -> str:
    """What the numbers are."""
    first = frame.iloc[0]
    base = f"relative to {first['reference']}" if first["reference"] else "needs a reference network"
    return (
        f"Accuracy on {first['dataset']} with common corruptions, mean over five severities, {first['n']} images each, "
        f"in % [95 % interval]; mCE {base} (100: as many errors)."
    )


def _counts(cells: dict[int, CellResult]) -> Counts | None:
    """Rows in the order of the images; None where a severity is not finished."""
    if any(s not in cells or not cells[s].complete for s in SEVERITIES):
        return None
    found = [cells[s].arrays for s in SEVERITIES]
    orders = [np.argsort(arrays["index"]) for arrays in found]
    images, right, of = (
        [arrays[key][order] for arrays, order in zip(found, orders, strict=True)] for key in ("index", "correct", "repeats")
    )
    if any(not np.array_equal(images[0], other) for other in images[1:]):
        raise BadInput(f"{cells[1].folder} and its other severities hold other images; run the same command again")
    return np.stack(right, axis=1), np.stack(of, axis=1)


def _accuracy(cells: list[Counts]) -> dict[str, float]:
    right, of = (np.stack(parts, axis=1) for parts in zip(*cells, strict=True))  # (n, corruptions, severities)
    estimate = interval(right.sum((1, 2)), of.sum((1, 2)), deterministic=False)
    severities = (right / of).mean((0, 1))
    keys = ("accuracy", "accuracy_low", "accuracy_high", *(f"severity_{s}" for s in SEVERITIES))
    return dict(zip(keys, (100 * float(v) for v in (*estimate, *severities)), strict=True))


def _ce(model: dict[str, Counts | None], reference: dict[str, Counts | None]) -> dict[str, dict[str, float]]:
    """The columns of CE by corruption, where both are finished; of mCE where all are."""
    pairs = {c: (mine, other) for c, mine in model.items() if mine is not None and (other := reference.get(c)) is not None}
    if not pairs:
        return {}
    errors, base = (np.stack([1 - (pair[k][0] / pair[k][1]).mean(1) for pair in pairs.values()], axis=1) for k in (0, 1))
    names = [*pairs, MEAN] if len(pairs) == len(model) else list(pairs)
    keys = ("ce", "ce_low", "ce_high")
    found = (dict(zip(keys, (100 * part for part in estimate), strict=True)) for estimate in ce(errors, base))
    return dict(zip(names, found, strict=False))  # without its name, mCE is left out


def _about(found: dict[str, dict[int, CellResult]]) -> tuple[dict[str, Any], int]:
    first = next(iter(next(iter(found.values())).values()))
    return first.labels, first.identity["repeats"]


def _text(line: dict[str, Any], key: str) -> str:
    if np.isnan(line[key]):
        return DASH
    return f"{line[key]:.1f} [{line[f'{key}_low']:.1f}, {line[f'{key}_high']:.1f}]"
