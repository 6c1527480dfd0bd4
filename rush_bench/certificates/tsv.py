"""Certificates as tab-separated values: the six columns of Cohen's code, and ours in full precision. No torch.

Six columns: `idx label predict radius correct time`; predict -1 is an abstention; the radius has 3 significant digits,
which can round it up (1.9057 to 1.91), so that the six columns are for exchange and our own numbers come from the rest.
"""

import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from rush_bench.errors import BadInput
from rush_bench.files import write_text
from rush_bench.records import CellResult

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


def frame_of(result: CellResult) -> pd.DataFrame:
    """A row per image of a cell: the six columns (radius in full precision), then bound, count, draws and what was used.

    Of a mode that stops early also `settled`, the radii that it decided (`0.0;0.25`), and `largest`, beyond which its draws
    certify nothing. BadInput for a record that was changed, see `check_record`.
    """
    from rush_bench.certificates.check import check_record, theorem_of  # these import torch, which files do not need

    check_record(result)
    found = result.frame
    predict = found["predict"].astype(int)
    selected = found["selected"].astype(int)
    counts = found[[f"count_{k}" for k in range(result.labels["classes"])]].to_numpy()
    frame = pd.DataFrame(
        {
            "idx": found["index"].astype(int),
            "label": found["label"].astype(int),
            "predict": predict,
            "radius": found["radius"],
            "correct": (predict == found["label"]).astype(int),
            "time": [str(datetime.timedelta(seconds=float(s))) for s in found["seconds"]],
            "selected": selected,
            "bound": found["bound"],
            "count": counts[np.arange(len(found)), selected],
            "draws": found["repeats"].astype(int),
            "norm": result.labels["norm"],
            "law": result.labels["law"],
            "scale": result.labels["scale"],
            "alpha": result.labels["alpha"],
            "mode": result.labels["suite"],
        }
    )
    if (attack := result.identity["attack"])["mode"] == "fixed":
        return frame
    largest = theorem_of(result).largest(attack["draws"], attack["alpha"])
    return frame.assign(settled=";".join(map(str, attack["radii"])), largest=largest)


def write_tsv(result: CellResult) -> None:
    """`certificate.tsv` and, in mode fixed, `cohen.tsv` in the cell's folder, where they are not yet.

    Six columns cannot say that the mode stopped early: whoever reads them takes each radius for all that its draws allow.
    """
    full, six = result.folder / "certificate.tsv", result.folder / "cohen.tsv"
    fixed = result.identity["attack"]["mode"] == "fixed"
    if full.exists() and (six.exists() or not fixed):
        return
    frame = frame_of(result)
    # 17 digits give every float64 back
    write_text(full, frame.to_csv(sep="\t", index=False, float_format="%.17g", lineterminator="\n"))
    if fixed:
        write_text(six, six_columns(frame))


def six_columns(frame: pd.DataFrame) -> str:
    """The text that Cohen's certify.py would have written."""
    rows = ["\t".join(COLUMNS)]
    for row in frame[list(COLUMNS)].itertuples(index=False):
        rows.append(f"{row.idx}\t{row.label}\t{row.predict}\t{row.radius:.3}\t{row.correct}\t{row.time}")
    return "\n".join(rows) + "\n"


def read_tsv(path: Path) -> pd.DataFrame:
    """A file of certificates, Cohen's six columns or ours, checked. BadInput names the file and the line at fault."""
    try:
        frame = pd.read_csv(path, sep="\t", dtype={"settled": str})
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as tab-separated values: {error}") from error
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        hint = "; it holds predictions, not certificates" if "basePredict" in frame else ""
        raise BadInput(f"{path} has no column {', '.join(missing)}{hint}; the columns are {' '.join(COLUMNS)}")
    if not len(frame):
        raise BadInput(f"{path} holds no images; run the command that made it again")
    numbers = frame[["idx", "label", "predict", "radius", "correct"]].apply(pd.to_numeric, errors="coerce")
    predict, right = numbers["predict"], numbers["correct"]
    for wrong, what in (
        (~np.isfinite(numbers.to_numpy()).all(axis=1), "a value is missing or not a number"),
        ((numbers[["idx", "label", "predict", "correct"]] % 1 != 0).any(axis=1), "idx, label, predict, correct are not whole"),
        (numbers["idx"].duplicated(), "the image is there twice"),
        ((predict < -1) | (numbers["label"] < 0), "predict is below -1, or label below 0"),
        (numbers["radius"] < 0, "the radius is below 0"),
        (right != (predict == numbers["label"]), "correct is not whether predict is the label"),
        ((predict == -1) & (numbers["radius"] != 0), "an abstention has a radius"),
    ):
        at = np.flatnonzero(wrong)
        if len(at):
            raise BadInput(f"{path}, line {at[0] + 2}: {what}; fix the file or make it again")
    whole = numbers.astype({"idx": int, "label": int, "predict": int, "correct": int})
    return frame.assign(**{name: whole[name] for name in whole})


def read_folder(places: list[Path]) -> dict[str, pd.DataFrame]:
    """Certificates of files and of folders' `*.tsv` files, by name (by path where a name is there twice).

    In a cell's folder only `certificate.tsv` is read. A place without any file is a BadInput.
    """
    files: list[Path] = []
    for place in places:
        full = place / "certificate.tsv"
        inside = ([full] if full.exists() else sorted(place.glob("*.tsv"))) if place.is_dir() else [place]
        if not inside:
            raise BadInput(f"{place} holds no .tsv file; name a folder of certificates, or the files")
        files += [file for file in inside if file not in files]
    names = [file.parent.name if file.name == "certificate.tsv" else file.name for file in files]
    return {name if names.count(name) == 1 else str(file): read_tsv(file) for name, file in zip(names, files, strict=True)}
