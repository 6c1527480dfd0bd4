"""`rush_bench.table` and `rush_bench.load_results`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rush_bench import records
from rush_bench.errors import BadInput
from rush_bench.packs import opened, pack_hint
from rush_bench.records import CellResult
from rush_bench.report.filters import only as rows_of
from rush_bench.report.filters import ordered
from rush_bench.report.table import Table, of_frame
from rush_bench.report.tables import check_style
from rush_bench.report.tables import table as frame_of
from rush_bench.store import cards_measured

if TYPE_CHECKING:
    from rush_bench.report.trainings import Trainings

Results = Path | str | Iterable[Path | str] | Iterable[CellResult]


def load_results(*folders: Path | str) -> list[CellResult]:
    """Every cell under `runs/` of results folders, or of packs of them (none named: `results`); one in several counts once.

    A cell has `labels` (defense, dataset, attack, suite, n, ...), `complete`, and `frame`: a row per image with `index`,
    `label`, `correct` of `repeats` predictions, `margin`, `distance` and what it cost. Folders that hold no cell are left out
    with a line on stderr; BadInput where `frame` meets a damaged file.

    Examples:
        >>> import rush_bench as rb
        >>> cells = rb.load_results(measured)
        >>> sorted({cell.labels["attack"] for cell in cells})
        ['clean', 'pgd', 'worst']
        >>> bool(cells[0].frame["correct"].max() <= cells[0].frame["repeats"].max())
        True
    """
    return records.load_results(*(opened(Path(folder)).folder for folder in folders or ("results",)))


def table(
    results: Results = "results",
    style: str = "plain",
    *,
    store: Path | str = "models",
    columns: Sequence[str] | None = None,
    only: Mapping[str, str | Sequence[str]] | None = None,
    sort: str | None = None,
) -> Table:
    """The table of everything measured, from the records alone.

    Args:
        results: a results folder or pack, several, or cells (`load_results`).
        style: `plain`, a row a (defence, data set, threat, suite, n); `paper`, Table 1 of the RUSH paper (Pang, Liu and Zhou
            2022) with what was measured beside the published numbers.
        store: folder of the models, whose cards add what training cost; trainings that differ in their seed alone get a row for
            their mean.
        columns: the columns to show, in this order: `["defense", "clean", "worst"]` (None: all that were measured).
        only: rows to show, by patterns of their text in columns: `{"defense": "rush*", "dataset": ["digits", "cifar10"]}`.
        sort: a column to sort rows by, `"-worst"` from the highest down (None: by data set, threat, suite, n and name).

    Returns:
        A `Table`: `print` shows it, `frame` is the pandas frame (accuracies in percent), `to_latex()` and others write it.

    Raises:
        BadInput: no finished cell, a wrong style or column, no row that fits, records that were changed.

    Examples:
        >>> import rush_bench as rb
        >>> shown = rb.table(measured)
        >>> shown.frame["defense"].tolist()
        ['linear']
        >>> print(shown.select(["defense", "clean"]).to_markdown().splitlines()[0])
        | Defence | Clean |
    """
    check_style(style)
    cells, folders = cells_of(results)
    if style == "plain" and not any(cell.complete for cell in cells):
        places = ", ".join(map(str, folders)) or "the cells given"
        packed = "".join(pack_hint(Path(folder)) for folder in folders)
        fix = packed or "; run `rush-bench attack` first, or point --results at its --out"
        raise BadInput(f"no finished cell under {places}{fix}")
    frame = rows_of(frame_of(cells, style, trainings_of(cells, store, folders)), only or {})
    result = of_frame(ordered(frame, sort) if sort else frame)
    return result.select(columns) if columns else result


def cells_of(results: Results) -> tuple[list[CellResult], list[Path | str]]:
    """The cells that are given, or those of the folders; and the folders."""
    given: list[Path | str | CellResult] = [results] if isinstance(results, str | Path) else list(results)
    folders = [part for part in given if isinstance(part, str | Path)]
    return [part for part in given if isinstance(part, CellResult)] or load_results(*folders), folders


def trainings_of(cells: Iterable[CellResult], store: Path | str, folders: Iterable[Path | str] = ()) -> "Trainings":
    """How the models came about that were measured, as far as the store or the folders have their cards."""
    digests = {str(cell.labels.get("sha256")) for cell in cells}
    stores = [Path(store), *(opened(Path(folder)).cards for folder in folders)]
    cards = [card for place in stores for card in cards_measured(place, digests).values()]
    if not cards:
        return {}
    from rush_bench.report.cards import training_of  # needs torch, which a table alone does not

    return {(digest, card["recipe"]): training_of(card) for card in cards for digest in card["sha256"].values()}
