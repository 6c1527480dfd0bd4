"""float32 alone judges (A7): what judges runs in full precision, whatever the user has set; the search as set."""

import pytest
import torch
from torch import nn

from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.devices import full_precision
from rush_bench.noise import Stream

pytestmark = pytest.mark.strangers

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul
SHAPE, LABELS, STREAM = (1, 4, 4), torch.tensor([0, 1]), Stream(0, "attack")
IMAGES = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def flags():
    return CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, MATMUL.fp32_precision, torch.get_float32_matmul_precision()


class Tells(nn.Module):
    """A network that notes what is set while it runs."""

    seen: list = []  # noqa: RUF012  # shared by its copies

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x):
        self.seen.append("tf32" not in flags() and flags()[3] == "highest")
        return self.layer(x.flatten(1))


@pytest.fixture
def fast():
    """TF32 wherever a user may set it, as it was afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert "tf32" in flags()  # cuDNN has it by default
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("make", [Deterministic, lambda net, **o: Smoothed(net, noise="uniform:0.1", votes=3, **o)])
def test_what_judges_runs_in_full_precision(fast, make):
    Tells.seen.clear()
    defense = make(Tells().eval(), shape=SHAPE)
    assert all(Tells.seen)  # and so does the look at the network, which compares answers to the last bits
    defense.predict(IMAGES, STREAM)
    defense.predictions(IMAGES, STREAM, 4)
    assert all(Tells.seen)
    Tells.seen.clear()
    defense.gradient(IMAGES, LABELS, "ce", 3, STREAM)
    assert not any(Tells.seen)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_the_user_has_set_is_as_it_was(fast, mixed):
    """Also where they use torch's newer way to say it for convolutions alone, after which its older one cannot be read."""
    if mixed:
        CUDNN.conv.fp32_precision = "ieee"
    try:
        before = flags()
        with pytest.raises(ZeroDivisionError), full_precision():
            assert "tf32" not in flags()
            raise ZeroDivisionError
        assert flags() == before
        assert mixed or CUDNN.allow_tf32
    finally:
        CUDNN.conv.fp32_precision = "tf32"
