"""`rush_bench.figure`."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from rush_bench.api.table import load_results
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.settle import FOLDER as SETTLED
from rush_bench.certificates.check import FOLDER as CERTIFICATES
from rush_bench.datasets import Images, load_dataset
from rush_bench.errors import BadInput, unknown_name
from rush_bench.packs import opened
from rush_bench.places import data_folder
from rush_bench.records import Cell, CellResult, CellStore
from rush_bench.registry import datasets
from rush_bench.report import figures, settle_figures
from rush_bench.report import settle as settled
from rush_bench.report.cards import cards_of
from rush_bench.report.cost_figure import accuracy_against_cost
from rush_bench.report.from_records import evidence_of
from rush_bench.report.rows import rows

SHOWN = 6  # images in a picture
FORMATS = ("png", "pdf", "svg")
KINDS = {  # and what they are drawn from
    "eps": "attacks at several eps",
    "draws": "T1, T3 or T13",
    "waterfall": "T15",
    "attacks": "T0 to T16",
    "images": "PGD",
    "cost": "worst cases of models whose cards say what training cost",
}


class Pictures(list[Path]):
    """The paths of figures; a notebook shows them."""

    def _repr_html_(self) -> str:
        kinds = {".png": "image/png", ".svg": "image/svg+xml"}
        shown = [path for path in self if path.suffix in kinds]
        return "\n".join(
            f'<img alt="{html.escape(path.stem)}" style="max-width: 100%" '
            f'src="data:{kinds[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}">'
            for path in shown
        )


def figure(
    kind: str = "eps",
    results: Path | str = "results",
    *,
    out: Path | str | None = None,
    format: str = "png",
    defense: str | None = None,
    store: Path | str = "models",
    data_dir: Path | str | None = None,
) -> Pictures:
    """Draw what was measured, from the records alone.

    Args:
        kind: `eps`, accuracy against the size of the perturbation; `draws`, what more draws, steps and votes change;
            `waterfall`, the published evaluation corrected step by step; `attacks`, every attack of an audit beside the worst
            case; `images`, clean and attacked by PGD; `cost`, the worst case against what training cost.
        results: results folder, or a pack of one.
        out: folder of the figures. None: the results folder, `settle/` in it for `draws`, `waterfall` and `attacks`.
        format: png, pdf or svg.
        defense: draw this one alone; of `images`, whose predictions to show (None: a deterministic one).
        store: folder of the models, whose cards say what training cost, for `cost`.
        data_dir: folder of the data sets, for `images`; of your own, the folder that holds `NAME.npz` or the folder `NAME`.

    Returns:
        The paths of what was drawn.

    Raises:
        BadInput: nothing finished to draw, a wrong kind, format or name.

    Examples:
        >>> import rush_bench as rb
        >>> [path.name for path in rb.figure("eps", measured, format="svg")]
        ['robust_accuracy.svg']
    """
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    if format not in FORMATS:
        raise unknown_name("format of figures", format, FORMATS)
    read = opened(Path(results))
    results, beside = read.folder, read.beside
    if kind in ("eps", "cost", "images"):
        everything = load_results(results)
        _check_defense(defense, (cell.labels["defense"] for cell in everything), beside)
        cells = [cell for cell in everything if defense in (None, cell.labels["defense"])]
    if kind == "images":
        return Pictures([_images(cells, data_dir, Path(out or beside) / f"images.{format}")])
    if kind == "eps":
        return Pictures([figures.accuracy_against_eps(cells, Path(out or beside) / f"robust_accuracy.{format}")])
    if kind == "cost":
        cards, _ = cards_of(cells, [Path(store), read.cards])
        path = accuracy_against_cost(rows(cells), cards, Path(out or beside) / f"cost.{format}")
        if path is None:
            raise BadInput(
                f"no worst case in {beside} is of a model whose card in {store} says what its training cost; name --store"
            )
        return Pictures([path])
    audited = _found(results / SETTLED)
    _check_defense(defense, (evidence.subject for evidence in audited), beside / SETTLED)
    found = [evidence for evidence in audited if defense in (None, evidence.subject)]
    folder = Path(out or beside / SETTLED)
    if kind == "draws":
        paths = [settle_figures.sweep(many, folder / f"{name}-sweep.{format}") for name, many in settle_figures.grouped(found)]
    else:
        draw = settle_figures.waterfall if kind == "waterfall" else settle_figures.attacks
        names = [f"{stem}-{kind}.{format}" for stem in settled.stems(found)]
        paths = [draw(evidence, folder / name) for evidence, name in zip(found, names, strict=True)]
    if not any(paths):
        where = results / SETTLED
        raise BadInput(f"no finished experiments ({KINDS[kind]}) in {where} to draw; run `rush-bench settle` with this --out")
    return Pictures(path for path in paths if path is not None)


def _found(folder: Path) -> list[Evidence]:
    return evidence_of(load_results(folder), load_results(folder / CERTIFICATES))


def _check_defense(defense: str | None, known: Iterable[str], where: Path) -> None:
    """BadInput for a defence that is not among those measured; where none is, that is what is wrong, and said elsewhere."""
    names = set(known)
    if defense is not None and names and defense not in names:
        raise unknown_name(f"defence in {where}", defense, names)


def _images(found: list[CellResult], data_dir: Path | str | None, path: Path) -> Path:
    """Images of the first chunk, clean and attacked at the smallest eps that PGD was run at: first those that it turned."""
    kept = [r for r in found if r.complete and (r.folder / "adversarial-0000.npy").exists() and r.labels["attack"] == "pgd"]
    if not kept:
        raise BadInput("no finished PGD whose x' are still there; run `rush-bench attack` first")
    attacked = min(kept, key=lambda r: (not r.labels["deterministic"], r.labels["defense"], r.labels["eps"]))
    clean = _clean_of(attacked, found)
    stored = CellStore(attacked.folder.parent.parent).read_adversarial(Cell(attacked.identity, attacked.labels), 0)
    labels = attacked.labels
    images = _attacked_images(attacked, stored.shape[2:], data_dir)
    if clean is None:
        raise BadInput(f"the clean accuracy of {labels['defense']} is not among its records; run `rush-bench attack` again")
    predicted_clean, predicted_attacked = (r.frame.filter(regex="^count_").to_numpy().argmax(1) for r in (clean, attacked))
    turned = predicted_clean[: len(stored)] != predicted_attacked[: len(stored)]
    positions = [*turned.nonzero()[0], *(~turned).nonzero()[0]][:SHOWN]
    name = labels.get("recipe") or labels["defense"]
    titles = [
        (f"{name}: {images.classes[predicted_clean[i]]}", f"{name}: {images.classes[predicted_attacked[i]]}") for i in positions
    ]
    return figures.image_pairs(images.floats(positions), stored[positions], titles, path, labels["eps"])


def _attacked_images(attacked: CellResult, size: tuple[int, ...], data_dir: Path | str | None) -> Images:
    """The very images that were attacked, by their digest; of the user's own, from the file or folder of their name."""
    labels, folder = attacked.labels, data_folder(data_dir)
    name, n = str(labels["dataset"]), labels["n"]
    source = name
    if name not in datasets.entries:
        given = next((path for path in (folder / f"{name}.npz", folder / name) if path.exists()), None)
        if given is None:
            raise BadInput(
                f"{name} is a data set of your own, and {folder} has no {name}.npz and no folder {name}; name the folder "
                "that has, with --data-dir"
            )
        source = str(given)
    for count in (n, None):  # a subset, or all in their own order
        images = load_dataset(source, labels.get("split", "test"), count, data_dir=data_dir, size=size)
        if images.digest == attacked.identity["images"]:
            return images
    raise BadInput(
        f"{source} is not the {n} images that {labels['defense']} was attacked on; name the folder that has those with "
        "--data-dir, or run `rush-bench attack` again"
    )


def _clean_of(attacked: CellResult, found: list[CellResult]) -> CellResult | None:
    """The clean cell beside an attack's."""
    same = ("weights", "defense", "images", "seed", "repeats", "chunk")
    clean = (cell for cell in found if cell.labels["attack"] == "clean")
    return next((cell for cell in clean if all(cell.identity[key] == attacked.identity[key] for key in same)), None)
