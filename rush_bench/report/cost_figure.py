"""Figure: what training cost against what it bought."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from rush_bench.files import digest
from rush_bench.progress import amount
from rush_bench.report.cards import Card, training_of
from rush_bench.report.figures import COLOURS, MARKERS, accuracy_axis, hollow, line_names, mark, other_settings, percent, save
from rush_bench.report.layout import BOUND
from rush_bench.report.rows import Row
from rush_bench.report.trainings import defense_but_weights

CROWD = 36  # points whose names have room beside a panel
TALL, HIGH = 3.4, 0.143  # inches of a panel at least, and for each name


def accuracy_against_cost(rows: Sequence[Row], cards: Mapping[str, Card], path: Path) -> Path | None:
    """Worst-case accuracy against passes of training, a panel per data set and threat; None if no passes are counted.

    A line joins what one system reaches at several costs, on the mean over its seeds. Names stand on the right, each with a
    thin line to its point (of several seeds to the first). Where there is no room for all, those are named that no training of
    at most their cost surpasses. A hollow marker, and a dagger behind the name, are of an upper bound (`Row.bounds`), which
    surpasses nothing.
    """
    panels: dict[str, list[tuple[float, Row, Card]]] = defaultdict(list)
    passes = {name: training_of(card).passes for name, card in cards.items()}
    for row in rows:
        name = str(row.labels.get("model")).partition(":")[0]
        if (spent := passes.get(name)) and "worst" in row.estimates:
            panels[f"{row.labels['dataset']}, {row.threat_text}, {row.labels['suite']}"].append((spent, row, cards[name]))
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    seeds = {title: _first_seeds(points) for title, points in panels.items()}
    tall = max(TALL, HIGH * max((len(found) for found in seeds.values() if len(found) <= CROWD), default=0))
    told = {key: name for points in panels.values() for key, name in line_names([row for _, row, _ in points]).items()}
    wide = max(4.6, 2.6 + 0.055 * max(map(len, told.values())))
    figure = Figure(figsize=(wide * columns + 0.4, tall * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    names = list(dict.fromkeys(row.labels["defense"] for points in panels.values() for _, row, _ in points))
    for panel, (title, points) in zip(axes.flat, panels.items(), strict=False):
        named: list[tuple[str, float, float, str]] = []  # with cost, height in percent and colour
        crowd = len(seeds[title]) > CROWD
        for spent, row, card in sorted(points, key=lambda point: point[1].estimates["worst"]):
            k, found = names.index(row.labels["defense"]), row.estimates["worst"]
            below, above, bound = found.value - found.low, found.high - found.value, _bound(row)
            bars = panel.errorbar(
                spent,
                100 * found.value,
                yerr=[[100 * max(below, 0.0)], [100 * max(above, 0.0)]],
                color=COLOURS[k % len(COLOURS)],
                marker=MARKERS[k // len(COLOURS) % len(MARKERS)],
                markersize=5,
                capsize=2.5,
                elinewidth=0.9,
            )
            device = (card.get("environment") or {}).get("device", "a device not noted")
            words = f"{amount(spent)} passes of training, {card.get('seconds') or math.nan:,.4g} s on {device}"
            words += f", {row.labels.get('budget') or 'budget not noted'}"
            mark(panel, bars, [f"{percent(told[id(row)], found, bound)}; {words}"], [bound])
            if _seed(card) != seeds[title][_system(row, card), spent]:
                continue
            if crowd and any(at <= spent and other.estimates["worst"] > found for at, other, _ in points if not _bound(other)):
                continue
            name = told[id(row)] + (f" {BOUND}" if bound else "")
            named.append((name, spent, 100 * found.value, COLOURS[k % len(COLOURS)]))
        _join(panel, points)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda passes, _: amount(passes))
        panel.xaxis.set_minor_locator(NullLocator())
        costs = [spent for spent, _, _ in points]
        panel.set_xlim(min(costs) / 2, 2 * max(costs))  # costs that differ by a few percent are to look equal
        top = min(100, 10 * math.ceil(10 * max(row.estimates["worst"].high for _, row, _ in points) + 0.5))
        accuracy_axis(panel, top)
        _name(panel, named, top, HIGH / tall)
        panel.set_title(title, fontsize=9)
        few = "; named: what nothing as cheap surpasses" if crowd else ""
        words = f"training, in passes of one image{few}\n(forward 1, with its gradient 2, with that of the weights 3)"
        panel.set_xlabel(words, fontsize=7)
    for panel in axes[:, 0]:
        panel.set_ylabel("worst-case accuracy (%)", fontsize=9)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_axis_off()
    if any(_bound(row) for points in panels.values() for _, row, _ in points):
        figure.legend(handles=[hollow()], loc="outside lower center", frameon=False, fontsize=8)
    return save(figure, path)


def _bound(row: Row) -> bool:
    return "worst" in row.bounds


def _first_seeds(points: Sequence[tuple[float, Row, Card]]) -> dict[tuple[str, float], int]:
    """By system and cost the first of its seeds, which has its name in the panel."""
    first: dict[tuple[str, float], int] = {}
    for spent, row, card in points:
        key = _system(row, card), spent
        first[key] = min(first.get(key, _seed(card)), _seed(card))
    return first


def _name(panel: Axes, named: Sequence[tuple[str, float, float, str]], top: float, share: float) -> None:
    """Write names on the right of a panel that ends at `top`, at the heights of their points, or as near as they do not
    overlap; each takes a `share` of the panel's height."""
    from sklearn.isotonic import isotonic_regression  # here, as it takes half a second

    high = share * top
    steps = high * np.arange(len(named))  # heights less these may not fall; of such the nearest to the points
    free = isotonic_regression([value for _, _, value, _ in named] - steps)
    heights = steps + np.clip(free, 0, max(0, top - high * (len(named) - 1)))
    edge = panel.get_xlim()[1]
    for (name, spent, value, colour), height in zip(named, heights, strict=True):
        panel.plot([spent, edge], [value, height], color=colour, linewidth=0.6, linestyle=":", zorder=0)
        panel.annotate(name, (edge, height), (3, 0), textcoords="offset points", fontsize=7, va="center", annotation_clip=False)


def _join(panel: Axes, points: Sequence[tuple[float, Row, Card]]) -> None:
    """Through a system's means at several costs, a line: same recipe, protocol, defence, network, images, repeats, settings."""
    systems: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for spent, row, card in points:
        systems[_system(row, card)][spent].append(100 * row.estimates["worst"].value)
    for found in systems.values():
        if len(found) > 1:
            costs = sorted(found)
            panel.plot(costs, [fmean(found[spent]) for spent in costs], color="#999999", linewidth=0.9, zorder=0)


def _system(row: Row, card: Card) -> str:
    """A digest of what trainings of one system have in common at whatever cost: recipe, protocol, network, defence, images."""
    cell = row.parts[-1]
    what = [card.get("recipe"), card.get("protocol"), card.get("network"), defense_but_weights(cell), cell.identity["images"]]
    return digest([*what, row.repeats, row.seed, other_settings(row)])


def _seed(card: Card) -> int:
    return int(card.get("seed") or 0)
