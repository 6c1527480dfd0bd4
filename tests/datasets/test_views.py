import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode

from rush_bench import settings
from rush_bench.datasets.color import color_jitter, random_gray
from rush_bench.datasets.views import (
    CropDraws,
    SimCLRViews,
    crop_and_resize,
    crop_draws,
    pad_crop,
    random_resized_crop,
    shift_and_flip,
)
from rush_bench.errors import BadInput

RATIO = (3 / 4, 4 / 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cropped_by_torchvision(x: Tensor, draws: CropDraws, side: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    views = []
    for row, image in enumerate(x):
        box = [int(value) for value in (*draws.start[:, row], *draws.length[:, row])]
        view = F.resized_crop(image, *box, list(side), InterpolationMode(mode), antialias=antialias).clamp(0, 1)
        views.append(F.hflip(view) if draws.flip[row] else view)
    return torch.stack(views)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((3, 32, 32), (32, 32)), ((1, 16, 16), (16, 16)), ((3, 32, 32), (12, 12)), ((3, 20, 28), (24, 17))],
)
def test_crops_are_torchvisions_image_by_image(shape: tuple[int, int, int], side: tuple[int, int], mode: str) -> None:
    x = torch.rand(64, *shape, generator=generator(1))
    draws = crop_draws(64, *shape[1:], generator(), (0.02, 1.0), RATIO, flip=0.5)
    assert 0 < draws.flip.sum() < 64
    ours = crop_and_resize(x, draws, side, mode)  # type: ignore[arg-type]
    assert (ours - cropped_by_torchvision(x, draws, side, mode, antialias=True)).abs().max() < 1e-5
    if mode == "bilinear" and min(side) >= max(shape[1:]):  # enlarging: antialias is no matter
        assert (ours - cropped_by_torchvision(x, draws, side, mode, antialias=False)).abs().max() < 1e-5


def test_whole_image_crops_change_nothing() -> None:
    x = torch.rand(8, 3, 9, 11)
    assert torch.equal(random_resized_crop(x, generator(), scale=(1.0, 1.0), ratio=(11 / 9, 11 / 9), flip=0), x)
    assert torch.equal(random_resized_crop(x, generator(), (1.0, 1.0), (11 / 9, 11 / 9), flip=1), x.flip(-1))


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio", "count"),
    [
        (32, 32, (0.08, 1.0), RATIO, 4000),
        (32, 32, (0.9, 1.0), RATIO, 4000),  # many tries fail
        (96, 40, (0.3, 1.0), RATIO, 4000),
        (40, 96, (0.95, 1.0), RATIO, 40),  # no try fits, of anybody: always the centre, 40 x 53
        (5, 5, (0.001, 0.1), (0.2, 5.0), 4000),  # sides round to 0
    ],
)
def test_boxes_have_torchvisions_law(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], count: int
) -> None:
    """`count`: of torchvision's draws; a law of one box is known from few."""
    ours = crop_draws(4000, height, width, generator(2), scale, ratio, flip=0.5)
    box = torch.cat([ours.start, ours.length])
    assert torch.equal(box, box.round()) and (ours.start >= 0).all() and (ours.length >= 1).all()
    assert (ours.start[0] + ours.length[0] <= height).all() and (ours.start[1] + ours.length[1] <= width).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        drawn = [T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    theirs = torch.tensor(drawn).T.float()
    for mine, reference in zip(
        [*box, box[2] * box[3], box[0] + box[2] / 2],
        [*theirs, theirs[2] * theirs[3], theirs[0] + theirs[2] / 2],
        strict=True,
    ):
        assert stats.ks_2samp(mine.numpy(), reference.numpy()).pvalue > 1e-4
    assert abs(ours.flip.double().mean() - 0.5) < 4 * math.sqrt(0.25 / 4000)


def test_pad_crop_is_torchvisions_image_by_image() -> None:
    x = torch.rand(40, 3, 10, 12, generator=generator(1))
    top, left = (torch.randint(0, 7, (40,), generator=generator(seed)) for seed in (2, 3))
    flip = torch.arange(40) % 2 == 0
    ours = shift_and_flip(x, top, left, flip, padding=3)
    for row in range(40):
        expected = F.crop(F.pad(x[row], [3]), int(top[row]), int(left[row]), 10, 12)
        assert torch.equal(ours[row], F.hflip(expected) if flip[row] else expected)


def test_pad_crop_draws_every_shift_as_often() -> None:
    image = torch.arange(1.0, 26).view(1, 1, 5, 5)
    out = pad_crop(image.expand(18_000, 1, 5, 5), generator(), padding=1, flip=0.5)
    kinds, counts = out.flatten(1).unique(dim=0, return_counts=True)
    expected = {
        tuple(shift_and_flip(image, torch.tensor([t]), torch.tensor([k]), torch.tensor([f]), 1).flatten().tolist())
        for t in range(3)
        for k in range(3)
        for f in (False, True)
    }
    assert {tuple(kind) for kind in kinds.tolist()} == expected
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_views_are_crop_flip_jitter_gray_in_the_papers_order() -> None:
    x = torch.rand(64, 3, 16, 16, generator=generator(1))
    source = generator(7)
    expected = random_resized_crop(x, source, scale=(0.08, 1.0), flip=0.5)
    expected = color_jitter(expected, source, 0.4, 0.4, 0.4, 0.1, p=0.8)
    expected = random_gray(expected, source, p=0.2)
    assert torch.equal(SimCLRViews()(x, generator(7)), expected)


def test_a_view_in_torchvisions_pipeline_has_the_same_distribution() -> None:
    """Mean, spread and colourfulness of views of one image, against appendix A's Compose without 8-bit rounding."""
    image = torch.rand(3, 12, 12, generator=generator(1)) * torch.tensor([1.0, 0.6, 0.3]).view(3, 1, 1)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    pipeline = T.Compose([T.RandomResizedCrop(12), T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(p=0.2)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([pipeline(image) for _ in range(1500)])
    ours = SimCLRViews()(image.expand(3000, -1, -1, -1), generator(2))
    for measure in (
        lambda v: v.mean((1, 2, 3)),
        lambda v: v.std((1, 2, 3)),
        lambda v: (v.amax(1) - v.amin(1)).mean((1, 2)),
        lambda v: v[:, 0].mean((1, 2)) - v[:, 2].mean((1, 2)),
        lambda v: (v[:, :, :, :6] - v[:, :, :, 6:]).mean((1, 2, 3)),
    ):
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("views", [SimCLRViews(), SimCLRViews(interpolation="bicubic"), SimCLRViews.for_dataset("digits")])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_has_its_own_draw_and_a_seed_fixes_all(views: SimCLRViews, channels: int) -> None:
    x = torch.rand(1, channels, 16, 16).expand(32, -1, -1, -1)
    state = torch.random.get_rng_state()
    out = views(x, generator(3))
    assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    assert len(out.flatten(1).unique(dim=0)) == 32
    assert torch.equal(views(x, generator(3)), out) and not torch.equal(views(x, generator(4)), out)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digits_are_never_mirrored() -> None:
    wedge = torch.linspace(0.2, 0.8, 16).expand(200, 1, 16, 16)
    view = SimCLRViews.for_dataset("digits")(wedge, generator())
    assert (view[..., -1] >= view[..., 0]).all()
    mirrored = SimCLRViews()(wedge, generator())
    assert (mirrored[..., -1] < mirrored[..., 0]).any()


class _Count(TorchDispatchMode):
    """Names of the operations that run a kernel (views of a tensor do not)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
            if "_to_copy" in str(func) and kwargs and kwargs.get("device") is not None:
                self.names.append("to device")
            for index in args[1] if "index" in str(func) and len(args) > 1 and isinstance(args[1], list) else []:
                if index is not None and index.dtype == torch.bool:
                    self.names.append("boolean index")
        return func(*args, **(kwargs or {}))


SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "boolean index",
    "item",
    "unique",
    "to device",
)


def operations(view: Callable[[Tensor, torch.Generator], Tensor], batch: int) -> list[str]:
    x, source = torch.rand(batch, 3, 32, 32), generator()
    with _Count() as count:
        view(x, source)
    return count.names


@pytest.mark.parametrize(
    ("view", "most"),
    [
        (SimCLRViews(), 165),
        (SimCLRViews(interpolation="bicubic"), 180),
        (random_resized_crop, 55),
        (color_jitter, 106),
        (pad_crop, 20),
    ],
)
def test_few_operations_for_any_batch_and_no_host_sync(view: Any, most: int) -> None:
    names = operations(view, 4)
    assert names == operations(view, 33)
    assert 5 < len(names) <= most
    assert not [name for name in names if any(sync in name for sync in SYNCS)]


def test_the_counter_sees_a_host_sync() -> None:
    assert "boolean index" in operations(lambda x, g: x[x > 0.5], 2)
    assert any("_local_scalar_dense" in name for name in operations(lambda x, g: x * x.mean().item(), 2))
    assert "to device" in operations(lambda x, g: x.to("meta"), 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_floor": 0.0},
        {"crop_floor": 1.5},
        {"flip": 1.1},
        {"gray_p": -0.1},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"interpolation": "nearest"},
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(changes))):
        SimCLRViews(**changes)


def test_settings_can_be_overridden_as_text() -> None:
    views = settings.override(SimCLRViews(), {"crop_floor": "0.2", "jitter": "0.8,0.8,0.8,0.2", "interpolation": "bicubic"})
    assert views == SimCLRViews(crop_floor=0.2, jitter=(0.8, 0.8, 0.8, 0.2), interpolation="bicubic")


def test_integer_images_are_refused() -> None:
    with pytest.raises(BadInput, match=r"floating point images in .*, not torch.uint8"):
        SimCLRViews()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), generator())
