"""RobustBench's `model_info` files: a row of our tables as one, and theirs as the claim that an audit is about.

A file is `model_info/<data set>/<Linf or L2>/<name>.json`; its accuracies are texts in percent, its eps a text. What a record
does not know (authors, link, venue) is null. `autoattack_acc` is the column AutoAttack, if that was run; the per-image worst
case over all that was run, how many images, which suite and the intervals are under `rush_bench`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.files import read_json, write_json
from rush_bench.report.layout import first_distinct
from rush_bench.report.rows import Row
from rush_bench.settings import parse_number

FOLDER = "model_info"
THREATS = {"linf": "Linf", "l2": "L2"}
AUTOATTACK = "aa"


def model_info(row: Row) -> dict[str, Any]:
    """A row with a threat as RobustBench has it."""
    assert row.threat is not None
    norm, eps = row.threat["norm"], row.threat["eps"]
    has_autoattack = AUTOATTACK in row.estimates and not row.quick
    accuracies = {
        name: {"acc": _percent(measured.value), "low": _percent(measured.low), "high": _percent(measured.high)}
        for name, measured in row.estimates.items()
    }
    return {
        "link": None,
        "name": row.labels["defense"],
        "authors": None,
        "additional_data": row.labels.get("extra_data") is not None,
        "number_forward_passes": max(1, int(row.labels.get("votes") or 0)),
        "dataset": row.labels["dataset"],
        "venue": None,
        "architecture": row.labels.get("architecture"),
        "eps": f"{eps * 255:g}/255" if norm == "linf" else f"{eps:g}",
        "clean_acc": _percent(row.estimates["clean"].value) if "clean" in row.estimates else None,
        "reported": None,
        "autoattack_acc": _percent(row.estimates[AUTOATTACK].value) if has_autoattack else None,
        "rush_bench": {
            "worst_acc": accuracies.get("worst", {}).get("acc"),
            "suite": row.labels["suite"],
            "n": row.labels["n"],
            "predictions_per_image": row.repeats,
            "weights": row.weights,
            "accuracies": accuracies,
            "upper_bounds": list(row.bounds),
            "notes": list(row.notes),
        },
    }


def write_model_info(rows: Iterable[Row], folder: Path) -> list[Path]:
    """A file per row that has a threat and a worst case, under `folder`; names that would be one say what differs."""
    chosen = [row for row in rows if row.threat is not None and "worst" in row.estimates]
    if not chosen:
        raise BadInput("no row has a worst case under a threat yet; run `rush-bench attack` first")
    by_name: dict[Path, list[Row]] = defaultdict(list)
    for row in chosen:
        assert row.threat is not None
        place = folder / FOLDER / str(row.labels["dataset"]) / THREATS[row.threat["norm"]]
        name = "-".join(str(part) for part in (row.labels["defense"], row.labels["suite"], row.labels["n"]))
        by_name[place / f"{name.replace('/', '_')}.json"].append(row)
    paths = []
    for path, same in by_name.items():
        for row, mark in zip(same, _marks(same), strict=True):
            paths.append(path.with_name(f"{path.stem}{mark}.json"))
            write_json(paths[-1], model_info(row))
    return paths


def _marks(same: Sequence[Row]) -> Sequence[str]:
    """What tells rows of one name apart: nothing for one alone, else the seed or K, else the record of the worst case."""
    records = [row.cells["worst"].folder.name for row in same]
    seeds, repeats = [f"-seed{row.seed}" for row in same], [f"-K{row.repeats}" for row in same]
    short = [f"-{record[:6]}" for record in records]
    return first_distinct([""] * len(same), seeds, repeats, short, [f"-{record}" for record in records])


@dataclass(frozen=True)
class StatedAccuracy:
    """What a model_info file states: an accuracy as a fraction, of which kind, and under which threat, on what.

    `norm` is None where the file lies in no folder of a threat, Linf or L2.
    """

    accuracy: float
    kind: str
    name: str
    dataset: str
    eps: float
    norm: str | None


def read_model_info(path: Path) -> StatedAccuracy:
    """The accuracy that a file claims: the higher of what its authors reported and what AutoAttack left.

    BadInput for a file that cannot be read or states neither, and for what is no percentage.
    """
    norm = next((norm for norm, folder in THREATS.items() if folder == path.absolute().parent.name), None)
    try:
        info = read_json(path)
        stated = [(float(info[key]), key) for key in ("reported", "autoattack_acc") if info.get(key) not in (None, "")]
        if wrong := [f"{key} {percent:g}" for percent, key in stated if not 0 <= percent <= 100]:
            raise ValueError(f"{wrong[0]} is no percentage")
        percent, kind = max(stated)
        if percent <= 1:
            raise ValueError(f"{kind} {percent:g} is a fraction, or nothing; a claim is a percentage, such as 54.8")
        eps = parse_number(str(info["eps"]))
        return StatedAccuracy(percent / 100, kind, str(info["name"]), str(info["dataset"]), eps, norm)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is no model_info of RobustBench with reported or autoattack_acc, dataset and eps: {error}"
        ) from error


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
