"""One block of a call holds no more than the memory that it was granted, counted by what torch is asked to make."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rush_bench.defenses import Smoothed
from rush_bench.defenses.memory import Peak
from rush_bench.networks import build
from rush_bench.noise import Stream
from tests.fakecuda import CUDA, fake_cuda

SHAPE, MEMORY = (3, 16, 16), 2**21
IMAGES, LABELS = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.zeros(2, dtype=torch.int64)
NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10)),
    "resnet": lambda: build(
        {"name": "resnet", "blocks": [1, 1], "width": 16, "classes": 10, "channels": 3, "size": 16}, seed=1
    ),
    "tiny": lambda: build({"name": "tiny", "classes": 10, "channels": 3, "size": 16}, seed=1),
}
CALLS = {
    "predict": lambda defense, x, y, m: defense.predictions(x, Stream(0, "a"), m),
    "ce": lambda defense, x, y, m: defense.gradient(x, y, "ce", m, Stream(0, "a")),
    "margin": lambda defense, x, y, m: defense.gradient(x, y, "margin", m, Stream(0, "a")),
}


class Seen(TorchDispatchMode):
    """Counts as `Peak` does, backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = Peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.peak.note((args, kwargs), made)
        return made


def test_peak_is_what_lives_at_once() -> None:
    with Peak() as peak:
        one = torch.zeros(1000)
        two = one.view(10, 100) + 1  # a view takes nothing
        del one
        two.add_(1)
        three = torch.cat([two, two])
    assert three.shape == (20, 100)
    assert (peak.most, peak.held) == (12_000, 12_000)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("draws", [1, 4])  # times what fits
def test_memory_stays_within_the_budget_whatever_m_is(network: str, call: str, draws: int) -> None:
    defense = Smoothed(NETWORKS[network]().eval(), noise="uniform:0.3", votes=1, shape=SHAPE, memory=MEMORY)
    defense.body.brisk = defense.body.rows  # as on a GPU
    with Seen() as seen:
        CALLS[call](defense, IMAGES, LABELS, draws * defense.body.rows)
    assert 0.3 * MEMORY < seen.peak.most < 1.1 * MEMORY


def test_noise_that_a_gpu_makes_is_within_the_budget() -> None:
    with fake_cuda():
        network = NETWORKS["mlp"]().eval().to(CUDA)
        defense = Smoothed(network, noise="gaussian:0.3", votes=1, shape=SHAPE, memory=MEMORY)
        with Seen() as seen:
            CALLS["predict"](defense, IMAGES.to(CUDA), LABELS.to(CUDA), 4 * defense.body.rows)
    assert 0.3 * MEMORY < seen.peak.most < 1.1 * MEMORY
