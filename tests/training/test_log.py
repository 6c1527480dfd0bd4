"""TensorBoard's events are the history, and once each, whatever was killed."""

import json

import pytest

from rush_bench.errors import BadInput, MissingPackage
from rush_bench.training.log import TrainingLog

HISTORY = [{"stage": "pretrain", "epoch": k, "loss": 4.0 / k, "knn": 0.1 * k} for k in (1, 2)]
MORE = {"stage": "finetune", "epoch": 1, "loss": 0.5, "clean": 0.9}


def test_events_and_lines_are_the_history(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = TrainingLog(tmp_path, "tensorboard")
    killed.epoch(HISTORY[:1])
    killed.close()
    log = TrainingLog(tmp_path, "tensorboard")
    log.epoch(HISTORY)
    log.epoch([*HISTORY, MORE])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["pretrain/loss"] == [(1, 4.0), (2, 2.0)] and found["finetune/clean"] == [(1, pytest.approx(0.9))]
    assert set(found) == {"pretrain/loss", "pretrain/knn", "finetune/loss", "finetune/clean"}
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*HISTORY, MORE]


def test_what_is_not_known_or_not_there_is_told(tmp_path, monkeypatch) -> None:
    with pytest.raises(BadInput, match="tensorboard"):
        TrainingLog(tmp_path, "wandb")
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackage, match="pip install"):
        TrainingLog(tmp_path, "tensorboard")
