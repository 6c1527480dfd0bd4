"""What the page says of trained models: their cards and learning curves."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rush_bench.report.cards import Card
from rush_bench.report.figures import COLOURS, save, tips

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


def text(card: Card) -> str:
    """The card as JSON, without the history, which is the curve."""
    validation = {key: value for key, value in (card.get("validation") or {}).items() if key != "history"}
    return json.dumps({**card, "validation": validation}, indent=1)
