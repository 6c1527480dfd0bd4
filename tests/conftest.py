"""Networks whose answers are known in closed form, shared by the tests of defences, attacks and evaluation."""

import gc
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rush_bench.datasets import Images, as_images

SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """logits = W x + b on flattened images."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


gc.set_threshold(200_000, 20, 100)  # looking for garbage took 5 % of the time


def pytest_collection_finish() -> None:
    """What importing and collecting made stays to the end: it is not searched again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`unlocked(errno.ENOLCK)`: from here on no file system has locks; None: nor has the system."""
    from rush_bench import files

    def without(code: int | None) -> None:
        def flock(handle: int, how: int) -> None:
            raise OSError(code, "no locks")

        if code is None:
            monkeypatch.setattr(files, "fcntl", None)
        else:
            monkeypatch.setattr(files.fcntl, "flock", flock)
        files._say_unlocked.cache_clear()

    return without


@pytest.fixture(autouse=True)
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan times its defence first, which takes longer than what is planned; test_settle times one by a clock of its own."""
    from rush_bench.audits import forecast
    from rush_bench.bench import plan

    for module in (forecast, plan):
        monkeypatch.setattr(module, "rates", lambda defense, data, rows=512: (1e-4, 2e-4))


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and gradients of tests are known to be sound: what is asked of a stranger's, which takes longer than most
    tests, is left out, but for tests marked `strangers`, which hold networks and cells to all of it."""
    if request.node.get_closest_marker("strangers"):
        return
    from rush_bench.defenses import probe
    from rush_bench.evaluation import runner

    monkeypatch.setattr(runner, "_gradients", lambda *of: {})
    monkeypatch.setattr(probe, "check_function", lambda body, rows: None)


@pytest.fixture
def short_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square asks 200 times and not 5000 in AutoAttack's standard version, whose other parts stay as they are."""
    from pyautoattack.square import SquareAttack

    perturb = SquareAttack.perturb

    def short(self: SquareAttack, *batch: Tensor, **options: object) -> Tensor:
        self.n_queries = 200
        return perturb(self, *batch, **options)

    monkeypatch.setattr(SquareAttack, "perturb", short)


@pytest.fixture
def linear() -> Linear:
    """Five classes on 1x4x4 images; the bias centres the classes on grey images."""
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))
    weight = 20 * weight  # sharp, so that the ascent of CE goes for the nearest class
    return Linear(weight, -0.5 * weight.sum(1)).eval()


@pytest.fixture
def grey() -> Images:
    """40 images near grey (0.3 to 0.7, so that the box never binds at eps 0.1), labelled by the `linear` network."""
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(77, 178, (40, *SHAPE), generator=generator, dtype=torch.uint8)
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))
    labels = (weight @ (pixels.flatten(1).float().T / 255 - 0.5)).argmax(0)
    return as_images(pixels, labels, classes=list("abcde"), name="grey")


WATERFALL = {
    "AA as published": {"name": "aa-published", "fab": "untargeted", "hand_back": "clean"},
    "never the clean image back": {"name": "aa-published", "fab": "untargeted", "hand_back": "best"},
    "PGD as published": {"name": "pgd-published", "keep": "last", "redraw": 0, "draws": 0},
    "fresh noise at every step": {"name": "pgd-published", "draws": 0},
    "torchattacks' own PGDRS": {"name": "torchattacks-pgdrs"},
}


def does(experiment: str, trial: str) -> dict[str, object]:
    """What such a trial of the plan does, as far as its role depends on it, as a record has it."""
    if experiment == "T1":
        return {"draws": int(trial.removeprefix("m="))}
    if experiment == "T3":
        steps, restarts = re.search(r"T=(\d+)", trial), re.search(r"(\d+) restarts", trial)
        return {"steps": int(steps[1]) if steps else 1, "restarts": int(restarts[1]) if restarts else 1}
    return WATERFALL.get(trial, {}) if experiment == "T15" else {}


@pytest.fixture(name="does", scope="session")
def _does():
    return does


def worst_margin(network: Linear, images: Tensor, labels: Tensor, norm: str, eps: float) -> Tensor:
    """Closed form: the least of (w_y - w_k).x + b_y - b_k - eps |w_y - w_k|_dual over k != y, (B,)."""
    weight, logits = network.linear.weight.detach(), network(images).detach()
    gap = weight[labels][:, None] - weight[None]
    dual = gap.abs().sum(2) if norm == "linf" else gap.norm(dim=2)
    margins = logits.gather(1, labels[:, None]) - logits - eps * dual
    return margins.scatter(1, labels[:, None], torch.inf).min(1).values


@pytest.fixture(name="worst_margin")
def _worst_margin():
    return worst_margin
