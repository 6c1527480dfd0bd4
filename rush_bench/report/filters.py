"""Which rows a table shows, and in what order: `table --only`, `table --sort`."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import pandas as pd

from rush_bench.errors import BadInput, unknown_name


def only(frame: pd.DataFrame, wanted: Mapping[str, str | Sequence[str]]) -> pd.DataFrame:
    """The rows whose text in each column fits one of its patterns: `{"defense": "rush*", "threat": "linf 8/255"}`.

    BadInput for a column that the table has not, for one of accuracies, and where no row is left.
    """
    for column, patterns in wanted.items():
        _known(frame, column)
        if f"{column}_low" in frame:
            raise BadInput(
                f"{column} is an accuracy: rows are chosen by names and settings; sort by it, as in --sort -{column}"
            )
        several = [patterns] if isinstance(patterns, str) else patterns
        texts = ["" if pd.isna(value) else str(value) for value in frame[column]]
        fits = [any(fnmatchcase(text, pattern) for pattern in several) for text in texts]
        if not any(fits):
            available = ", ".join(sorted(set(texts) - {""})) or "nothing"
            raise BadInput(f"no row is left with {column} {', '.join(several)}; there is {available}")
        frame = frame[fits].reset_index(drop=True)
    return frame


def ordered(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows by a column, `-worst` from the highest down, within the blocks of the paper style; what has no value goes last.

    BadInput for a column that the table has not.
    """
    column = by.removeprefix("-")
    _known(frame, column)
    blocks = [part for _, part in frame.groupby("block", sort=False)] if "block" in frame else [frame]
    places = [i for part in blocks for i in part.sort_values(column, ascending=by == column, kind="stable").index]
    return frame.loc[places].reset_index(drop=True)


def _known(frame: pd.DataFrame, column: str) -> None:
    if column not in frame:
        raise unknown_name("column", column, map(str, frame))
