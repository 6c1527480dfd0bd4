import math
from collections import Counter

import pytest
import torch
import torchvision.transforms.functional as F
from scipy import stats
from torch import Tensor

from rush_bench.datasets.color import JitterDraws, apply_jitter, color_jitter, jitter_draws, random_gray, shift_hue
from rush_bench.errors import BadInput

STRENGTHS = (0.4, 0.4, 0.4, 0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jittered_by_torchvision(image: Tensor, draws: JitterDraws, row: int) -> Tensor:
    """One image through torchvision's functions, in the drawn order."""
    if not draws.applied[row]:
        return image
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for place in range(4):
        if int(draws.hue_at[row]) == place:
            image = F.adjust_hue(image, float(draws.hue[row]))
        if place < 3:
            which = int(draws.order[place, row])
            image = functions[which](image, float(draws.factors[which, row]))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strengths", [STRENGTHS, (0.8, 0.8, 0.8, 0.5), (0.0, 1.5, 0.0, 0.2), (0.4, 0.4, 0.4, 0.0)])
def test_jitter_is_torchvisions_image_by_image(channels: int, strengths: tuple[float, float, float, float]) -> None:
    x = torch.rand(96, channels, 8, 9, generator=generator(1))
    x[:8] = x[:8].round()  # saturated colours, black, white, ties between channels
    x[8:12] = x[8:12, :1].clone()  # gray
    draws = jitter_draws(len(x), generator(), strengths, p=0.8)
    assert 0 < draws.applied.sum() < len(x) and len({*draws.hue_at.tolist()}) == 4
    expected = torch.stack([jittered_by_torchvision(x[row], draws, row) for row in range(len(x))])
    assert (apply_jitter(x, draws, with_hue=strengths[3] > 0) - expected).abs().max() < 2e-5
    assert torch.equal(color_jitter(x, generator(), *strengths, p=0.8), apply_jitter(x, draws, strengths[3] > 0))
    assert torch.equal(apply_jitter(x, draws)[~draws.applied], x[~draws.applied])


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.03, 1 / 3, 0.5])
def test_hue_alone(turn: float) -> None:
    x = torch.rand(16, 3, 6, 6, generator=generator(2))
    shifted = shift_hue(x, torch.full((16, 1, 1), turn))
    assert (shifted - F.adjust_hue(x, turn)).abs().max() < 2e-6
    if abs(turn - 1 / 3) < 1e-9:  # a third of a turn moves red to green, green to blue, blue to red
        assert (shifted - x.roll(1, dims=1)).abs().max() < 2e-6


def test_jitter_draws_have_torchvisions_law() -> None:
    count = 24_000
    draws = jitter_draws(count, generator(3), (0.4, 1.5, 0.2, 0.1), p=0.8)
    bounds = [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2)]
    for values, (low, high) in zip([*draws.factors, draws.hue], [*bounds, (-0.1, 0.1)], strict=True):
        assert stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert abs(draws.applied.double().mean() - 0.8) < 4 * math.sqrt(0.16 / count)
    orders = Counter(zip(*draws.order.tolist(), draws.hue_at.tolist(), strict=True))
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 1e-4


def test_random_gray() -> None:
    x = torch.rand(4000, 3, 2, 2, generator=generator(4))
    out = random_gray(x, generator(5), p=0.2)
    turned = (out != x).flatten(1).any(1)
    assert abs(turned.double().mean() - 0.2) < 4 * math.sqrt(0.16 / 4000)
    expected = torch.where(turned.view(-1, 1, 1, 1), F.rgb_to_grayscale(x, 3), x)
    assert (out - expected).abs().max() < 1e-6
    one = torch.rand(8, 1, 2, 2)
    assert torch.equal(random_gray(one, generator(), p=1.0), one)


def test_other_channels_are_refused() -> None:
    with pytest.raises(BadInput, match="1 or 3 channels, not 4"):
        color_jitter(torch.rand(2, 4, 3, 3), generator())
