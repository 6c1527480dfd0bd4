"""Accuracy of logits."""

import pytest
import torch

from rush_bench.training.validation import accuracy


def test_accuracy():
    assert accuracy(torch.tensor([[1.0, 2], [3, 2], [0, 5]]), torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)
