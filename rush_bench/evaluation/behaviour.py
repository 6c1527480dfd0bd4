"""Whether records are of the defence at hand: the key of a cell has a network's weights, but not the code around them.

A JPEG layer and a layer that kills gradients have no weights, so two networks may share a key. Beside the first records of a
defence on a data set lies what it did with a few of its images; a defence of that key which does something else is refused.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from rush_bench.datasets import Images
from rush_bench.defenses import Defense
from rush_bench.errors import BadInput
from rush_bench.files import digest, read_json, write_json
from rush_bench.noise import Stream

IMAGES = 8
APART = 0.02  # mean distance in total variation; another device or batch size moves probabilities by 1e-4
FADED = 0.5  # of the gradient's norm: bfloat16 search moves it by a tenth


def check_behaviour(folder: Path, defenses: Iterable[Defense], data: Images) -> None:
    """Compare each defence with what `<folder>/behaviour` has under its identity, or write that down; BadInput if it differs.

    One that draws inside its network is passed over, as its draws are others on another device; so is one that fails.
    """
    part = data.take(list(range(min(IMAGES, len(data)))))
    seen = set[int]()
    for defense in defenses:
        if id(defense) in seen or not defense.keyed:
            continue
        seen.add(id(defense))
        path = Path(folder) / "behaviour" / f"{digest([defense.identity(), part.digest])[:16]}.json"
        try:
            now = _behaviour(defense, part)
        except Exception:  # a defence is anybody's code; its cells will fail and say why
            continue
        if not path.exists():
            write_json(path, {"defense": defense.name, **now})
            continue
        before = read_json(path)
        if _apart(before, now):
            raise BadInput(
                f"{defense.name} does not do what {before['defense']!r} did, of which {folder} has records under the same key: "
                "code was changed that has no weights (a layer, a transform, a Defense); give another folder with --out, or "
                f"delete the old records and {path.name} in {path.parent}"
            )


def _behaviour(defense: Defense, part: Images) -> dict[str, list[list[float]] | list[float] | None]:
    """Probabilities (B, K) and norms of the gradient of CE (B,); None without a gradient. Not counted as passes."""
    images, labels = part.floats().to(defense.device), part.labels.to(defense.device)
    stream, passes = Stream(0, "behaviour", part.index), (defense.passes.forwards, defense.passes.backwards)
    probabilities = defense.predict(images, stream).probabilities
    try:
        gradient = defense.gradient(images, labels, "ce", max(defense.draws, 1), stream).gradient
        norms = gradient.flatten(1).norm(dim=1).tolist()
    except (BadInput, RuntimeError):
        norms = None
    defense.passes.forwards, defense.passes.backwards = passes
    return {"probabilities": probabilities.to(torch.float32).tolist(), "gradient": norms}


def _apart(before: dict[str, list[float]], now: dict[str, list[list[float]] | list[float] | None]) -> bool:
    one, two = np.asarray(before["probabilities"], float), np.asarray(now["probabilities"], float)
    if one.shape != two.shape or np.abs(one - two).sum(1).mean() / 2 > APART:
        return True
    if before["gradient"] is None or now["gradient"] is None:
        return before["gradient"] is not now["gradient"]
    sizes = [float(np.mean(np.asarray(each, float))) for each in (before["gradient"], now["gradient"])]
    return min(sizes) < FADED * max(sizes)
