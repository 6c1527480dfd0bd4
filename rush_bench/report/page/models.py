"""What the page says of trained models: their cards, learning curves, and what training cost against what it bought."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from rush_bench.progress import amount
from rush_bench.records import CellResult
from rush_bench.report.cards import training_of
from rush_bench.report.figures import COLOURS, MARKERS, accuracy_axis, percent, save, tips
from rush_bench.report.rows import Row
from rush_bench.store import read_cards

Card = dict[str, Any]
CROWD = 12  # points whose names have room in a panel
WIDE, HIGH = math.log(4), 5  # what a name takes of it: of the logarithm of cost, and in percent of accuracy
POINT = 1.9  # typographic points of a percent
ABOUT = (
    "recipe",
    "dataset",
    "pretrain_dataset",
    "preset",
    "protocol_in_words",
    "seed",
    "epochs_done",
    "seconds",
    "environment",
)


def cards_of(results: Sequence[CellResult], stores: Iterable[Path]) -> tuple[dict[str, Card], list[str]]:
    """The cards of the models that were measured, by name; and the names of those whose weights are others by now.

    A record names the file that its weights came from by SHA-256: a card of that name with other weights is not its card.
    """
    found: dict[str, Card] = {}
    changed: set[str] = set()
    for in_store in [read_cards(store) for store in stores if store.is_dir()]:
        for labels in (result.labels for result in results):
            name = str(labels.get("model")).partition(":")[0]
            if name in in_store and labels.get("sha256") in in_store[name]["sha256"].values():
                found[name] = in_store[name]
            elif name in in_store:
                changed.add(name)
    return dict(sorted(found.items())), sorted(changed - found.keys())


def history(card: Card) -> list[dict[str, Any]]:
    """What was noted after each epoch: stage, epoch, loss and the accuracies on held-out images; empty for imported weights."""
    return (card.get("validation") or {}).get("history") or []


def learning_curve(card: Card, path: Path) -> Path | None:
    """Loss on the left, accuracies on held-out images on the right, against epochs of all stages; None without any."""
    epochs = history(card)
    if not epochs:
        return None
    lines: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    for at, epoch in enumerate(epochs, 1):
        for name, value in epoch.items():
            if name == "loss":
                lines[0, f"loss, {epoch['stage']}"].append((at, value))
            elif name not in ("stage", "epoch") and isinstance(value, float):
                lines[1, name].append((at, 100 * value))
    figure = Figure(figsize=(7.0, 2.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for k, ((side, name), points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        (line,) = axes[side].plot(x, y, label=name, color=COLOURS[k % len(COLOURS)], marker="o", markersize=2, linewidth=1.2)
        line.set_gid(tips(f"{name}, epoch {at}: {value:.5g}" for at, value in points))
    for panel, title in zip(axes, ("training loss", "accuracy on held-out images (%)"), strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("epoch", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
    return save(figure, path)


def cost(rows: Sequence[Row], cards: Mapping[str, Card], path: Path) -> Path | None:
    """Worst-case accuracy against passes of training, a panel per data set and threat; None if no passes are counted.

    Where there is no room for all names, those are named that no training of at most their cost surpasses.
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
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    names = list(dict.fromkeys(row.labels["defense"] for points in panels.values() for _, row, _ in points))
    for panel, (title, points) in zip(axes.flat, panels.items(), strict=False):
        written: list[tuple[float, float]] = []  # where names are: cost, and height in percent
        crowd = len(points) > CROWD  # names of a few only, on the left, where nothing is
        for spent, row, card in sorted(points, key=lambda point: point[1].estimates["worst"]):
            k, found = names.index(row.labels["defense"]), row.estimates["worst"]
            below, above = found.value - found.low, found.high - found.value
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
            bars.lines[0].set_gid(tips([f"{percent(row.labels['defense'], found)}; {words}"]))
            if crowd and any(at <= spent and other.estimates["worst"] > found for at, other, _ in points):
                continue
            height = 100 * found.value
            while any(abs(math.log(spent / at)) < WIDE and abs(height - taken) < HIGH for at, taken in written):
                height += 1
            written.append((spent, height))
            at = (spent, 100 * found.value)
            side, ha = (-5, "right") if crowd else (5, "left")
            beside = {"xytext": (side, (height - at[1]) * POINT), "textcoords": "offset points", "ha": ha, "va": "center"}
            panel.annotate(row.labels["defense"], at, fontsize=7, **beside)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda passes, _: amount(passes))
        panel.xaxis.set_minor_locator(NullLocator())
        costs = [spent for spent, _, _ in points]
        room = 10 if crowd else 2  # costs that differ by a few percent are to look equal
        panel.set_xlim(min(costs) / room, 2 * max(costs))
        accuracy_axis(panel)
        panel.set_title(title, fontsize=9)
        few = "; named: what nothing as cheap surpasses" if crowd else ""
        words = f"training, in passes of one image{few}\n(forward 1, with its gradient 2, with that of the weights 3)"
        panel.set_xlabel(words, fontsize=7)
    for panel in axes[:, 0]:
        panel.set_ylabel("worst-case accuracy (%)", fontsize=9)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_axis_off()
    return save(figure, path)


def text(card: Card) -> str:
    """The card as JSON, without the history, which is the curve."""
    validation = {key: value for key, value in (card.get("validation") or {}).items() if key != "history"}
    return json.dumps({**card, "validation": validation}, indent=1)
