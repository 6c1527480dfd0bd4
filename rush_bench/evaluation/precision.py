"""The precision that attacks search in, and `auto`: one choice for all processes and machines that share a results folder."""

from pathlib import Path
from typing import Any

from rush_bench.errors import BadInput, unknown_name
from rush_bench.files import flock, read_json, write_json

FILE = "precision.json"  # of a results folder


def choose_precision(name: str, device: Any, out: Path) -> str:
    """`auto` is bfloat16 where the device computes in it, and stays what it was when the results folder `out` was begun:
    another precision is another search with records of its own, so that unlike machines would not share their cells.

    Nothing is written: see `keep_precision`.
    """
    from rush_bench.devices import has_bfloat16

    if name not in ("auto", "float32", "bfloat16"):
        raise unknown_name("precision", name, ("auto", "float32", "bfloat16"))
    if name != "auto":
        return name
    if (kept := _kept_precision(out)) is not None:
        return kept
    # records from before this choice was kept: a CPU searched in float32
    begun = device.type == "cpu" and any((out / folder).exists() for folder in ("runs", "settle"))
    return "bfloat16" if has_bfloat16(device) and not begun else "float32"


def keep_precision(name: str, chosen: str, out: Path) -> None:
    """Write down what `auto` is in this results folder, before its first cell is opened.

    BadInput if another machine started it in another precision in the meantime.
    """
    if name != "auto":
        return
    path = out / FILE
    with flock(path.with_suffix(".lock"), wait=True):
        if (kept := _kept_precision(out)) is None:
            write_json(path, {"auto": chosen})
        elif kept != chosen:
            raise BadInput(f"another process has begun {out} in {kept}; the same command again uses it, too")


def _kept_precision(out: Path) -> str | None:
    path = out / FILE
    if not path.exists():
        return None
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("auto") not in ("float32", "bfloat16"):
        raise BadInput(f"{path} is damaged; delete it, or give --precision float32 or bfloat16")
    return str(kept["auto"])
