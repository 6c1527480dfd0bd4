"""One self-contained HTML file of all that a results folder holds: tables, figures, images, verdicts, and where each is from.

Everything is computed from records as the other tables are; the template lays out values and computes nothing. The file
asks for nothing: style, script, figures (SVG) and images (PNG) are in it.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rush_bench.audits.evidence import Evidence
from rush_bench.audits.run import FOLDER as AUDITS
from rush_bench.audits.run import Audit
from rush_bench.audits.settle import FOLDER as SETTLE
from rush_bench.certificates import check
from rush_bench.certificates.tsv import frame_of
from rush_bench.errors import BadInput
from rush_bench.evaluation import corruptions as corrupting
from rush_bench.files import digest, write_text
from rush_bench.packs import opened, pack_hint
from rush_bench.records import CellResult, load_results, save_indexes
from rush_bench.records.published import BLOCKS
from rush_bench.report import audits, certificates, corruptions, figures, settle, settle_figures, tables
from rush_bench.report.cards import Card, cards_of
from rush_bench.report.cost_figure import accuracy_against_cost
from rush_bench.report.from_records import evidence_of
from rush_bench.report.page import audited, gallery, grids, models
from rush_bench.report.page.svg import inline
from rush_bench.report.rows import Row, rows
from rush_bench.version import __version__

HERE = Path(__file__).parent
GALLERIES = 24  # of 8 images: two megabytes at 32 x 32 pixels
PARTS = {
    "measured": "Measured",
    "published": "Beside the published",
    "figures": "Figures",
    "galleries": "Images",
    "certificates": "Certificates",
    "corruptions": "Corruptions",
    "claims": "Claims",
    "models": "Models",
}
CLAIM = ("word", "sentence", "stale", "findings", "trials")  # of a part of `claims`; None where it has none
POINTS = 25  # radii of a certificate's curve that say their value


def write_page(
    results: Path,
    out: Path | None = None,
    *,
    store: Path | None = None,
    title: str | None = None,
    reference: str | None = None,
    data_dir: Path | None = None,
) -> Path:
    """Write the page of a results folder, or of a pack, to `out` (`report.html` in its folder) and return its path.

    `store` has the cards of the models; `reference` is the defence that mCE is relative to; `data_dir` the data sets of the
    galleries. What is half done is said to be so: the same call again shows what has come since.
    Errors: BadInput where the folder holds no record of ours, or a damaged one.
    """
    read, left_out = opened(Path(results)), list[str]()
    called, results = Path(results).resolve().name.removesuffix(".zip"), read.folder

    def warn(text: str) -> None:
        left_out.append(text.replace(f"{results}/", ""))
        print(text, file=sys.stderr)

    kinds = {name: load_results(results / name, warn=warn) for name in ("", SETTLE, corrupting.FOLDER)}
    certified = [certificate for part in ("", SETTLE) for certificate in load_results(results / part / check.FOLDER, warn=warn)]
    found = [*(result for part in kinds.values() for result in part), *certified]
    verdicts = audited.read(results / AUDITS, warn)
    if not found and not verdicts:
        raise BadInput(
            f"no record under {results}"
            + (pack_hint(results) or "; run `rush-bench attack` first, or name the folder that was its --out (it holds runs/)")
        )
    page = _Page(grids.Records(found, results))
    measured = rows(kinds[""])
    save_indexes(found)
    cards, changed = cards_of(found, [*([store] if store else []), read.cards])
    page.tables(measured)
    page.overview(measured, cards)
    page.images(measured, data_dir)
    page.certificates(certified)
    page.corruptions(kinds[corrupting.FOLDER], reference)
    page.claims(kinds[SETTLE], certified, verdicts)
    page.models(cards, changed)
    attacks = {result.folder: result for result in [*kinds[""], *kinds[SETTLE]]}.values()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        title=title or f"rush-bench: {called}",
        version=__version__,
        clashes=[str(certificate) for certificate in check.contradictions(certified, attacks)],
        left_out=left_out,
        count=len(page.records.anchors),
        unfinished=sum(not result.complete for result in {result.folder: result for result in found}.values()),
        records=page.records.entries(),
        page=page.parts,
        titles=PARTS,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )
    path = Path(out) if out is not None else read.beside / "report.html"
    write_text(path, text)
    return path


class _Page:
    """Gathers the parts, each absent where there is nothing to show."""

    def __init__(self, records: grids.Records) -> None:
        self.records = records
        self.parts: dict[str, Any] = dict.fromkeys(PARTS)
        self.figures = 0

    def figure(self, draw: Callable[[Path], Path | None]) -> Markup | None:
        """An SVG whose ids no other figure has."""
        self.figures += 1
        return inline(draw, f"f{self.figures}")

    def add(self, name: str, part: Any) -> None:
        """A part, unless it is empty."""
        if part:
            self.parts[name] = part

    def tables(self, measured: Sequence[Row]) -> None:
        """All that was measured, and Table 1 where something of its data sets was."""
        if measured:
            self.add("measured", grids.measured("measured", tables.plain(measured), measured, self.records))
        lines = tables.paper_lines(measured)
        if any(row is not None and tables.block_of(row.labels) in BLOCKS for _, row in lines):
            grid = grids.measured("published", tables.paper(lines), [row for _, row in lines], self.records)
            self.add("published", grid)

    def overview(self, measured: Sequence[Row], cards: dict[str, Card]) -> None:
        """Figures of the table: every defence side by side, accuracy against eps, cost against the worst case."""
        sheets: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        radii: dict[tuple[str, ...], set[float]] = defaultdict(set)
        attacked: list[Row] = []
        for row in measured:
            if row.threat and row.estimates.keys() & figures.PANELS.keys():
                attacked.append(row)
                sheets[row.labels["dataset"], row.threat_text, row.labels["suite"], f"n={row.labels['n']}"].append(row)
                radii[row.labels["dataset"], row.threat["norm"], row.labels["defense"]].add(row.threat["eps"])
        charts = [
            (", ".join(title), self.figure(partial(figures.accuracy_by_defence, sheet))) for title, sheet in sheets.items()
        ]
        lines = [r for r in attacked if r.threat and len(radii[r.labels["dataset"], r.threat["norm"], r.labels["defense"]]) > 1]
        if lines:
            charts.append(("Accuracy against eps", self.figure(partial(figures.against_eps, lines))))
        cost = self.figure(partial(accuracy_against_cost, measured, cards))
        charts += [("Training cost against worst-case accuracy", cost)] if cost else []
        self.add("figures", charts)

    def images(self, measured: Sequence[Row], data_dir: Path | None) -> None:
        """Galleries, and how many rows have no x' on disk."""
        shown, missing = gallery.galleries(measured, data_dir, GALLERIES)
        if shown or missing:
            anchors = [self.records.anchor(entry.result) for entry in shown]
            self.add("galleries", {"made": list(zip(shown, anchors, strict=True)), "missing": missing, "most": GALLERIES})

    def certificates(self, certified: Sequence[CellResult]) -> None:
        """A curve and a table a norm."""
        by: dict[str, dict[str, CellResult]] = defaultdict(dict)
        for result in certified:
            if result.complete:
                by[str(result.labels["norm"])][certificates.name_of(result)] = result
        parts = []
        for norm, whole in by.items():
            sets = {name: frame_of(result) for name, result in whole.items()}
            grid = grids.certified(f"certified-{norm}", whole, sets, self.records)
            parts.append((norm, self.figure(partial(_curve, sets, norm)), grid))
        self.add("certificates", parts)

    def corruptions(self, results: Sequence[CellResult], reference: str | None) -> None:
        """A table per data set and set of corruptions."""
        parts = []
        for k, part in enumerate(_of_same_images(results)):
            known = reference if reference in {result.labels["defense"] for result in part} else None
            parts.append(grids.corrupted(f"corrupted-{k}", corruptions.table(part, known)))
        if reference is not None and not any(result.labels["defense"] == reference for result in results):
            raise BadInput(f"the reference {reference!r} was not measured under corruptions; name a defence of that table")
        self.add("corruptions", parts)

    def claims(self, results: Sequence[CellResult], certified: Sequence[CellResult], verdicts: Sequence[Audit]) -> None:
        """A part per defence under audit: verdict, checks, experiments, figures; then the figures that they share."""
        found = evidence_of(results, certified)
        shown = {entry.result.folder for evidence in found for entry in evidence.entries}
        older = len({result.folder for result in results if "experiment" in result.labels} - shown)
        evidence_by = {audited.key(evidence): evidence for evidence in found}
        audits_by = {audited.key(audit.evidence): audit for audit in verdicts}
        parts = []
        for k, name in enumerate(sorted(evidence_by.keys() | audits_by.keys(), key=str)):
            evidence, audit = evidence_by.get(name), audits_by.get(name)
            part: dict[str, Any] = {**dict.fromkeys(CLAIM), "figures": []}
            if audit:
                part["title"] = settle.title(audit.evidence)
                part |= {"sentence": audits.sentence(audit), "word": audit.verdict.word if audit.verdict else "no verdict"}
                part |= {"stale": audited.stale(audit, evidence), "findings": grids.findings(f"findings-{k}", audit)}
            if evidence:
                part["title"] = settle.title(evidence)
                part["trials"] = grids.trials(f"trials-{k}", evidence, self.records)
                drawn = (
                    ("The published evaluation, corrected step by step", settle_figures.waterfall),
                    ("Every attack beside the worst case", settle_figures.attacks),
                )
                charts = [(words, self.figure(partial(draw, evidence))) for words, draw in drawn]
                part["figures"] = [(words, svg) for words, svg in charts if svg]
            parts.append(part)
        shared: list[tuple[str, Markup | None]] = []
        groups: dict[str, list[Evidence]] = defaultdict(list)
        for evidence in found:
            groups[settle.group(evidence)].append(evidence)
        for together in groups.values():
            shared.append(("What more effort changes", self.figure(partial(settle_figures.sweep, together))))
            shared.append(("The way down to chance", self.figure(partial(settle_figures.eps, together))))
        if parts:
            drawn_together = [(words, svg) for words, svg in shared if svg]
            self.add("claims", {"parts": parts, "shared": drawn_together, "older": older})

    def models(self, cards: dict[str, Card], changed: list[str]) -> None:
        """Cards with their learning curves."""
        sections = []
        for name, card in cards.items():
            curve = self.figure(partial(models.learning_curve, card))
            about = {key: card[key] for key in models.ABOUT if card.get(key) is not None}
            sections.append({"name": name, "about": about, "curve": curve, "text": models.text(card)})
        if sections or changed:
            self.add("models", {"made": sections, "changed": changed})


def _curve(sets: dict[str, pd.DataFrame], norm: str, path: Path) -> Path:
    """The curve with values to point at, evenly spaced up to the largest radius of each set."""
    figure = certificates.curve(sets, norm)
    for name, frame in sets.items():
        radii = np.linspace(0, float(frame["radius"].max()), POINTS)
        found = 100 * certificates.certified_accuracy(frame, radii)
        words = figures.tips(f"{name}: {value:.6g} % at radius {r:.4g}" for r, value in zip(radii, found, strict=True))
        figure.axes[0].plot(radii, found, linestyle="", marker=".", markersize=1, alpha=0, gid=words)
    return figures.save(figure, path)


def _of_same_images(results: Iterable[CellResult]) -> list[list[CellResult]]:
    """Corruption cells of the same images, which may share a table; defences with the same name are distinguished."""
    by: dict[str, dict[str, list[CellResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        same = {key: result.identity[key] for key in ("weights", "defense", "seed", "repeats")}
        by[digest([result.labels["defense"], result.labels["dataset"], result.labels["n"]])][digest(same)].append(result)
    found: dict[str, list[CellResult]] = defaultdict(list)
    for variants in by.values():
        for cells in variants.values():
            name, identity = cells[0].labels["defense"], cells[0].identity
            if len(variants) > 1:
                name += f" ({identity['weights'][:6]}, K={identity['repeats']}, seed {identity['seed']})"
            images = sorted([cell.labels["corruption"], cell.labels["severity"], cell.identity["images"]] for cell in cells)
            found[digest(images)] += [replace(cell, labels={**cell.labels, "defense": name}) for cell in cells]
    return list(found.values())
