"""Figures of `settle`, from records alone: the waterfall, all attacks beside the worst case, and what more effort changes."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from rush_bench.audits.evidence import Entry, Evidence
from rush_bench.audits.experiments import EXPERIMENTS
from rush_bench.records.statistics import Estimate
from rush_bench.report import figures
from rush_bench.report import settle as tables
from rush_bench.report.figures import COLOURS, DPI, MARKERS
from rush_bench.report.rows import threat_text

BLUE, RED, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#000000"
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # behind words that a line may cross
BESIDE = {"official": "D", "bank": "s", "unseen": "v"}  # markers of other counts of the same record
ATTACKS = ("T0", "T2", "T4", "T5", "T6", "T7", "T8", "T9", "T14", "T16")  # the rest have figures of their own


@dataclass(frozen=True)
class Line:
    """A line from elsewhere for the sweep: accuracy (with its interval) at each number of draws of a gradient."""

    name: str
    points: tuple[tuple[float, Estimate], ...]


def write_figures(of_each: Sequence[Evidence], folder: Path) -> list[Path]:
    """Every figure that the finished trials allow; returns the paths.

    `waterfall` and `attacks` of each defence; `sweep` and `eps` of all that share data set, threat and budget.
    """
    folder, paths = Path(folder), list[Path | None]()
    for evidence in of_each:
        paths.append(waterfall(evidence, folder / f"{tables.stem(evidence)}-waterfall.png"))
        paths.append(attacks(evidence, folder / f"{tables.stem(evidence)}-attacks.png"))
    for name, together in grouped(of_each):
        paths.append(sweep(together, folder / f"{name}-sweep.png"))
        paths.append(eps(together, folder / f"{name}-eps.png"))
    return [path for path in paths if path is not None]


def grouped(of_each: Sequence[Evidence]) -> list[tuple[str, list[Evidence]]]:
    """Those that may share a figure, by the name of its file."""
    return [(name, list(found)) for name, found in groupby(sorted(of_each, key=tables.group), key=tables.group)]


def waterfall(evidence: Evidence, path: Path) -> Path | None:
    """T15: from the replay of what was published to the worst case; None where fewer than three bars are finished.

    A correction is a bar from the accuracy before it to the one after, with the latter's 95 % interval; its difference, paired
    by image, stands below. Replays measure no robustness and have a colour of their own; they and the worst case stand on the
    ground. An unfinished bar keeps its place and is marked.
    """
    found = tables.bars(evidence)
    if sum(bar.entry.complete for bar in found) < 3:
        return None
    figure = Figure(figsize=(1.05 * len(found) + 1.0, 5.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    ticks = []
    for k, bar in enumerate(found):
        words = "\n".join(textwrap.wrap(bar.entry.trial, 15, break_long_words=False))
        ticks.append(words if bar.step is None else f"{words}\n{_step(bar.step)}")
        if not bar.entry.complete:
            axes.text(k, 2, "not\nfinished", ha="center", va="bottom", fontsize=8, color=GREY, bbox=CLEAR)
            continue
        value, last = bar.entry.estimate.value, k == len(found) - 1
        before = 0.0 if bar.step is None or last else found[k - 1].entry.estimate.value
        colour, label = _kind(bar, last)
        _bar(axes, k, bar.entry.trial, bar.entry.estimate, before, colour, label)
        if k + 1 < len(found) and found[k + 1].step is not None:
            axes.plot([k + 0.36, k + 0.64], [100 * value] * 2, color=GREY, linewidth=0.8, zorder=0)
        for (kind, marker), shift in zip(BESIDE.items(), (-0.25, -0.12, 0.12), strict=True):
            other = bar.entry.other(kind)
            if other is not None:
                text = f"same x', {tables.OTHER[kind]}"
                (mark,) = axes.plot(k + shift, 100 * other.value, marker, color="white", markersize=5, label=text)
                mark.set_markeredgecolor(BLACK)
                mark.set_gid(figures.tips([figures.percent(f"{bar.entry.trial}, {text}", other)]))
    _levels(axes, evidence)
    axes.set_xticks(range(len(found)), ticks)
    axes.set_xlim(-0.6, len(found) - 0.4)
    _accuracy(axes, [evidence])
    axes.set_axisbelow(True)
    axes.set_ylim(0, 108)
    axes.set_ylabel("accuracy (%)", fontsize=9)
    axes.set_title(tables.title(evidence), fontsize=10, loc="left")
    _legend(figure, [axes])
    return figures.save(figure, path)


def attacks(evidence: Evidence, path: Path) -> Path | None:
    """Every trial of ATTACKS as a dot with its 95 % interval, by experiment, beside the worst case; None without any.

    Trials on another form of the defence or on another model are hollow.
    """
    sections = [(name, evidence.of(name, complete=False)) for name in ATTACKS]
    sections = [(name, entries) for name, entries in sections if any(entry.complete for entry in entries)]
    if not sections:
        return None
    rows = sum(len(entries) + 1 for _, entries in sections)
    figure = Figure(figsize=(8.0, 0.19 * rows + 1.3), dpi=DPI, layout="constrained")
    axes, ticks, at = figure.subplots(), dict[float, str](), 0.0
    for section, (name, entries) in enumerate(sections):
        ticks[at] = f"{name} {EXPERIMENTS[name].title}"
        colour = COLOURS[section % 6]
        for place, entry in enumerate(entries, 1):
            ticks[at + place] = entry.trial if entry.complete else f"{entry.trial} (not finished)"
            if entry.complete:
                _dot(axes, at + place, entry, colour)
        if section % 2:
            axes.axhspan(at - 0.5, at + len(entries) + 0.5, color="#F4F4F4", zorder=-2)
        at += len(entries) + 1
    if evidence.worst is not None:
        found = evidence.worst.estimate
        axes.axvspan(100 * found.low, 100 * found.high, color="#FBE3D4", zorder=-1, linewidth=0)
        axes.axvline(100 * found.value, color=RED, linewidth=1.0, zorder=-1, label=f"worst case {tables.percent(found)}")
    if evidence.clean is not None:
        value = 100 * evidence.clean.estimate.value
        axes.axvline(value, color=GREEN, linewidth=1.2, zorder=-1, label=f"clean {value:.1f}")
    if any(entry.result.labels["on"] for _, entries in sections for entry in entries):
        axes.plot([], [], "o", color=BLACK, markerfacecolor="white", markersize=4, label="another form of it, or another model")
    axes.set_yticks(list(ticks), list(ticks.values()))
    for words, text in zip(ticks.values(), axes.get_yticklabels(), strict=True):
        heads = words.split(" ")[0] in EXPERIMENTS
        text.set(fontsize=8 if heads else 7.5, fontweight="bold" if heads else "normal")
    axes.set_ylim(at - 0.3, -0.7)
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("accuracy (%)", fontsize=9)
    figure.suptitle(tables.title(evidence), fontsize=10)
    _legend(figure, [axes])
    return figures.save(figure, path)


def sweep(of_each: Sequence[Evidence], path: Path, beside: Sequence[Line] = ()) -> Path | None:
    """What more effort changes, a line per defence: draws of a gradient (T1), steps (T3), votes of the defence (T13).

    A panel for each that has at least two finished points; None without any. Runs with restarts are hollow, at all their
    steps. `beside` joins the first panel.
    """
    panels: list[tuple[str, str, Callable[[Evidence], list[Point]]]] = [
        ("T1", "noise draws of a gradient, m", lambda found: [Point(_setting(e, "draws"), e.estimate) for e in found.of("T1")]),
        ("T3", "gradient steps, restarts included", _steps),
        ("T13", "votes of the defence, m", lambda found: [Point(_votes(e), e.estimate) for e in found.of("T13")]),
    ]
    lines = [{name: points(found) for name, found in zip(_names(of_each), of_each, strict=True)} for _, _, points in panels]
    lines[0] |= {line.name: [Point(*point) for point in line.points] for line in beside}
    shown = [k for k, found in enumerate(lines) if any(len(points) > 1 for points in found.values())]
    if not shown:
        return None
    figure = Figure(figsize=(3.5 * max(len(shown), 1.4) + 0.4, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    styles = {name: k for k, name in enumerate(dict.fromkeys(name for found in lines for name in found))}
    for panel, k in zip(axes, shown, strict=True):
        for name, points in lines[k].items():
            _line(figure, panel, name, points, styles[name])
        panel.set_xscale("log", base=2)
        ticks = sorted({point.at for points in lines[k].values() for point in points})
        room = max(1.1, (ticks[-1] / ticks[0]) ** 0.06)  # of the axis, on either side
        panel.set_xlim(ticks[0] / room, ticks[-1] * room)
        _ticks(panel, ticks, [f"{tick:g}" for tick in ticks])
        panel.set_title(f"{panels[k][0]} {EXPERIMENTS[panels[k][0]].title}", fontsize=10)
        panel.set_xlabel(panels[k][1], fontsize=9)
        _accuracy(panel, of_each)
    axes[0].set_ylabel("accuracy (%)", fontsize=9)
    figure.suptitle(_about(of_each), fontsize=10)
    _legend(figure, axes)
    return figures.save(figure, path)


def eps(of_each: Sequence[Evidence], path: Path) -> Path | None:
    """T10: accuracy against eps, a line per defence, with the accuracy of a guess; None without two finished points."""
    lines = {
        name: [Point(0.0 if e.result.labels["attack"] == "clean" else e.eps, e.estimate) for e in evidence.of("T10")]
        for name, evidence in zip(_names(of_each), of_each, strict=True)
    }
    ticks = sorted({point.at for points in lines.values() for point in points})
    if len(ticks) < 2:
        return None
    figure = Figure(figsize=(6.2, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for k, (name, points) in enumerate(lines.items()):
        _line(figure, axes, name, points, k)
    axes.set_xscale("symlog", base=2, linthresh=ticks[1], linscale=0.6)  # 0, then doublings
    axes.set_xlim(-0.2 * ticks[1], 1.3 * ticks[-1])
    norm = of_each[0].labels["norm"]
    if norm == "linf":  # whole 255ths, whatever was measured between them
        first, last = 255 * ticks[1], 255 * ticks[-1]
        levels = [k for k in (0, 1, 2, 4, 8, 16, 32, 64, 128, 255) if k == 0 or first - 1e-9 <= k <= last + 1e-9]
        _ticks(axes, [k / 255 for k in levels], [str(k) for k in levels])
    else:
        _ticks(axes, ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xlabel(figures.eps_label(norm), fontsize=9)
    axes.set_ylabel("accuracy (%)", fontsize=9)
    axes.axvline(of_each[0].labels["eps"], color=GREY, linewidth=0.8, zorder=0)
    _accuracy(axes, of_each)
    axes.set_title(_about(of_each), fontsize=10)
    _legend(figure, [axes])
    return figures.save(figure, path)


@dataclass(frozen=True)
class Point:
    """A point of a line; hollow ones stand apart from it."""

    at: float
    value: Estimate
    hollow: bool = False


def _steps(evidence: Evidence) -> list[Point]:
    found = []
    for entry in evidence.of("T3"):
        restarts = float(entry.result.identity["attack"].get("restarts", 1))
        found.append(Point(_setting(entry, "steps") * restarts, entry.estimate, hollow=restarts > 1))
    return found


def _setting(entry: Entry, name: str) -> float:
    return float(entry.result.identity["attack"][name])


def _votes(entry: Entry) -> float:
    return float(entry.result.labels["on"].partition("=")[2])


def _names(of_each: Sequence[Evidence]) -> list[str]:
    """The defences, with n where they were attacked on different numbers of images."""
    apart = len({evidence.labels.get("n") for evidence in of_each}) > 1
    return [f"{evidence.subject}, n={evidence.labels.get('n')}" if apart else evidence.subject for evidence in of_each]


def _about(of_each: Sequence[Evidence]) -> str:
    """Data set, threat, budget, and n where it is one."""
    labels = of_each[0].labels
    words = [str(labels.get("dataset")), threat_text(labels["norm"], labels["eps"])]
    words += [f"n={labels.get('n')}"] if len({evidence.labels.get("n") for evidence in of_each}) == 1 else []
    return ", ".join([*words, f"budget {labels['budget_name']}"])


def _line(figure: Figure, panel: Axes, name: str, points: Sequence[Point], k: int) -> None:
    """A line through the points in the order of `at`; the style is the k-th of the house's.

    It is shifted by k steps of a typographic point and a half, so that intervals at one place can be distinguished.
    """
    beside = ScaledTranslation(1.5 * k / 72, 0, figure.dpi_scale_trans)
    for hollow in (False, True):
        part = sorted((point for point in points if point.hollow == hollow), key=lambda point: point.at)
        if not part:
            continue
        colour = COLOURS[k % len(COLOURS)]
        bars = panel.errorbar(
            [point.at for point in part],
            [100 * point.value.value for point in part],
            yerr=_error([point.value for point in part]),
            label="" if hollow else name,
            color=colour,
            marker=MARKERS[k % len(MARKERS)],
            markerfacecolor="white" if hollow else colour,
            linestyle="" if hollow else ("-", "--", ":")[k // len(COLOURS) % 3],
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            elinewidth=0.9,
            transform=panel.transData + beside,
        )
        bars.lines[0].set_gid(figures.tips(figures.percent(f"{name} at {point.at:.4g}", point.value) for point in part))


def _levels(axes: Axes, evidence: Evidence) -> None:
    """Lines at the clean accuracy and at what is published for this very setting."""
    if evidence.clean is not None:
        value = 100 * evidence.clean.estimate.value
        axes.axhline(value, color=GREEN, linewidth=1.2, label=f"clean {value:.1f}", zorder=0)
    row = tables.published_row(evidence)
    if row is None:
        return
    for name, number, dashes in (("PGD", row.pgd, (5, 2)), ("AA", row.aa, (2, 2))):
        if number is not None:
            label = f"published {name} {number:.1f} ({row.source})"
            axes.axhline(number, color=BLACK, linewidth=1.0, linestyle=(0, dashes), label=label, zorder=0)


def _kind(bar: tables.Bar, last: bool) -> tuple[str, str]:
    """Colour of a bar, and what the legend calls it."""
    if bar.as_published:
        return GREY, "as published: no measure of robustness"
    if last:
        return RED, "worst case"
    if bar.step is None:
        return BLUE, "corrected"
    return (BLUE, "a correction takes away") if bar.step.value <= 0 else (GREEN, "a correction gives back")


def _bar(axes: Axes, at: float, name: str, estimate: Estimate, before: float, colour: str, label: str) -> None:
    """A bar from one accuracy to another, with the latter's interval."""
    height = 100 * (estimate.value - before)
    (drawn,) = axes.bar(at, height, bottom=100 * before, width=0.72, color=colour, label=label, zorder=1)
    drawn.set_gid(figures.tips([figures.percent(name, estimate)]))
    axes.errorbar(at, 100 * estimate.value, yerr=_error([estimate]), color=BLACK, capsize=3, elinewidth=1.0, zorder=3)
    axes.text(at, 100 * estimate.high + 1.5, f"{100 * estimate.value:.1f}", ha="center", va="bottom", fontsize=9, bbox=CLEAR)


def _dot(axes: Axes, at: float, entry: Entry, colour: str) -> None:
    value = entry.estimate
    bars = axes.errorbar(
        100 * value.value,
        at,
        xerr=_error([value]),
        marker="o",
        color=colour,
        markerfacecolor="white" if entry.result.labels["on"] else colour,
        markersize=4,
        capsize=2,
        elinewidth=0.9,
    )
    bars.lines[0].set_gid(figures.tips([figures.percent(entry.trial, value)]))


def _error(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above, in percent, for matplotlib; (2, n)."""
    below = [100 * max(found.value - found.low, 0.0) for found in estimates]
    return [below, [100 * max(found.high - found.value, 0.0) for found in estimates]]


def _step(step: Estimate) -> str:
    value, _, rest = tables.percent(step, signed=True).partition(" ")
    return f"{value}\n{rest}"


def _ticks(panel: Axes, at: Sequence[float], words: Sequence[str]) -> None:
    panel.xaxis.set_major_locator(FixedLocator(list(at)))
    panel.xaxis.set_major_formatter(FixedFormatter(list(words)))
    panel.xaxis.set_minor_locator(NullLocator())


def _accuracy(panel: Axes, of_each: Sequence[Evidence]) -> None:
    for chance in {1 / evidence.labels["classes"] for evidence in of_each}:
        figures.chance_line(panel, chance)
    figures.accuracy_axis(panel)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8
    )
