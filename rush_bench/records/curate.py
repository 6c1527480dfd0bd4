"""Whole cells as files: copied into another results folder, renamed, removed."""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput
from rush_bench.files import write_atomic, write_json
from rush_bench.records.cells import Cell, description, read_description
from rush_bench.records.chunks import adversarial_path, chunk_path, done_chunks, is_done, read_chunk
from rush_bench.records.same import Seen
from rush_bench.records.sharing import CellStore

ROOMS = ("", "corruptions", "certificates", "settle", "settle/certificates")  # of a results folder, each with its runs/
NAMED = ("defense", "model", "subject")  # labels that begin with a defence's name


def cells_in(results: Path) -> Iterator[tuple[Path, str, dict[str, Any], list[dict[str, Any]]]]:
    """Every cell's folder under a results folder, its room, identity and labels; BadInput for one that is none of ours."""
    for room in ROOMS:
        for path in sorted((results / room / "runs").glob("*/cell.json")):
            yield path.parent, room, *read_description(path)


def check_same(sources: Sequence[Path], into: Path) -> list[str]:
    """A line for each two results folders whose records of a cell differ by what rounding does.

    BadInput where they cannot be one measurement (see `rush_bench.records.same`), or where a source holds what is no cell.
    """
    seen = Seen()
    for source in sources:
        for folder, room, identity, labels in cells_in(source):
            cell = Cell(identity, labels[0])
            if (there := CellStore(into / room).folder(cell)).is_dir():
                seen.meet(cell.key, cell, there, into / room)
            seen.meet(cell.key, cell, folder, source / room)
    return seen.lines(f"what is in {into} stays, and else the first is taken")


def merge_cells(source: Path, into: Path) -> int:
    """Copy the chunks that `into` lacks; returns how many. Each is checked before it is copied: BadInput for a damaged one."""
    copied = 0
    for folder, room, identity, labels in cells_in(source):
        store = CellStore(into / room)
        for each in labels:
            store.open(cell := Cell(identity, each))
        target = store.folder(cell)
        for c in done_chunks(cell, folder):
            if is_done(target, c):
                continue
            read_chunk(cell, chunk_path(folder, c), c)
            for path in (adversarial_path, chunk_path):  # the chunk last: with it the work is done
                if path(folder, c).exists():
                    write_atomic(path(target, c), partial(shutil.copyfile, path(folder, c)))
            copied += 1
    return copied


def rename_cells(results: Path, old: str, new: str) -> int:
    """Call a defence otherwise in every cell; returns in how many. `old` stands for `old@m` and `old:best` too."""
    count = 0
    for folder, _, identity, labels in cells_in(results):
        changed = [{key: _renamed(key, value, old, new) for key, value in each.items()} for each in labels]
        if changed != labels:
            write_json(folder / "cell.json", description(Cell(identity, changed[0]), changed))
            count += 1
    return count


def cells_of(results: Path, name: str) -> list[Path]:
    """The folders of a defence's cells (`name`, also at any votes), or of the one cell of that key."""
    return [
        folder
        for folder, _, _, labels in cells_in(results)
        if folder.name == name or all(_is(each["defense"], name) for each in labels)
    ]


def remove_cells(folders: list[Path]) -> None:
    """Delete cells with all their chunks and x'."""
    for folder in folders:
        if not (folder / "cell.json").is_file():
            raise BadInput(f"{folder} is no record")
        shutil.rmtree(folder)


def _is(value: Any, name: str) -> bool:
    return isinstance(value, str) and (value == name or value.startswith((f"{name}@", f"{name}:")))


def _renamed(key: str, value: Any, old: str, new: str) -> Any:
    return new + value[len(old) :] if key in NAMED and _is(value, old) else value
