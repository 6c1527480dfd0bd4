"""`rush-bench figure`: draw what was measured, from the records and their stored x'."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rush_bench.cli import common
from rush_bench.errors import BadInput, unknown_name

if TYPE_CHECKING:
    from rush_bench.records import CellResult

KINDS = ("accuracy", "images")
SHOWN = 6  # images in a picture


@click.command()
@click.option(
    "--kind", "kinds", default="accuracy", show_default=True, help="accuracy (against eps), images, or both by commas."
)
@common.results
@common.folder_option("--out", None, "Folder for robust_accuracy.png and images.png.  [default: that of --results]")
@click.option("--defense", metavar="NAME", help="Whose attacked images to show.  [default: a deterministic one]")
@common.data_dir
def command(kinds: str, results: Path, out: Path | None, defense: str | None, data_dir: Path | None) -> None:
    """Draw accuracy against eps, and images as they are and as PGD left them with what a defence says of each."""
    wanted = [part.strip() for part in kinds.split(",") if part.strip()]
    for part in wanted:
        if part not in KINDS:
            raise unknown_name("kind of figure", part, KINDS)
    from rush_bench.records import load_results
    from rush_bench.report import figures

    found, folder = load_results(results), out or results
    for part in wanted:
        if part == "accuracy":
            path = figures.accuracy_against_eps(found, folder / "robust_accuracy.png")
        else:
            path = picture(found, defense, data_dir, folder / "images.png")
        click.echo(f"wrote {path}", err=True)


def picture(results: "list[CellResult]", defense: str | None, data_dir: Path | None, path: Path) -> Path:
    """Images of the first chunk, clean and attacked at the smallest eps that PGD was run at: first those that it turned."""
    from rush_bench.datasets import load_dataset
    from rush_bench.records import Cell, CellStore
    from rush_bench.report import figures

    kept = [r for r in results if r.complete and (r.folder / "adversarial-0000.npy").exists() and r.labels["attack"] == "pgd"]
    kept = [r for r in kept if defense in (None, r.labels["defense"])]
    if not kept:
        raise BadInput(f"no finished PGD of {defense or 'any defence'} whose x' are still there; run `rush-bench attack` first")
    attacked = min(kept, key=lambda r: (not r.labels["deterministic"], r.labels["defense"], r.labels["eps"]))
    same = ("weights", "defense", "images", "seed", "repeats", "chunk")
    clean = next(
        (r for r in results if r.labels["attack"] == "clean" and all(r.identity[k] == attacked.identity[k] for k in same)), None
    )
    stored = CellStore(attacked.folder.parent.parent).read_adversarial(Cell(attacked.identity, attacked.labels), 0)
    labels = attacked.labels
    images = load_dataset(labels["dataset"], "test", labels["n"], data_dir=data_dir, size=stored.shape[2:])
    if clean is None or images.digest != attacked.identity["images"]:
        raise BadInput(f"the clean images of {labels['defense']} are not here any more; run `rush-bench attack` again")
    said, said_then = (r.frame.filter(regex="^count_").to_numpy().argmax(1) for r in (clean, attacked))
    turned = said[: len(stored)] != said_then[: len(stored)]
    rows = [*turned.nonzero()[0], *(~turned).nonzero()[0]][:SHOWN]
    name = labels.get("recipe") or labels["defense"]
    titles = [(f"{name}: {images.classes[said[i]]}", f"{name}: {images.classes[said_then[i]]}") for i in rows]
    return figures.image_pairs(images.floats(rows), stored[rows], titles, path, labels["eps"])
