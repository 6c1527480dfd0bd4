"""`rush-bench demo`: the main job in small. Train SimCLR and RUSH on scikit-learn's digits, attack both, show what came out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rush_bench.cli import common

if TYPE_CHECKING:
    from rush_bench.datasets import Images
    from rush_bench.evaluation.records import CellResult

RECIPES = ("simclr", "rush")
SUITES = ("linf8-quick", "linf25.5-quick")  # 25.5/255 = 0.1: where the noise no longer helps
COLUMNS = ("clean", "pgd", "eot", "square")  # without APGD, which takes long and finds the same here
IMAGES = 200
SHOWN = 6  # images in the picture


@click.command()
@common.folder_option("--out", "results/demo", "Folder for models, runs, table and pictures.")
@common.seed
@common.max_minutes
def command(out: Path, seed: int, max_minutes: float | None) -> None:
    """Train SimCLR and RUSH on the built-in digits, attack both at l-inf 8/255 and 0.1, print the table.

    Leaves table.csv, table.md, robust_accuracy.png and images.png. The same command again resumes.
    """
    from rush_bench.attacks.suites import parse_suite
    from rush_bench.datasets import load_dataset
    from rush_bench.defenses import load_defenses
    from rush_bench.errors import RushBenchError, WorkLeft
    from rush_bench.evaluation.runner import attack
    from rush_bench.report import figures, tables
    from rush_bench.training import train

    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def left() -> float | None:
        return None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)

    with common.quiet_stdout():
        for recipe in RECIPES:
            train(recipe, dataset="digits", preset="demo", store=out / "models", seed=seed, device="cpu", max_minutes=left())
        images = load_dataset("digits", "test", IMAGES)
        defenses = load_defenses(["all"], store=out / "models", dataset="digits")
        results: list[CellResult] = []
        for suite in SUITES:
            run = attack(defenses, parse_suite(suite, COLUMNS), images, out=out, seed=seed, max_minutes=left())
            results += run.results
            if run.failed:
                raise RushBenchError("; ".join(f"{cell}: {reason}" for cell, reason in run.failed.items()))
            if not run.complete:
                raise WorkLeft("stopped with work left; the same command continues")
        frame = tables.table(results, "plain")
        tables.to_csv(frame, out / "table.csv")
        tables.to_markdown(frame, out / "table.md")
        figures.accuracy_against_eps(results, out / "robust_accuracy.png")
        picture(images, results, out / "images.png")
    common.print_rich(tables.to_rich(frame))
    click.echo(f"{out}: table.csv, table.md, robust_accuracy.png, images.png, models/, runs/", err=True)


def picture(images: "Images", results: "list[CellResult]", path: Path) -> None:
    """Digits as they are and as attacked, with what SimCLR says of each: first those that the attack turned."""
    from rush_bench.evaluation.records import Cell, CellStore
    from rush_bench.report import figures

    cells = {
        r.labels["attack"]: r for r in results if r.labels["recipe"] == "simclr" and r.labels["suite"].startswith(SUITES[0])
    }
    attacked = cells["pgd"]
    cell = Cell(attacked.identity, attacked.labels)
    stored = CellStore(attacked.folder.parent.parent).read_adversarial(cell, 0)
    said, said_then = (cells[name].frame.filter(regex="^count_").to_numpy().argmax(1) for name in ("clean", "pgd"))
    count = len(stored)  # the first chunk's images
    turned = said[:count] != said_then[:count]
    rows = [*turned.nonzero()[0], *(~turned).nonzero()[0]][:SHOWN]
    titles = [(f"SimCLR: {images.classes[said[i]]}", f"SimCLR: {images.classes[said_then[i]]}") for i in rows]
    figures.image_pairs(images.floats(rows), stored[rows], titles, path, attacked.labels["eps"])
