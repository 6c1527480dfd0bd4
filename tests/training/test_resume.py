"""Stopped or killed anywhere and run again: the same weights, bit for bit."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rush_bench.errors import BadInput, WorkLeft
from rush_bench.files import read_json, sha256_file, write_json
from rush_bench.training import train
from rush_bench.training.options import Optimisation, RunSettings
from rush_bench.training.prepare import resolve_settings
from rush_bench.training.stage import Batch, Context, Plan, Recipe, Stage

SMALL = ("size=8", "network.name=resnet", "network.blocks=1", "network.width=4", "n_train=96", "pretrain.batch_size=32")
KILLS = 4  # benchmarks/trials.py has more
KINDS = {"simclr": SMALL, "rush": (*SMALL, "finetune.bn_adapt=beta_stats")}


def left_behind(folder: Path) -> dict:
    """What a run leaves: the weights' hashes and the card without clock and machine, and the digest that covers them."""
    card = json.loads((folder / "card.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"card.json", "log.jsonl"} | {f"{x}.safetensors" for x in card["sha256"]}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines == card["validation"]["history"]
    assert all(sha256_file(folder / f"{stem}.safetensors") == sha for stem, sha in card["sha256"].items())
    return {key: value for key, value in card.items() if key not in ("seconds", "environment", "digest")}


def stop_after_every_step(call) -> int:
    """Call until it finishes; each call has no time at all, which is one step. Returns the number of stops."""
    for stops in range(200):
        try:
            call(max_minutes=0)
        except WorkLeft as error:
            assert error.exit_code == 3 and "run the same command again" in str(error)
        else:
            return stops
    raise AssertionError("it never finished")


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_step_equals_uninterrupted(kind, tmp_path):
    def call(store: str, max_minutes: float | None = None) -> Path:
        common = {"dataset": "digits", "preset": "smoke", "sets": KINDS[kind], "seed": 5}
        return train(kind, store=tmp_path / store, max_minutes=max_minutes, **common)

    whole = left_behind(call("whole"))
    stops = stop_after_every_step(lambda **keys: call("parts", **keys))
    assert stops == 2 * 3 + 2 * 1  # epochs times batches of both stages
    assert left_behind(tmp_path / "parts" / f"{kind}-digits") == whole


class Replaying(Stage):
    """What later systems need of the loop: replays, one backward for both gradients, a carried perturbation, an average."""

    name, replays, selection_metric = "replaying", 2, None

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.delta: Tensor
        self.register_buffer("delta", torch.zeros(8, 1, 16, 16))
        self.average = nn.Linear(self.network.head.in_features, self.network.head.out_features)
        self.average.requires_grad_(False).load_state_dict(self.network.head.state_dict())

    def backward(self, batch: Batch) -> Tensor:
        delta = self.delta.clone().requires_grad_()
        loss = nn.functional.cross_entropy(self.network(batch.images + delta), batch.labels)
        loss.backward()
        self.delta = (self.delta + 0.1 * delta.grad.sign()).clamp(-0.1, 0.1)
        assert batch.step % 2 == batch.replay
        return loss.detach()

    def after_step(self, batch: Batch) -> None:
        self.average.weight.lerp_(self.network.head.weight, 0.1)

    def finish(self) -> None:
        self.network.head.load_state_dict(self.average.state_dict())
        self.carried["teacher"] = {key: value.clone() for key, value in self.network.state_dict().items()}


class Following(Stage):
    """A later stage that leans on what an earlier one left."""

    name = "following"

    def loss(self, batch: Batch) -> Tensor:
        teacher = self.carried["teacher"]["head.weight"]
        noise = torch.randn(teacher.shape, generator=batch.generator)
        return (self.network.head.weight - teacher - noise).square().mean() + self.network(batch.images).square().mean()


def toy_recipe() -> Recipe:
    settings = Optimisation(epochs=2, batch_size=8)
    plans = [
        Plan("replaying", "train", settings, Replaying, labelled=True),
        Plan("following", "train", settings, Following),
    ]
    card = {"protocol": "supervised", "extra_data": None, "votes": [0]}
    return Recipe("toy", RunSettings(), lambda s: plans, lambda s: card, {"short": {}})


def test_hooks_of_later_systems_resume_too(tmp_path):
    def call(store: str, max_minutes: float | None = None) -> Path:
        sets = ("network.name=resnet", "network.blocks=1", "network.width=4", "n_train=24")
        return train(toy_recipe(), dataset="digits", sets=sets, store=tmp_path / store, max_minutes=max_minutes)

    whole = left_behind(call("whole"))
    assert stop_after_every_step(lambda **keys: call("parts", **keys)) == 2 * 3 * 2 + 2 * 3
    assert left_behind(tmp_path / "parts" / "toy-digits") == whole


def test_killed_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the fork server: threads that spin make small runs slow
    sets = (*KINDS["rush"], "pretrain.epochs=6", "finetune.epochs=5", "pretrain.batch_size=16")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rush_bench.training.run", "rush_bench.recipes.rush", "sklearn.datasets", "torch._dynamo"])

    def child(store: str) -> multiprocessing.Process:
        keys = {"dataset": "digits", "preset": "smoke", "sets": sets, "store": tmp_path / store}
        process = context.Process(target=train, args=("rush",), kwargs=keys)
        process.start()
        return process

    def finish(store: str) -> dict:
        process = child(store)
        process.join(300)
        assert process.exitcode == 0
        return left_behind(tmp_path / store / "rush-digits")

    whole, kills, draw = finish("whole"), 0, random.Random(0)
    seen: list[bytes] = []
    for attempt in range(30):
        folder = tmp_path / f"kill{attempt}" / "rush-digits"
        while kills < KILLS and not (folder / "card.json").exists():
            checkpoint, process = folder / ".training" / "checkpoint.pt", child(folder.parent.name)
            old, limit = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None, time.monotonic() + 20
            while process.is_alive() and time.monotonic() < limit:  # until it has written something new
                if checkpoint.exists() and checkpoint.stat().st_mtime_ns != old:
                    break
                time.sleep(0.002)
            time.sleep(draw.random() * 0.1)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            if checkpoint.exists():
                seen.append(checkpoint.read_bytes()[-64:])
        assert finish(folder.parent.name) == whole
        if kills == KILLS:
            break
    assert kills == KILLS and len(set(seen)) > 1  # they were killed at different places


def test_running_a_finished_model_again_does_nothing(tmp_path, capsys):
    keys = {"dataset": "digits", "preset": "smoke", "sets": SMALL, "store": tmp_path}
    folder = train("simclr", **keys)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert train("simclr", **keys) == folder
    output = capsys.readouterr()
    assert "is finished; nothing to do" in output.err and not output.out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_setting_younger_than_the_finished_model_is_a_difference_only_where_it_is_asked_for(tmp_path, capsys):
    keys = {"dataset": "digits", "preset": "smoke", "store": tmp_path}
    folder = train("simclr", sets=SMALL, **keys)
    card = read_json(folder / "card.json")
    del card["digest"]  # as old cards are
    assert card["settings"]["pretrain"].pop("flip") == 0.0  # what digits have: no default of the recipe
    write_json(folder / "card.json", card)
    assert train("simclr", sets=SMALL, **keys) == folder
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"pretrain\.flip is None there and 0\.5 here"):
        train("simclr", sets=[*SMALL, "pretrain.flip=0.5"], **keys)
    card["settings"]["pretrain"]["flip"], card["settings"]["pretrain"]["ours"] = 0.0, 1
    write_json(folder / "card.json", card)  # one that is no more is a difference always
    with pytest.raises(BadInput, match=r"pretrain\.ours is 1 there"):
        train("simclr", sets=SMALL, **keys)


def test_the_key_is_the_settings_not_how_they_were_given():
    by_set = resolve_settings(toy_recipe(), "short", None, [{"network.width": "4"}])
    by_toml = resolve_settings(toy_recipe(), "short", None, [{"network": {"width": 4}}])
    assert by_set == by_toml
