"""`export`, `merge`, `rename`, `rm`: what was measured and trained, as files."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rush_bench.api.table import load_results
from rush_bench.defenses.target import check_given_name
from rush_bench.errors import BadInput, unknown_name
from rush_bench.evaluation.behaviour import difference
from rush_bench.files import read_json, write_atomic, write_json
from rush_bench.packs import opened, refuse_pack
from rush_bench.records import Cell, CellResult, CellStore
from rush_bench.records.chunks import adversarial_path
from rush_bench.records.curate import cells_of, check_same, merge_cells, remove_cells, rename_cells
from rush_bench.store import ENCODERS, model_names, remove_model, rename_model


def export(
    defense: str, results: Path | str = "results", *, attack: str | None = None, out: Path | str = "export"
) -> list[Path]:
    """Write x' and predictions of a defence as npz files, one per finished cell; returns their paths.

    `index`, `label` (n,): position of each image in its data set, and its class. `predicted` (n,): the class of most of the
    `repeats` (n,) predictions, of which `correct` (n,) were right; `counts` (n, classes). `x` (n, C, H, W), float32 in [0, 1]:
    the attacked images, where the records still have them and the cell is an attack's. `attack` names one column.

    BadInput for a defence or an attack that has no finished cell.
    """
    complete = [cell for cell in load_results(results) if cell.complete]
    names = list(dict.fromkeys(str(cell.labels["defense"]) for cell in complete))
    if defense not in names:
        raise unknown_name(f"defence with finished cells in {results}", defense, names)
    found = [cell for cell in complete if cell.labels["defense"] == defense]
    if attack is not None:
        found = [cell for cell in found if cell.labels["attack"] == attack]
        if not found:
            known = {str(cell.labels["attack"]) for cell in complete if cell.labels["defense"] == defense}
            raise unknown_name(f"finished attack on {defense}", attack, known)
    return [_export(cell, Path(out)) for cell in found]


def merge(sources: Sequence[Path | str], into: Path | str = "results") -> int:
    """Copy what other results folders, or packs, have measured into one; returns the number of chunks that were copied.

    Existing chunks stay unchanged. BadInput for a damaged chunk, for a defence that did something else in one folder than in
    another under the same key (see `rush_bench.evaluation.behaviour`), and for records of one key that cannot be the same
    measurement (see `rush_bench.records.same`): nothing is copied then. A line on stderr names folders whose records differ by
    what rounding does.
    """
    folders = [opened(Path(source)).folder for source in sources]
    behaviours: dict[str, list[Path]] = {}
    for folder in (Path(into), *folders):
        if folder != Path(into) and not any(folder.glob("**/runs/*/cell.json")):
            raise BadInput(f"{folder} holds no records")
        for path in sorted(folder.glob("behaviour/*.json")):
            now = read_json(path)
            for other in behaviours.setdefault(path.name, []):
                if differs := difference(read_json(other), now):
                    where = f"{folder} than in {other.parent.parent}"
                    raise BadInput(f"{now['defense']} is other code in {where}: {differs} differ; merge one of the two alone")
            behaviours[path.name].append(path)
    for line in check_same(folders, Path(into)):
        print(line, file=sys.stderr)
    copied = 0
    for source in folders:
        for path in sorted(source.glob("behaviour/*.json")):
            if not (Path(into) / "behaviour" / path.name).exists():
                write_json(Path(into) / "behaviour" / path.name, read_json(path))
        copied += merge_cells(source, Path(into))
    return copied


def rename(old: str, new: str, *, store: Path | str = "models", results: Path | str = "results") -> tuple[bool, int]:
    """Call a model, or a defence in the records, otherwise: whether the store had it, and in how many cells it was renamed.

    BadInput where neither has it, the new name is taken, or it is none that `--name` would take (an `@m` that both end in is
    left out of account).
    """
    refuse_pack(Path(results))
    check_given_name(new.removesuffix(old[old.index("@") :]) if "@" in old else new)
    in_store = old in model_names(Path(store))
    if cells_of(Path(results), new):
        raise BadInput(f"{results} has records of {new!r} already; choose another name")
    if in_store:
        rename_model(Path(store), old, new)
    count = rename_cells(Path(results), old, new)
    if not in_store and not count:
        known = {str(cell.labels["defense"]).split("@")[0] for cell in load_results(results)}
        raise unknown_name("model or defence", old, {*model_names(Path(store)), *known})
    return in_store, count


def found_to_remove(name: str, store: Path | str, results: Path | str) -> tuple[list[Path], list[Path]]:
    """The folders of a model or encoder of that name, and those of a defence's cells (or of the one cell of that key)."""
    refuse_pack(Path(results))
    homes = [home / name for home in (Path(store), Path(store) / ENCODERS) if name in model_names(home)]
    cells = cells_of(Path(results), name)
    if not homes and not cells:
        known = {str(cell.labels["defense"]) for cell in load_results(results)}
        raise unknown_name("model, defence or result", name, {*model_names(Path(store)), *known})
    return homes, cells


def rm(name: str, *, store: Path | str = "models", results: Path | str = "results") -> tuple[list[Path], list[Path]]:
    """Delete a model or encoder and a defence's records, or one record by its key; returns the folders that are gone.

    BadInput where there is nothing of that name.
    """
    homes, cells = found_to_remove(name, store, results)
    remove_cells(cells)
    for home in homes:
        remove_model(home.parent, home.name)
    return homes, cells


def _export(cell: CellResult, out: Path) -> Path:
    labels, arrays = cell.labels, cell.arrays
    kept: dict[str, Any] = {name: arrays[name] for name in ("index", "label", "correct", "repeats", "counts")}
    kept["predicted"] = arrays["counts"].argmax(1)
    if all(adversarial_path(cell.folder, c).exists() for c in range(cell.chunks)):
        store, same = CellStore(cell.folder.parent.parent), Cell(cell.identity, labels)
        kept["x"] = np.concatenate([store.read_adversarial(same, c) for c in range(cell.chunks)])
    words = (labels["defense"], labels["dataset"], labels["suite"], labels["attack"], cell.folder.name[:6])
    path = out / ("-".join(map(str, words)).replace("/", "_").replace(" ", "_") + ".npz")
    write_atomic(path, lambda temporary: np.savez_compressed(temporary, **kept))
    return path
