"""On a make-believe CUDA device: every attack and every recipe's steps give the numbers of the CPU and meet no mismatch of
devices, and the host waits for the device no more often than it must.

What differs by design: training on a real device draws from its own generators, and a CPU cuts draws into smaller blocks.
"""

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.suites import parse_suite
from rush_bench.audits import indicators
from rush_bench.audits.binarization import Binarization, binarization
from rush_bench.audits.experiments import BUDGETS
from rush_bench.audits.flags import flags
from rush_bench.audits.settle import settle
from rush_bench.audits.truth import truth
from rush_bench.certificates import Sampling
from rush_bench.cli import doctor
from rush_bench.datasets import Images, as_images
from rush_bench.datasets.corruptions import load_corrupted
from rush_bench.defenses import Defense, Deterministic, Randomised, Smoothed
from rush_bench.defenses.body import Body
from rush_bench.defenses.purify import Purifier
from rush_bench.devices import choose_device, has_bfloat16
from rush_bench.errors import BadInput
from rush_bench.evaluation import attack, certify, runner
from rush_bench.evaluation.corruptions import evaluate
from rush_bench.evaluation.score import score
from rush_bench.networks import build
from rush_bench.networks.classifier import ensemble
from rush_bench.networks.ddpm import UNet, linear_schedule
from rush_bench.noise import Stream
from rush_bench.registry import attacks, recipes
from rush_bench.store import read_weights
from rush_bench.threats import Threat
from rush_bench.training import loop, train
from tests.fakecuda import DEVICE_NAME, CudaTensor, Waits, fake_cuda

pytestmark = pytest.mark.strangers

SHAPE = (1, 5, 5)
THREAT = Threat("linf", 0.03)
STREAM = Stream(0, "attack", torch.arange(10, 13))
VOTES = {"deterministic": 0, "one vote": 1, "many votes": 4}
FEW = {
    "clean": {},
    "random-noise": {"points": 2},
    "pgd": {"steps": 4, "select_every": 2, "restarts": 2},
    "eot": {"steps": 4, "draws": 4, "select_draws": 8, "select_every": 2},
    "pgd-ablation": {"steps": 4, "draws": 4, "redraw": 2, "clamp": "graph", "select_every": 2},
    "pgd-published": {"steps": 2},
    "eot-apgd": {"steps": 4, "draws": 4, "select_draws": 8},
    "eot-apgd-t": {"steps": 2, "draws": 4, "select_draws": 8, "targets": 2},
    "aa": {"steps": 2, "parts": ("apgd-t", "fab-t"), "least_bank": 2},
    "apgd": {"steps": 3, "least_bank": 2},
    "aa-rand": {"steps": 2, "eot_iter": 2, "select_draws": 8},
    "aa-published": {"steps": 2, "queries": 4, "targets": 1, "select_draws": 8},
    "square": {"queries": 12, "draws": 4, "redraw": 4, "select_draws": 8},
    "transfer": {"steps": 2},
    "torchattacks-pgdrs": {"steps": 2},
    "torchattacks-aa": {"steps": 2, "queries": 5},
}


@pytest.fixture
def waits() -> Iterator[Waits]:
    """There is a device while a test runs; how often the host waited for it."""
    with fake_cuda() as waits:
        yield waits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Three classes, sharp: one image breaks within a few steps, one does not."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    with torch.no_grad():
        network[4].weight.mul_(4)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels(network: nn.Module, images: Tensor) -> Tensor:
    """Right but for the first."""
    found = network(images).argmax(1)
    found[0] = (found[0] + 1) % 3
    return found


@pytest.fixture(scope="module")
def defended(network: nn.Module) -> Callable[[str, str], Defense]:
    """A defence by its kind and device, each made once."""

    @functools.cache
    def defended(kind: str, device: str) -> Defense:
        if kind == "deterministic":
            return Deterministic(network, shape=SHAPE, device=device)
        return Smoothed(network, noise="uniform:0.1", votes=VOTES[kind], shape=SHAPE, device=device)

    return defended


def test_the_device_refuses_what_cuda_refuses_and_leaves_no_trace() -> None:
    def seen() -> tuple[object, ...]:
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        return torch.Generator, torch.autocast, torch.cuda.is_available, torch.cuda.manual_seed, torch.randn(1).device, swaps

    before = seen()
    with fake_cuda() as waits:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (str(there.device), there.is_cuda) == ("cuda:0", True) and not waits.total()
        for refused in (lambda: here + there, lambda: there[:2].copy_(here[:2]) + here[:2], lambda: torch.stack([here, there])):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().sum() == 3 and (2 * there + here.to("cuda")).tolist() == [3, 3, 3]
    assert seen() == before


@pytest.mark.parametrize(
    ("act", "kinds"),
    [
        (lambda x: x.sum() + 1, {}),
        (lambda x: torch.where(x > 0, x, 0.0), {}),
        (lambda x: x.masked_fill(x > 1, 0.0)[1:] * x[0], {}),
        (lambda x: x.index_copy(0, torch.arange(2, device=x.device), x[1:]), {}),
        (lambda x: float(x.sum()), {"_local_scalar_dense": 1}),
        (lambda x: x.sum().item() if x.any() else 0, {"_local_scalar_dense": 2}),
        (lambda x: x.nonzero(), {"nonzero": 1}),
        (lambda x: x[x > 0], {"mask as an index": 1}),
        (lambda x: x.clone().__setitem__(x > 0, 1.0), {}),
        (lambda x: x[[0, 2, 1]], {"index from the CPU": 1}),
        (lambda x: x.cpu(), {"copy": 1}),
        (lambda x: x.tolist(), {"copy": 1}),
        (lambda x: torch.zeros(3).to(x.device), {"copy": 1}),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), {}),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), {"copy": 1}),
    ],
)
def test_waits_are_counted_by_what_makes_the_host_wait(waits: Waits, act: Callable[[Tensor], object], kinds: dict) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    waits.clear()
    act(x)
    assert {kind: count for kind, count in waits.items() if count} == kinds


def test_every_attack_is_here() -> None:
    elsewhere = {"pgd-purifier"}  # below, on a purifier
    assert FEW.keys() | elsewhere == attacks.entries.keys()


@pytest.mark.parametrize("kind", VOTES)
@pytest.mark.parametrize("name", FEW)
def test_every_attack_gives_what_it_gives_on_the_cpu(name, kind, defended, images, labels) -> None:
    if name.startswith("torchattacks-"):
        pytest.importorskip("torchattacks")
    attack, found = attacks.load(name)(**FEW[name]), []
    with fake_cuda():
        found.append(_attacked(attack, defended(kind, "cuda"), images.to("cuda"), labels.to("cuda")))
    found.append(_attacked(attack, defended(kind, "cpu"), images, labels))
    (attacked, extra), (known, known_extra) = found
    assert isinstance(attacked, CudaTensor)
    assert (attacked.inner - known).abs().max() < 1e-6
    assert extra.keys() == known_extra.keys()
    assert all((extra[key] == known_extra[key]).all() for key in extra)


def _attacked(attack, defense, images, labels):
    return attack.recorded(defense, images, labels, THREAT, STREAM)


@pytest.mark.parametrize("kind", VOTES)
def test_a_prediction_makes_the_host_wait_twice_and_a_gradient_once(kind, defended, images, labels, waits) -> None:
    """A prediction: for what is wrong with the images, and with what it gives. A gradient: for what it gives."""
    defense, x, y = defended(kind, "cuda"), images.to("cuda"), labels.to("cuda")
    repeats = 3 if defense.draws else 1
    for most, call in (
        (2, lambda: defense.predict(x, STREAM)),
        (2, lambda: defense.predictions(x, STREAM, repeats, exact=False)),
        (1, lambda: defense.gradient(x, y, "ce", 3, STREAM)),
        (1, lambda: defense.gradient(x, y, "margin@logits", 3, STREAM)),
    ):
        waits.clear()
        call()
        assert waits.total() <= most


STEP, LOOK = 1, 3  # waits: of a gradient; of a look, which is a prediction and who leaves


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("pgd", {"steps": 6, "select_every": 3}, 6 * STEP + 2 * LOOK),
        ("eot", {"steps": 6, "select_every": 3, "draws": 4, "select_draws": 4}, 6 * STEP + 2 * LOOK),
        ("pgd-published", {"steps": 6}, 6 * STEP),
        ("random-noise", {"points": 5}, 5 * 2),
        ("square", {"queries": 20, "draws": 2, "redraw": 10, "select_draws": 4}, 20 * 2 + 2 + 2 * LOOK),
    ],
)
@pytest.mark.parametrize("kind", VOTES)
def test_waits_of_an_attack_are_those_of_its_steps_and_looks(name, settings, most, kind, defended, images, labels, waits):
    """Of images that do not break, as each that leaves costs the host a copy of who stays."""
    if name == "square" and kind == "deterministic":
        most = 20 * 3 + 2  # whoever is misclassified leaves at once
    defense, x, y = defended(kind, "cuda"), images[1:].to("cuda"), labels[1:].to("cuda")
    attack = attacks.load(name)(**settings)
    waits.clear()
    attack.run(defense, x, y, Threat("linf", 1e-4), Stream(0, "attack"))
    assert waits.total() <= most, waits


SMALL = ("n_train=24", "size=8", "network.name=resnet", "network.width=4")
BLOCKS = {"ssp": "1,1", "ssp_joint": "1,1"}  # as many stages as the task needs
SETS = {"advcl": ("pretrain.clusters=2,3",), "ssp": ("selfie.layers=1",), "ssp_joint": ("joint.layers=1",)}
ATTENDS = {"ssp"}  # a CPU has an attention kernel of its own, which rounds otherwise
WAITS = {"advcl": 2}  # attacks inside a step: each asks once whether its gradients were finite


def few(name: str) -> tuple[str, ...]:
    """Settings of a run of one step a stage."""
    recipe = recipes.load(name)
    known = {field.name for field in dataclasses.fields(recipe.settings)}
    steps = [f"{attack}.steps=1" for attack in ("attack", "finetune_attack") if attack in known]
    epochs = [f"{plan.name}.epochs=1" for plan in recipe.plans(recipe.settings)]
    return (*SMALL, f"network.blocks={BLOCKS.get(name, '1')}", *steps, *dict.fromkeys(epochs), *SETS.get(name, ()))


# finetune needs an encoder; the others are parts of ssp, or train in the same stages as another
ELSEWHERE = {"finetune", "ssp_rotation", "ssp_jigsaw", "ssp_selfie", "dynacl", "purify", "random_probe_frozen"}


@pytest.mark.parametrize("name", sorted(recipes.entries.keys() - ELSEWHERE))
def test_every_recipe_takes_the_steps_that_it_takes_on_the_cpu(name, tmp_path, monkeypatch) -> None:
    step, most = loop.train_step, 0

    def counted(*arguments) -> Tensor:
        nonlocal most
        waits.clear()
        loss = step(*arguments)
        most = max(most, waits.total())
        return loss

    def trained(device: str) -> dict:
        folder = train(name, dataset="digits", preset="smoke", sets=few(name), store=tmp_path / device, device=device)
        return json.loads((folder / "card.json").read_text())

    with fake_cuda() as waits, monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", counted)
        made = trained("cuda")
    known = trained("cpu")
    assert most <= WAITS.get(name, 1)
    if name in ATTENDS:
        weights = [read_weights(tmp_path / device, known["name"], "model") for device in ("cuda", "cpu")]
        assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-3 for key in weights[0])
    else:
        assert made["sha256"] == known["sha256"]
    assert (made["environment"].pop("device"), known["environment"].pop("device")) == (DEVICE_NAME, "cpu")
    assert made["environment"] == known["environment"] and made["settings"]["precision"] == "float32"


@pytest.fixture(scope="module")
def data(images: Tensor, labels: Tensor) -> Images:
    return as_images((255 * images).to(torch.uint8), labels, classes=list("abc"), name="made")


def same(made: pd.DataFrame, known: pd.DataFrame) -> None:
    """Records are equal but for the time that they took."""
    pd.testing.assert_frame_equal(*(each.drop(columns="seconds", errors="ignore") for each in (made, known)), atol=1e-5)


@contextmanager
def on(device: str) -> Iterator[None]:
    """Where there is a device only for what runs on it."""
    with fake_cuda() if device == "cuda" else nullcontext():
        yield


def test_the_measuring_loop_with_its_looks_at_gradients_and_at_behaviour(defended, data, tmp_path) -> None:
    suite = parse_suite("linf8-quick", ("clean", "pgd", "square"), {"pgd.steps": 2, "square.queries": 6})
    frames = []
    for device in ("cuda", "cpu"):
        with on(device):  # the second meets what the first wrote down of the defence's behaviour
            run = attack(defended("one vote", device), suite, data, out=tmp_path, repeats=3, quiet=True)
        assert not run.failed
        frames.append([result.frame for result in run.results])
        if device == "cuda":
            with np.load(next((tmp_path / "runs").rglob("chunk-*.npz"))) as chunk:
                assert str(chunk["made_on"]) == f"{DEVICE_NAME}, torch {torch.__version__}, search in float32"
            shutil.rmtree(tmp_path / "runs")
    for made, known in zip(*frames, strict=True):
        same(made, known)


def test_certificates(network, data, tmp_path) -> None:
    settings, frames = Sampling(selection=4, draws=30), []
    for device in ("cuda", "cpu"):
        with on(device):
            defense = Smoothed(network, noise="gaussian:0.25", votes=4, shape=SHAPE, device=device)
            run = certify([defense], data, settings=settings, out=tmp_path / device, quiet=True)
        assert not run.failed
        frames.append(run.results[0].frame)
    same(*frames)


def test_corruptions(defended, tmp_path) -> None:
    folder, n = tmp_path / "data" / "CIFAR-10-C", 6
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5 * n, 32, 32, 3), np.uint8)
    np.save(folder / "fog.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(n), 5))
    data, frames = load_corrupted("cifar10", ("fog",), data_dir=tmp_path / "data"), []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    for device in ("cuda", "cpu"):
        with on(device):
            run = evaluate([Deterministic(network, device=device)], data, out=tmp_path / device, quiet=True)
        assert not run.failed
        frames.append([result.frame for result in run.results])
    for made, known in zip(*frames, strict=True):
        same(made, known)


def test_probes_of_the_audit(defended, images, labels, monkeypatch) -> None:
    monkeypatch.setattr(indicators, "BOUNDLESS", (2, 0.5))
    stream = STREAM.at(torch.arange(2))
    easy, short = Binarization(inner=6, draws=2, judging=4, points=2), EOTAPGD(steps=1, draws=2, select_draws=2)
    found = []
    for device in ("cuda", "cpu"):
        with on(device):
            defense, x, y = defended("one vote", device), images[:2].to(device), labels[:2].to(device)
            findings = [
                *flags(defense, x, y, THREAT, stream),
                *truth(defense, x, y, THREAT, stream, calls=2),
                *indicators.indicators(defense, x, y, THREAT, stream, steps=2, draws=2, held=2, neighbours=2),
                *binarization(defense, x[:1], THREAT, stream.at(torch.arange(1)), attack=short, settings=easy),
            ]
        found.append([(each.check, each.status, each.figure and round(each.figure, 4)) for each in findings])
    assert found[0] == found[1]


def test_settle(defended, data, tmp_path, monkeypatch) -> None:
    """Itself, a bank, certified, without noise: forms of a defence; every attack and the looks at gradients are above."""
    monkeypatch.setattr(runner, "_gradients", lambda *of: {})
    budget = dataclasses.replace(BUDGETS["quick"], points=2, steps=1, draws=2, banks=(2,), part_steps=1, certificate=20)
    found = []
    for device in ("cuda", "cpu"):
        with on(device):
            where = {"out": tmp_path / device, "store": tmp_path / "models", "quiet": True, "only": ("T0", "T6", "T12", "T16")}
            run = settle([defended("many votes", device)], data, budget=budget, eps=0.03, repeats=2, **where)
        assert not run.failed
        found.append({(each.experiment, each.trial): each.result.frame for each in run.evidence[0].entries})
    assert found[0].keys() == found[1].keys()
    for key, frame in found[0].items():
        same(frame, found[1][key])


def test_the_judge_computes_in_full_precision_and_leaves_what_was_set(defended, images, labels, monkeypatch) -> None:
    """A7: cuDNN's convolutions take TF32 unless they are told. What the search uses is the user's business."""
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    outputs_of = Body.outputs_of

    def noted(self: Body, network: nn.Module, rows: Tensor, *layout: torch.memory_format) -> object:
        seen[network is self.network].add(conv.fp32_precision)
        return outputs_of(self, network, rows, *layout)

    try:
        conv.fp32_precision = "tf32"
        with fake_cuda():
            defense = defended("one vote", "cuda")
            assert defense.body.search is not defense.body.network
            monkeypatch.setattr(Body, "outputs_of", noted)
            score(defense, images.to("cuda"), labels.to("cuda"), STREAM.images, Stream(0, "score"), 2)
            defense.gradient(images.to("cuda"), labels.to("cuda"), "ce", 1, STREAM)
        assert seen == {True: {"ieee"}, False: {"tf32"}}
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before


def test_doctor_and_choices_by_the_device() -> None:
    with fake_cuda():
        assert [check.what for check in doctor.devices()][:2] == ["cpu", "cuda:0"]
        assert DEVICE_NAME in doctor.devices()[1].finding
        assert choose_device("auto").type == "cuda" and has_bfloat16(choose_device("cuda:0"))


def test_a_device_that_cannot_be_used_says_why(monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nMore lines")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BadInput, match=r"'cuda' cannot be used here \(CUDA out of memory\); --device auto takes what there is"):
        choose_device("cuda")


def test_an_ensemble_and_a_purifier(labels) -> None:
    shape = (1, 8, 8)
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    spec = {"name": "resnet", "blocks": [1], "width": 4, "classes": 5, "channels": 1, "size": 8}
    members = [build(spec, seed=seed) for seed in (1, 2)]
    both = ensemble(members, {"name": "ensemble", "members": [spec, spec]}).eval()
    chain = Purifier(UNet(1, 4, (1, 1)), linear_schedule(100), start=20, steps=2)
    found = []
    for device in ("cuda", "cpu"):
        with on(device):
            x, y, chained = images.to(device), labels.to(device), copy.deepcopy(chain).to(device)
            joint = Deterministic(both, shape=shape, device=device)
            purified = Randomised(members[0].eval(), transform=chained, shape=shape, device=device)
            attacked = [attacks.load("pgd")(steps=1).run(joint, x, y, THREAT, STREAM)]
            for surrogate in ("exact", "adjoint", "bpda"):
                by = attacks.load("pgd-purifier")(steps=1, surrogate=surrogate, states=float(surrogate == "exact"))
                attacked.append(by.run(purified, x, y, THREAT, STREAM))
        found.append([each.inner if device == "cuda" else each for each in attacked])
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(*found, strict=True))
