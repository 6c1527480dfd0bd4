"""Supervised stages: what they see, how they are validated and by what their best epoch is chosen."""

import pytest
import torch
from torch import nn

from rush_bench.datasets import as_images
from rush_bench.networks import build
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import Batch, Context
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage
from rush_bench.training.validation import CHUNK, robust_accuracy

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "classes": 4}


def noise_images(count: int = 24, split: str = "train", name: str = "random"):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    return as_images(pixels, torch.arange(count) % 4, name=name, split=split)


def a_stage(noise: str = "none", attack: InnerSettings | None = None, name: str = "random", **settings) -> SupervisedStage:
    splits = {"train": noise_images(name=name), "val": noise_images(12, "val")}
    context = Context(build(SPEC), RunSettings(noise=noise), splits, seed=0)
    return SupervisedStage(context, SupervisedSettings(**settings), attack)


class Plane(nn.Module):
    """Two classes, the second where w x > 0."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        score = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize("eps", [1e-12, 0.02, 0.05])  # the first: the image alone
def test_robust_accuracy_is_exact_on_a_plane_whatever_the_chunks(eps, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=generator)
    data = as_images(torch.randint(70, 180, (90, 1, 4, 4), generator=generator, dtype=torch.uint8), torch.arange(90) % 2)
    score = (data.floats().flatten(1) - 0.5) @ weight
    margin = torch.where(data.labels == 1, score, -score) - eps * weight.abs().sum()
    inner = InnerSettings(eps=eps, step=eps / 2, steps=5)
    exact = float((margin > 0).float().mean())
    assert 0.02 < exact < 0.6 and robust_accuracy(Plane(weight), data, inner, 0) == pytest.approx(exact)
    assert CHUNK > 90
    monkeypatch.setattr("rush_bench.training.validation.CHUNK", 32)
    assert robust_accuracy(Plane(weight), data, inner, 0) == pytest.approx(exact)


CHOICES = [
    ("none", None, {"clean"}, "clean"),
    ("uniform:0.3", None, {"clean", "noisy"}, "noisy"),
    ("none", InnerSettings(), {"clean", "robust"}, "robust"),
]


@pytest.mark.parametrize(("noise", "attack", "keys", "score"), CHOICES)
def test_validation_numbers_and_the_one_that_chooses(noise, attack, keys, score):
    stage = a_stage(noise, attack)
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    numbers = stage.validate()
    assert set(numbers) == keys and stage.selection_metric == score and numbers == stage.validate()
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())
    assert all(weight.requires_grad for weight in stage.parameters())
    if attack:
        assert numbers["robust"] <= numbers["clean"]


@pytest.mark.parametrize(("select", "count"), [(5, 5), (0, 12), (100, 12)])
def test_how_many_validation_images_are_attacked(select, count, monkeypatch):
    seen = []
    note = lambda network, images, *_: seen.append(images.index) or 0.0  # noqa: E731
    monkeypatch.setattr("rush_bench.training.supervised.robust_accuracy", note)
    a_stage(attack=InnerSettings(), select_images=select).validate()
    assert len(seen[0]) == count == len(set(seen[0].tolist()))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "simclr"])
def test_augmentation_depends_on_the_steps_generator_alone(augment):
    stage = a_stage(augment=augment)
    rows = torch.arange(16)

    def views(seed: int):
        return stage.inputs(Batch(stage.splits["train"], rows, torch.Generator().manual_seed(seed), 0, 0))

    plain = stage.splits["train"].floats(rows)
    assert views(1).shape == plain.shape and torch.equal(views(1), views(1))
    assert torch.equal(views(1), views(2)) == torch.equal(views(1), plain) == (augment == "none")


@pytest.mark.parametrize(("every", "epochs"), [(1, {0, 1, 2, 3, 4}), (2, {1, 3, 4}), (9, {4})])
def test_when_it_validates(every, epochs):
    stage = a_stage(select_every=every)
    assert {epoch for epoch in range(5) if stage.validates_after(epoch, 5)} == epochs
