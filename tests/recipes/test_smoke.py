"""Every recipe: two epochs at `smoke` on small digits, the loss falls, and a stopped run ends in the same weights."""

import json
from pathlib import Path

import pytest

from rush_bench import registry
from rush_bench.defenses import load_defense
from rush_bench.errors import WorkLeft
from rush_bench.training import loop, train

OTHERS = {"finetune"}  # needs an encoder: tests/training/test_initial_weights.py
RECIPES = sorted({name for name, entry in registry.recipes.entries.items() if entry.entry_point is None} - OTHERS)
SMALL = ("n_train=128", "size=8", "network.name=resnet", "network.blocks=1", "network.width=4")
# Where eight steps of a tiny network are too few for a loss that starts near its lower bound.
LONGER = ("pretrain.batch_size=32", "pretrain.lr=0.2", "pretrain.temperature=0.1")
PROBE = ("finetune.batch_size=256", "finetune.lr=0.1")  # all images at once: no luck of the draw
ATTACK = ("attack.steps=1",)  # time
SSP = ("n_train=192", "network.blocks=1,1", *ATTACK, "finetune_attack.steps=1")
SETS: dict[str, tuple[str, ...]] = {
    "simclr": LONGER,
    "rush": LONGER,
    "purify_simclr": LONGER,
    "deacl": (*LONGER, *PROBE, *ATTACK),
    "advcl": (*(each.replace("pretrain", "simclr") for each in LONGER), "pretrain.batch_size=32", *ATTACK),
    "byorl_reimpl": (*PROBE, *ATTACK),
    "acl": ATTACK,
    "dynacl": (*PROBE, *ATTACK),
    "dynacl_pp": (*PROBE, *ATTACK),
    "rocl": ATTACK,
    "pgd_at": ATTACK,
    "trades": ATTACK,
    "smoothadv": ATTACK,
    "dataaug": ATTACK,
    **dict.fromkeys(("ssp", "ssp_rotation"), (*SSP, "rotation.lr=0.2", "jigsaw.batch_size=96")),
    "ssp_joint": (*SSP, "joint.batch_size=96", "joint.layers=1", "finetune.batch_size=96"),
    **dict.fromkeys(("ssp_jigsaw", "ssp_selfie"), SSP),
}

# Their stages, and how these resume, are those of `ssp`, `purify` and `dynacl_pp`, or stop after every step in test_resume.
SAME_STAGES = {"ssp_rotation", "ssp_jigsaw", "ssp_selfie", "purify_simclr", "dynacl", "simclr", "rush"}


class Clock:
    """Time that passes one second a training step and not otherwise."""

    def __init__(self, monkeypatch):
        self.now, self.step = 0.0, loop.train_step
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(loop, "train_step", self.timed)

    def timed(self, *arguments):
        self.now += 1
        return self.step(*arguments)


def smoke(name: str, store: Path, steps: float | None = None) -> dict:
    minutes = None if steps is None else steps / 60
    sets = (*SMALL, *SETS.get(name, ()))
    folder = train(name, dataset="digits", preset="smoke", sets=sets, store=store, name="run", max_minutes=minutes)
    return json.loads((folder / "card.json").read_text())


def what_stays(card: dict) -> dict:
    return {key: value for key, value in card.items() if key not in ("seconds", "environment")}


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    whole = smoke(name, tmp_path / "whole")
    total, stages = clock.now, {}
    for entry in whole["validation"]["history"]:
        stages.setdefault(entry["stage"], []).append(entry["loss"])
    assert all(len(losses) == 2 for losses in stages.values())
    assert all(losses[1] < losses[0] for losses in stages.values()), stages

    if name not in SAME_STAGES:
        stops = 0
        for steps in (1, total // 2 - 1, total - total // 2 - 1, None):  # in the first epoch, in the middle, near the end
            try:
                parts = smoke(name, tmp_path / "parts", steps)
            except WorkLeft:
                stops += 1
        assert stops == 3
        assert what_stays(parts) == what_stays(whole)

    votes = f"@{whole['votes'][0]}" if whole["votes"][0] else ""
    defense = load_defense(f"run{votes}", store=tmp_path / "whole")
    assert (defense.draws, defense.shape, defense.classes) == (whole["votes"][0], (1, 8, 8), 10)
