"""A row says whether the gradients under it were true, which settings were changed and which columns ran."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite
from rush_bench.datasets import Images
from rush_bench.evaluation import runner
from rush_bench.records import Cell, CellStore
from rush_bench.report.layout import best
from rush_bench.report.rows import rows
from rush_bench.report.table import of_frame

pytestmark = pytest.mark.strangers

SHAPE, COUNT = (1, 4, 4), 12
RESULTS = Path(__file__).parents[2] / "results"


class Rounded(nn.Module):
    """Seven grey levels: no gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 7).round() / 7)


class Detached(Rounded):
    """A quarter of the image passes no gradient on."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.cat([x[..., :2], x[..., 2:].detach()], -1))


class Clamped(Rounded):
    """Its own clamp: at 0 and 1 there is no gradient where torch's clamp has none at its edge."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.where((x > 0) & (x < 1), x, x.detach()))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        layers[3].weight.mul_(10)
        layers[3].bias.sub_(layers(data().floats()).mean(0))
    return layers.eval()


def data() -> Images:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pixels[:, :, :1] = 0
    return Images(pixels, torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT), tuple("abcd"), "tiny", "test")


@pytest.fixture
def images() -> Images:
    with torch.no_grad():
        labels = network()(data().floats()).argmax(1)
    made = data()
    return Images(made.pixels, labels, made.index, made.classes, made.name, made.split)


def suite(**overrides: object):
    return parse_suite("linf12-quick", ("clean", "pgd", "square"), {"square.queries": 60, **overrides})


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (Rounded, "no gradient on 100% of images"),
        (Detached, "no true gradient on"),
        (Clamped, "of pixels frozen at 0 or 1"),
        (lambda network: network, ""),
    ],
    ids=["rounded", "detached", "clamped", "plain"],
)
@pytest.mark.parametrize("votes", [0, 4])
def test_a_row_without_true_gradients_is_marked_in_every_writer(wrap, says, votes, images, tmp_path) -> None:
    layers = wrap(network()).eval()
    noisy = {"noise": "uniform:0.01", "votes": votes}
    defense = rb.Smoothed(layers, shape=SHAPE, **noisy) if votes else rb.Deterministic(layers, shape=SHAPE)
    if votes and wrap is Clamped:
        pytest.skip("noise moves pixels off the edge")
    frame = rb.attack([defense], suite(), images, out=tmp_path, quiet=True).table().frame
    bounds, notes = frame["upper_bounds"][0].split(","), frame["notes"][0]
    if not says:
        assert bounds == [""] and notes == "square with queries=60 (usual 500)"
        assert "†" not in of_frame(frame).to_markdown()
        return
    assert says in notes and {"pgd", "worst"} <= set(bounds) and "square" not in bounds and "clean" not in bounds
    markdown, latex = of_frame(frame).to_markdown(), of_frame(frame).to_latex()
    assert "<sup>†</sup> an upper bound, not a measure of robustness: run audit" in markdown
    assert markdown.count("<sup>†</sup>") >= 3 and "\\textsuperscript{$\\dagger$}" in latex
    for name in ("pgd", "worst"):
        assert (0, name) not in best(frame)


def test_gradients_that_nobody_looked_at_are_unknown_not_fine(images, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(runner, "_gradients", lambda *args: {})
    frame = rb.attack([rb.Deterministic(network(), shape=SHAPE)], suite(), images, out=tmp_path, quiet=True).table().frame
    assert "pgd: gradients were not looked at" in frame["notes"][0] and frame["upper_bounds"][0] == ""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("votes", [0, 4])
def test_a_transfer_climbs_no_gradient_of_this_defence(images, tmp_path, votes, older) -> None:
    """That of its source was not looked at, then or now, and tells nothing of this one."""
    noisy = {"noise": "uniform:0.01", "votes": votes}
    defense = rb.Smoothed(network(), shape=SHAPE, **noisy) if votes else rb.Deterministic(network(), shape=SHAPE)
    given = parse_suite("linf12-quick", ("clean", "transfer"), {"transfer.steps": 2})
    run = rb.attack([defense], given, images, out=tmp_path, quiet=True)
    (cell,) = (each for each in run.results if each.labels["attack"] == "transfer")
    if older:
        for path in cell.folder.glob("chunk-*.npz"):
            with np.load(path) as file:
                np.savez(path, **{name: file[name] for name in file.files if not name.startswith("gradient_")})
    frame = rb.table(tmp_path).frame
    assert "gradients" not in frame["notes"][0] and frame["upper_bounds"][0] == ""
    (found,) = (each for each in rb.load_results(tmp_path) if each.labels["attack"] == "transfer")
    assert found.frame["backwards"].gt(0).all() and found.frame.filter(like="gradient_").isna().to_numpy().all()


def test_a_setting_that_weakens_a_column_shows(images, tmp_path) -> None:
    weak = suite(**{"pgd.steps": 1})
    frame = rb.attack(rb.Deterministic(network(), shape=SHAPE), weak, images, out=tmp_path, quiet=True).table().frame
    assert "pgd with steps=1 (usual 10)" in frame["notes"][0]
    assert frame["suite"][0] == "linf12-quick without eot, apgd"


def test_square_runs_on_what_stands(images, tmp_path) -> None:
    """The others keep the x' that broke them, and the cell is another where a column before it is."""
    run = rb.attack([rb.Deterministic(network(), shape=SHAPE)], suite(), images, out=tmp_path, quiet=True)
    cells = {result.labels["attack"]: result for result in run.results}
    store, read = CellStore(tmp_path), {}
    for name, result in cells.items():
        cell = Cell(result.identity, result.labels)
        read[name] = (store.read(cell, 0), None if name == "clean" else store.read_adversarial(cell, 0))
    broken = (read["clean"][0]["correct"] == 0) | (read["pgd"][0]["correct"] == 0)
    assert 0 < broken.sum() < COUNT
    for i in np.flatnonzero(broken & (read["clean"][0]["correct"] == 1)):
        assert np.array_equal(read["square"][1][i], read["pgd"][1][i])
    assert (read["square"][0]["correct"] <= np.minimum(read["clean"][0]["correct"], read["pgd"][0]["correct"])).all()
    assert cells["square"].identity["attack"]["of"] and "gradient_zero" not in read["square"][0]
    other = rb.attack([rb.Deterministic(network(), shape=SHAPE)], suite(**{"pgd.steps": 3}), images, out=tmp_path, quiet=True)
    assert {r.labels["attack"]: r for r in other.results}["square"].identity != cells["square"].identity


@pytest.mark.parametrize(("shift", "noted"), [(0, False), (1, True)])
def test_shifted_labels_are_noted_and_an_attack_that_takes_all_is_not(tmp_path, shift, noted) -> None:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (120, *SHAPE), generator=draw).to(torch.uint8)
    net = network()
    labels = (net(images / 255).argmax(1) + shift) % 4
    given = Images(images, labels, torch.arange(120), tuple("abcd"), "tiny", "test")
    suite = parse_suite("linf127.5-quick", only=("clean", "pgd"))
    defense = rb.Deterministic(net, shape=SHAPE, name="net")
    runner.attack([defense], suite, given, out=tmp_path, quiet=True)
    (row,) = rb.table(tmp_path).frame.to_dict("records")
    assert row["clean"] == (0 if noted else 100) and row["worst"] < 20
    assert row["notes"] == "clean: accuracy is below chance: are the labels in the order of the network's outputs?" * noted
    assert not row["upper_bounds"]


# right predictions of 100 images for each attack, and which columns are upper bounds
RIGHT = {
    "as an honest network": ({"pgd": 16, "apgd": 15, "square": 9}, 0, ""),
    "by chance": ({"pgd": 30, "apgd": 30, "square": 20}, 0, ""),
    "squashed": ({"pgd": 49, "apgd": 60, "square": 32}, 0, "pgd,apgd,worst"),
    "one attack is led astray": ({"pgd": 99, "apgd": 22}, 0, "pgd,worst"),
    "by Square": ({"pgd": 99, "apgd": 22, "square": 20}, 0, "pgd,apgd,worst"),
    "weak by choice": ({"pgd": 99, "apgd": 22, "pgd.steps": 1}, 0, ""),
    "a replay": ({"pgd-published": 90, "pgd": 40, "apgd": 40, "square": 38}, 0, ""),
    "AutoAttack finds more": ({"pgd": 40, "aa": 26}, 0, ""),
    "AutoAttack finds far more": ({"pgd": 60, "aa": 30}, 0, "pgd,worst"),
    "one draw a gradient": ({"pgd": 60, "eot": 32, "apgd": 33, "square": 30}, 1, ""),
    "no draws help": ({"pgd": 60, "eot": 58, "apgd": 57, "square": 30}, 1, "pgd,eot,apgd,worst"),
    "draws on a bank": ({"eot": 30, "aa": 70}, 1, ""),
}


@pytest.mark.parametrize("name", RIGHT)
def test_attacks_that_another_outdoes_by_far_are_upper_bounds(name, lab) -> None:
    right, votes, bounds = RIGHT[name]
    suite = "linf8" if "aa" in right else "linf8-quick"
    usual = {"pgd": {"steps": right.get("pgd.steps", 10)}} if suite == "linf8-quick" else {}
    repeats = 20 if votes else 1
    for attack, count in {**right, "worst": min(right.values())}.items():
        if "." not in attack:
            counts = repeats * (np.arange(100) < count)
            lab.cell("rush", attack, counts, repeats=repeats, votes=votes, suite=suite, settings=usual.get(attack, {}))
    (row,) = rows(lab.results())
    assert {*row.bounds} - {"worst_any10"} == {*filter(None, bounds.split(","))}
    assert any("gradients mislead" in note for note in row.notes) == bool(bounds)


@pytest.mark.parametrize("copied", [0, 4])
def test_images_that_are_there_several_times_are_noted(images, copied, tmp_path) -> None:
    """The same pixels at other positions: each counts in the interval, and the table says so."""
    pixels = images.pixels.clone()
    pixels[:copied] = pixels[copied : 2 * copied]
    run = rb.attack(
        rb.Deterministic(network(), shape=images.shape), "linf8", (pixels, images.labels), out=tmp_path, attacks="clean"
    )
    note = f"4 of {len(images)} images are copies of others: intervals are too narrow"
    assert (note in run.table().to_markdown()) == (run.table().frame.loc[0, "notes"] == note) == bool(copied)


def test_what_is_committed_is_not_marked() -> None:
    """The margins come from these rows."""
    packs = [RESULTS / f"{name}.zip" for name in ("digits", "cifar10-small", "table1-cpu", "cifar100-cpu", "control")]
    found = rows(rb.load_results(*packs))
    assert len(found) > 100 and not any(row.bounds for row in found)
