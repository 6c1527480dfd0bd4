"""Figures as PNG, SVG or PDF: accuracy against eps, clean beside attacked images. matplotlib's objects, no global state."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from rush_bench.errors import BadInput
from rush_bench.files import digest, write_atomic
from rush_bench.records import CellResult, save_indexes
from rush_bench.records.statistics import Estimate
from rush_bench.report import columns
from rush_bench.report.caveats import unusual_settings
from rush_bench.report.layout import BOUND, folded
from rush_bench.report.rows import Row, rows

DPI = 150
# Okabe and Ito's colours, which colour-blind readers can distinguish; markers repeat the information.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*"
TIPS = "\u241e"  # stands before each text of an artist's gid: shown to a reader who points at the marker
METADATA = {".png": ("Software",), ".svg": ("Date", "Creator"), ".pdf": ("CreationDate", "Creator", "Producer")}  # left out
PANELS = {column.name: column.panel for column in columns.COLUMNS if column.panel}
UPPER = f"{BOUND} upper bound: see the table"  # of a hollow marker
LETTER = 0.075  # inches of one in a legend, about
COLUMNS = {"clean": "clean", **PANELS, "square": columns.header_of("square")}


def accuracy_against_eps(results: Iterable[CellResult], path: Path) -> Path:
    """Accuracy against eps: a panel per attack (and a row of panels per data set and norm), a line per defence, 95 % bars.

    Lines start at eps 0, the clean accuracy. Finished cells only; lines never join different images, n, K, seed, settings,
    quick and full suites, or suites that leave out attacks and such that do not. A hollow marker is an upper bound
    (`Row.bounds`). BadInput where nothing was attacked. Returns the path of the PNG.
    """
    results = list(results)
    measured = rows(results)
    save_indexes(results)
    found = [row for row in measured if row.threat and set(row.estimates) & set(PANELS)]
    if not found:
        raise BadInput("there is no finished attack to draw; run `rush-bench attack` first")
    return against_eps(found, path)


def against_eps(found: Sequence[Row], path: Path) -> Path:
    """The same of rows, each of which has a threat and an attack of PANELS."""
    sheets: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in found:
        assert row.threat is not None
        sheets[row.labels["dataset"], row.threat["norm"]].append(row)
    attacks = [name for name in PANELS if any(name in row.estimates for row in found)]
    names = line_names(found)
    width = 3.3 * len(attacks) + 0.6
    marked = any(name in row.bounds for row in found for name in attacks)
    entries = [*dict.fromkeys(names.values()), *([UPPER] if marked else [])]
    ncols = max(1, min(4, len(entries), int(width / (LETTER * max(map(len, entries)) + 0.5))))
    legend = {name: folded(name, int((width - 0.5) / LETTER)) for name in entries}
    lines = -(-len(entries) // ncols) * max(text.count("\n") + 1 for text in legend.values()) - 1  # beyond the first
    figure = Figure(figsize=(width, 3.1 * len(sheets) + 0.9 + 0.2 * lines), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(sheets), len(attacks), sharey=True, sharex="row", squeeze=False)
    styles = {name: k for k, name in enumerate(dict.fromkeys(names.values()))}
    for (key, sheet), panels in zip(sheets.items(), axes, strict=True):
        for attack, panel in zip(attacks, panels, strict=True):
            _panel(panel, sheet, attack, names, styles)
            panel.set_title(PANELS[attack], fontsize=10)
            panel.set_xlabel(eps_label(key[1]), fontsize=9)
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=key[1] == "linf"))
        panels[0].set_ylabel(f"{_about(key, sheet)}\naccuracy (%)", fontsize=9)
    handles: dict[Any, Any] = {line.get_label(): line for panel in axes.flat for line in panel.containers}
    handles |= {UPPER: hollow()} if marked else {}
    texts = [legend[name] for name in handles]
    figure.legend(handles.values(), texts, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    return save(figure, path)


def accuracy_by_defence(sheet: Sequence[Row], path: Path) -> Path:
    """A line per row, the least broken on top: clean accuracy and each attack's as a marker with its 95 % bar.

    A hollow marker is an upper bound (`Row.bounds`). The rows must share data set, threat and suite: they stand on one axis.
    """
    order = sorted(sheet, key=lambda row: min(row.estimates[name].value for name in COLUMNS if name in row.estimates))
    shown = [name for name in COLUMNS if any(name in row.estimates for row in order)]
    names = line_names(order)
    marked = any(name in row.bounds for row in order for name in shown)
    ticks = [folded(names[id(row)], 36) for row in order]
    high = max([0.3, *(0.06 + 0.13 * (text.count("\n") + 1) for text in ticks)])  # inches of a line
    figure = Figure(figsize=(5.2, high * len(order) + (1.5 if marked else 1.3)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(shown):
        present = [(at, row) for at, row in enumerate(order) if name in row.estimates]
        found = [row.estimates[name] for _, row in present]
        bars = axes.errorbar(
            [100 * estimate.value for estimate in found],
            [at + 0.1 * ((len(shown) - 1) / 2 - k) for at, _ in present],
            xerr=[
                [100 * max(estimate.value - estimate.low, 0) for estimate in found],
                [100 * max(estimate.high - estimate.value, 0) for estimate in found],
            ],
            label=COLUMNS[name],
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            markersize=4.5,
            linestyle="",
            elinewidth=0.8,
        )
        bounds = [name in row.bounds for _, row in present]
        words = [percent(f"{names[id(row)]}, {COLUMNS[name]}", row.estimates[name], name in row.bounds) for _, row in present]
        mark(axes, bars, words, bounds)
    axes.set_yticks(range(len(order)), ticks, fontsize=8)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("accuracy (%)", fontsize=9)
    handles = [*axes.get_legend_handles_labels()[0], *([hollow()] if marked else [])]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save(figure, path)


def image_pairs(clean: ArrayLike, attacked: ArrayLike, titles: Sequence[tuple[str, str]], path: Path, eps: float) -> Path:
    """A column per image: clean, attacked, and their difference amplified so that +-eps fills the range from black to white.

    Images (B, C, H, W) in [0, 1] with C 1 or 3 (arrays or CPU tensors); `titles` holds for each image what stands over the
    clean and over the attacked one (the predicted labels). Returns the path of the PNG.
    """
    first, second = np.asarray(clean, float), np.asarray(attacked, float)
    if first.ndim != 4 or first.shape != second.shape or first.shape[1] not in (1, 3) or len(titles) != len(first):
        raise BadInput(
            f"image_pairs takes two batches (B, C, H, W) of one shape, C 1 or 3, and B titles; got {first.shape}, "
            f"{second.shape} and {len(titles)} titles"
        )
    if not len(first) or eps <= 0:
        raise BadInput(f"image_pairs needs at least one image and eps > 0, not {len(first)} and {eps}")
    figure = Figure(figsize=(1.25 * len(first) + 0.9, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(3, len(first), squeeze=False)
    difference = np.clip(0.5 + (second - first) / (2 * eps), 0, 1)
    side = ("clean", "attacked", f"difference\n× {0.5 / eps:.3g}")
    for k, (over, under) in enumerate(titles):
        for panel, image, title in zip(axes[:, k], (first[k], second[k], difference[k]), (over, under, ""), strict=True):
            panel.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, fontsize=8, color="#B00020" if title == under != over else "black")
    for panel, text in zip(axes[:, 0], side, strict=True):
        panel.set_ylabel(text, fontsize=9)
    return save(figure, path)


def _panel(panel: Axes, sheet: list[Row], attack: str, names: dict[int, str], styles: dict[str, int]) -> None:
    lines: dict[str, list[tuple[float, Estimate, bool]]] = defaultdict(list)
    chances = set()
    for row in sheet:
        if attack not in row.estimates:
            continue
        assert row.threat is not None
        scale = 255 if row.threat["norm"] == "linf" else 1
        points = lines[names[id(row)]]
        points.append((scale * row.threat["eps"], row.estimates[attack], attack in row.bounds))
        if "clean" in row.estimates and all(eps > 0 for eps, _, _ in points):  # that of each row of the line
            points.append((0.0, row.estimates["clean"], False))
        if row.labels.get("classes"):
            chances.add(1 / row.labels["classes"])
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        at = np.array([eps for eps, _, _ in points])
        value, low, high = 100 * np.array([list(found) for _, found, _ in points]).T
        k = styles[name]
        bars = panel.errorbar(
            at,
            value,
            yerr=np.maximum([value - low, high - value], 0),
            label=name,
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            linestyle=("-", "--", ":")[k // len(COLOURS) % 3],
            markersize=4,
            linewidth=1.4,
            capsize=2.5,
            elinewidth=0.9,
        )
        words = [percent(f"{name} at {eps:.4g}", found, bound) for eps, found, bound in points]
        mark(panel, bars, words, [bound for _, _, bound in points])
    for chance in chances:
        chance_line(panel, chance)
    accuracy_axis(panel)


def eps_label(norm: str) -> str:
    """What stands below an axis of eps: l-inf radii are shown in 255ths, the steps of 8-bit pixels."""
    return "perturbation eps (255ths, l-inf)" if norm == "linf" else f"perturbation eps ({norm})"


def chance_line(panel: Axes, chance: float) -> None:
    """A dotted line at the accuracy of a guess, a fraction; its name stands beside the panel, clear of the data."""
    panel.axhline(100 * chance, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    panel.annotate(
        "chance",
        (1.01, 100 * chance),
        xycoords=("axes fraction", "data"),
        ha="left",
        va="center",
        fontsize=7,
        color="#777777",
        annotation_clip=False,
    )


def accuracy_axis(panel: Axes, top: float = 100) -> None:
    """The look of a panel whose vertical axis is an accuracy in percent, up to `top`."""
    panel.set_ylim(-2, top + 2)
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def line_names(found: Sequence[Row]) -> dict[int, str]:
    """By the `id` of each row what its line is called: the defence, and what sets it apart from another line of the same.

    A line has one row a threat. One of the usual attacks and settings has no word for them.
    """
    told: dict[int, tuple[str, ...]] = {id(row): () for row in found}

    def tell_apart(word: Callable[[Row], str], group: Callable[[Row], Hashable]) -> None:
        """Add the word of each row whose group has several."""
        groups = {id(row): group(row) for row in found}
        words: dict[Hashable, set[str]] = defaultdict(set)
        for row in found:
            words[groups[id(row)]].add(word(row))
        for row in found:
            if len(words[groups[id(row)]]) > 1:
                told[id(row)] += (word(row),) if word(row) else ()

    def defense(row: Row) -> Hashable:
        return row.labels["dataset"], row.labels["defense"]

    def line(row: Row) -> Hashable:
        return defense(row), told[id(row)]

    for word in DIFFERENCES:
        tell_apart(word, defense)
    for word in LAST_DIFFERENCES:
        tell_apart(word, line)
    for word in (_added, lambda row: f"record {row.parts[-1].folder.name[:6]}"):
        tell_apart(word, lambda row: (line(row), str(row.threat)))
    return {id(row): row.labels["defense"] + _in_brackets(told[id(row)]) for row in found}


def _in_brackets(words: Sequence[str]) -> str:
    return f" ({('; ' if any(',' in word for word in words) else ', ').join(words)})" if words else ""


def _left_out(row: Row) -> str:
    """The attacks that the row's suite lacks (`Suite.shown`): its worst case is another one, and likely higher."""
    _, _, names = str(row.labels["suite"]).partition(" without ")
    return f"without {names.partition(' with ')[0]}" if names else ""


def _added(row: Row) -> str:
    """The attacks beyond the row's suite. They run at few eps and can only lower the worst case, so a line goes on."""
    _, _, names = str(row.labels["suite"]).partition(" with ")
    return f"with {names}" if names else ""


def other_settings(row: Row) -> str:
    """The settings of its finished attacks that are not those of their suite's columns, in the words of a table's notes."""
    cells = {cell.labels["attack"]: cell for cell in row.cells.values()}
    words = {name: cells[name].remembered(unusual_settings) for name in sorted(cells)}
    return ", ".join(f"{name} with {differing}" for name, differing in words.items() if differing)


DIFFERENCES: tuple[Callable[[Row], str], ...] = (
    lambda row: f"n={row.labels['n']}",
    lambda row: f"K={row.repeats}",
    lambda row: f"seed {row.seed}",
    lambda row: "quick" if row.quick else "full",
    lambda row: f"weights {row.weights[:6]}",
    lambda row: f"from {row.labels.get('pretrain_dataset')}",
    _left_out,
    other_settings,
)
# Said only of lines that would otherwise have one name: digests tell a reader little.
LAST_DIFFERENCES: tuple[Callable[[Row], str], ...] = (
    lambda row: f"images {row.parts[-1].identity['images'][:6]}",
    lambda row: f"defence {digest(row.parts[-1].identity['defense'])[:6]}",
    lambda row: f"chunks of {row.parts[-1].identity['chunk']}",
)


def _about(key: tuple[str, str], sheet: list[Row]) -> str:
    """Data set, norm, and n and quick where they hold for every line (where not, the lines' names say it)."""
    words = [key[0], {"linf": "l-inf"}.get(key[1], key[1])]
    if len({row.labels["n"] for row in sheet}) == 1:
        words.append(f"n={sheet[0].labels['n']}")
    return ", ".join(words) + (" (quick suite)" if all(row.quick for row in sheet) else "")


def tips(texts: Iterable[str]) -> str:
    """The `gid` of an artist that says these texts when a reader points at it: one a marker, or one in all."""
    return "".join(f"{TIPS}{text}" for text in texts)


def percent(name: str, found: Estimate, bound: bool = False) -> str:
    """What a reader who points at a number is shown: all that is known of it, and where so that it is an upper bound."""
    words = f"{name}: {100 * found.value:.6g} % [{100 * found.low:.6g}, {100 * found.high:.6g}]"
    return f"{words} {UPPER}" if bound else words


def mark(panel: Axes, bars: ErrorbarContainer, texts: Sequence[str], bounds: Sequence[bool]) -> None:
    """Give the markers of error bars their texts (`tips`), and make hollow those of upper bounds; both in the points' order."""
    line = bars.lines[0]
    said, hidden = ([text for text, bound in zip(texts, bounds, strict=True) if bound is which] for which in (False, True))
    if said:
        line.set_gid(tips(said))
    if hidden:
        line.set_markevery([k for k, bound in enumerate(bounds) if not bound])
        marker = hollow(line.get_color(), line.get_marker(), line.get_markersize())
        marker.set_data(*np.asarray(line.get_xydata())[np.array(bounds)].T)
        marker.set(gid=tips(hidden), label="_", zorder=line.get_zorder() + 0.1)
        panel.add_line(marker)


def hollow(colour: Any = "#777777", marker: Any = "o", size: float = 4.5) -> Line2D:
    """The marker of an upper bound; as it is, for a legend."""
    return Line2D([], [], linestyle="", marker=marker, markersize=size, color=colour, markerfacecolor="#ffffff", label=UPPER)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, SVG or PDF, by the path's suffix; the same bytes for the same figure (no software or date in it)."""
    path = Path(path)
    nothing = METADATA.get(path.suffix)
    if nothing is None:
        raise BadInput(f"{path}: a figure is written as {', '.join(METADATA)}")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rush-bench"}):  # letters stay letters
        write_atomic(path, lambda temporary: figure.savefig(temporary, metadata=dict.fromkeys(nothing)))
    return path
