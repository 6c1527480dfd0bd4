"""Clean and attacked images with what the defence says of them, where x' is on disk."""

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rush_bench.datasets import Images, load_dataset
from rush_bench.errors import RushBenchError
from rush_bench.places import data_folder, on_disk
from rush_bench.records import Cell, CellResult, CellStore
from rush_bench.report.figures import PANELS
from rush_bench.report.rows import Row

SHOWN = 8  # images of a row
ATTACKS = tuple(reversed(PANELS))  # whose x' is shown: the first that is there


@dataclass(frozen=True)
class Pair:
    """An image as attacked, and where the data set is at hand as it was and the difference; PNGs as `data:` addresses."""

    label: str
    before: str
    after: str
    turned: bool
    attacked: str
    clean: str | None = None
    difference: str | None = None


@dataclass(frozen=True)
class Gallery:
    """The images of one row of the table, first those whose prediction the attack turned. `without`: why none is clean."""

    title: str
    result: CellResult
    pairs: list[Pair]
    without: str = ""


def galleries(table_rows: Sequence[Row], data_dir: Path | None, most: int) -> tuple[list[Gallery], int]:
    """A gallery per row that has x' on disk, at most so many, and how many rows have none on disk."""
    shown, missing, known = list[Gallery](), 0, dict[tuple[str, str, int], Images | str]()
    for row in table_rows:
        attacked = [row.cells[name] for name in ATTACKS if name in row.cells]
        stored = [cell for cell in attacked if (cell.folder / "adversarial-0000.npy").exists()]
        missing += bool(attacked and not stored)
        if stored and len(shown) < most:
            shown.append(_gallery(row, stored[0], data_dir, known))
    return shown, missing


def _gallery(row: Row, attacked: CellResult, data_dir: Path | None, known: dict[tuple[str, str, int], Images | str]) -> Gallery:
    cell = Cell(attacked.identity, attacked.labels)
    stored = CellStore(attacked.folder.parent.parent).read_adversarial(cell, 0)  # the first chunk is enough
    after = _counts(attacked)[: len(stored)]
    before = _counts(row.cells["clean"])[: len(stored)] if "clean" in row.cells else None
    turned = np.zeros(len(stored), bool) if before is None else before.argmax(1) != after.argmax(1)
    order = np.argsort(~turned, kind="stable")[:SHOWN]
    key = str(attacked.labels["dataset"]), str(attacked.identity["images"]), int(attacked.labels["n"])
    if key not in known:
        known[key] = _images(attacked, stored.shape[2:], data_dir)
    images = known[key]
    frame, pairs = attacked.frame, []
    for i in order:
        label = int(frame["label"][i])
        names = [str(k) for k in range(after.shape[1])] if isinstance(images, str) else list(images.classes)
        answer = "" if before is None else _answer(before[i], names)
        pair = Pair(names[label], answer, _answer(after[i], names), bool(turned[i]), _png(stored[i]))
        if not isinstance(images, str):
            clean = images.floats([i])[0].numpy()
            change = np.clip(0.5 + (stored[i] - clean) / (2 * np.abs(stored[i] - clean).max() or 1.0), 0, 1)
            pair = Pair(**{**vars(pair), "clean": _png(clean), "difference": _png(change)})
        pairs.append(pair)
    title = f"{row.labels['defense']}, {row.labels['dataset']}, {row.threat_text}, {attacked.labels['attack']}"
    return Gallery(title, attacked, pairs, images if isinstance(images, str) else "")


def _counts(result: CellResult) -> NDArray[np.int64]:
    """Predictions of each image by class (n, classes)."""
    return result.frame.filter(regex=r"^count_\d+$").to_numpy()


def _answer(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    share = counts.max() / counts.sum()
    return names[int(counts.argmax())] + ("" if share == 1 else f" ({share:.0%})")


def _images(result: CellResult, size: tuple[int, ...], data_dir: Path | None) -> Images | str:
    """The very images that were attacked, by their digest; else why they are not at hand."""
    name, split, n = result.labels["dataset"], result.labels.get("split", "test"), result.labels["n"]
    if on_disk(name, data_folder(data_dir)):  # nothing is downloaded for a picture
        with contextlib.suppress(RushBenchError, OSError):
            for count in (n, None):
                images = load_dataset(name, split, count, data_dir=data_dir, size=size)
                if images.digest == result.identity["images"]:
                    return images
    return f"The clean images are not shown: the {n} of {name} that were attacked are not on this machine."


def _png(image: NDArray[np.floating]) -> str:
    """An image (C, H, W) in [0, 1] as the address of a PNG."""
    file = io.BytesIO()
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
