"""Nearest neighbours against scikit-learn; outputs do not depend on chunks."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from rush_bench import features as module
from rush_bench.datasets import as_images
from rush_bench.features import knn_accuracy, outputs
from rush_bench.noise import Uniform


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_scikit_learn(k):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    labels = torch.arange(200) % 4
    features = 5 * (centres[labels] + 1.2 * torch.randn(200, 6, generator=generator))
    bank, queries = features[:140], features[140:]
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    model.fit(bank.numpy(), labels[:140].numpy())
    expected = model.score(queries.numpy(), labels[140:].numpy())
    assert 0.5 < expected < 1
    assert knn_accuracy(bank, labels[:140], queries, labels[140:], k=k) == pytest.approx(expected)


def test_a_small_bank_votes_whole():
    bank = torch.eye(2)
    assert knn_accuracy(bank, torch.tensor([0, 1]), 3 * bank, torch.tensor([0, 1]), k=20) == 1.0


@pytest.mark.parametrize("noise", [None, Uniform(0.3)])
def test_chunks_change_nothing(monkeypatch, noise):
    pixels = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = as_images(pixels, torch.zeros(20, dtype=torch.int64))
    whole = outputs(torch.nn.Identity(), images, noise, seed=3)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(whole, outputs(torch.nn.Identity(), images, noise, seed=3))
    assert torch.equal(whole, images.floats()) is (noise is None)
