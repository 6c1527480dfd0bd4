"""Published networks other than ResNet-18: each family's own module, with its key names, against what import makes of it.

The modules are written from the papers and the key tables (sources S2.7 to S2.16, S4.1); sizes are small, keys and shapes of
one block are those of the real files.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from rush_bench.cli import main
from rush_bench.defenses import load_defense
from rush_bench.defenses.published import import_checkpoint
from rush_bench.defenses.published.families import recognise
from rush_bench.defenses.published.importing import renamed
from rush_bench.defenses.published.normalisation import parse
from rush_bench.defenses.published.shapes import spec_of
from rush_bench.errors import BadInput
from rush_bench.networks import NETWORKS
from rush_bench.noise import Stream

Tensors = dict[str, Tensor]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRE = (0.4914, 0.4822, 0.4465)


def conv(a: int, b: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, kernel // 2 if padding is None else padding, bias=False)


class Constants(nn.Module):
    """(x - mean) / std, with buffers of those names and shape, or with none."""

    def __init__(self, mean: tuple, std: tuple, names: tuple[str, str] = ("mean", "std"), shape: tuple = (3,)) -> None:
        super().__init__()
        self.pair = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        if names[0]:
            for name, value in zip(names, self.pair, strict=True):
                self.register_buffer(name, value.reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.pair[0]) / self.pair[1]


class TradesUnit(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), conv(a, b, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), conv(b, b)
        self.convShortcut = conv(a, b, 1, stride) if a != b else None

    def forward(self, x: Tensor) -> Tensor:
        ready = self.bn1(x).relu()
        way = x if self.convShortcut is None else self.convShortcut(ready)
        return way + self.conv2(self.bn2(self.conv1(ready)).relu())


class Trades(nn.Module):
    """WideResNet as TRADES saves it: sub_block1 is there and takes no part."""

    def __init__(self, units: int = 2, k: int = 2, head: str = "fc", classes: int = 10) -> None:
        super().__init__()
        self.conv1, widths = conv(3, 16), [16, 16 * k, 32 * k, 64 * k]
        for name, stage in (("block1", 1), ("sub_block1", 1), ("block2", 2), ("block3", 3)):
            a, b = widths[stage - 1], widths[stage]
            block = nn.Module()
            block.layer = nn.Sequential(
                *(TradesUnit(a if i == 0 else b, b, 2 if stage > 1 and i == 0 else 1) for i in range(units))
            )
            self.add_module(name, block)
        self.bn1, self.head = nn.BatchNorm2d(widths[3]), head
        self.add_module(head, nn.Linear(widths[3], classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block.layer(x)
        return self.get_submodule(self.head)(F.adaptive_avg_pool2d(self.bn1(x).relu(), 1).flatten(1))


class PlainUnit(nn.Module):
    """A block after He et al. 2016: of two convolutions, or a bottleneck; `way` is the name of its shortcut."""

    def __init__(self, a: int, b: int, stride: int, way: str, deep: bool) -> None:
        super().__init__()
        m = b // 4 if deep else b
        self.conv1, self.bn1 = conv(a, m, 1 if deep else 3, 1 if deep else stride), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = conv(m, m, 3, stride if deep else 1), nn.BatchNorm2d(m)
        if deep:
            self.conv3, self.bn3 = conv(m, b, 1), nn.BatchNorm2d(b)
        self.deep, self.way = deep, way
        if stride > 1 or a != b:
            self.add_module(way, nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = self.bn3(self.conv3(y.relu())) if self.deep else y
        return (y + (getattr(self, self.way)(x) if hasattr(self, self.way) else x)).relu()


class Plain(nn.Module):
    """Cohen's ResNet-6n+2 (three stages, `downsample`, `fc`) and MadryLab's (four, `shortcut`, `linear`)."""

    def __init__(self, blocks: tuple[int, ...], width: int, way: str, head: str, deep: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.head, self.count = conv(3, width), nn.BatchNorm2d(width), head, len(blocks)
        a = width
        for stage, units in enumerate(blocks):
            b = width * 2**stage * (4 if deep else 1)
            made = [PlainUnit(a if i == 0 else b, b, 2 if stage and i == 0 else 1, way, deep) for i in range(units)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            a = b
        self.add_module(head, nn.Linear(a, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in range(self.count):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.get_submodule(self.head)(x.mean((2, 3)))


class V2Unit(nn.Module):
    def __init__(self, a: int, b: int, stride: int, norm: bool) -> None:
        super().__init__()
        m = b // 4
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(a, m, 1), nn.BatchNorm2d(m), conv(m, m, 3, stride), nn.BatchNorm2d(m)
        self.conv3, self.bn0 = conv(m, b, 1), nn.BatchNorm2d(a)
        way = [conv(a, b, 1, stride), nn.BatchNorm2d(b)][: 2 if norm else 1]
        self.shortcut = nn.Sequential(*(way if stride > 1 or a != b else []))

    def forward(self, x: Tensor) -> Tensor:
        ready = self.bn0(x).relu()
        y = self.bn2(self.conv2(self.bn1(self.conv1(ready)).relu())).relu()
        return self.conv3(y) + (self.shortcut(ready) if len(self.shortcut) else x)


class V2(nn.Module):
    """Chen 2020b's; its repository has it with and without BatchNorm after the stem and in the shortcuts."""

    def __init__(self, norm: bool, blocks: tuple[int, ...] = (2, 1, 1, 1), width: int = 8) -> None:
        super().__init__()
        self.conv1 = conv(3, width)
        if norm:
            self.bn1 = nn.BatchNorm2d(width)
        self.norm, a = norm, width
        for stage, units in enumerate(blocks):
            b = width * 2**stage * 4
            made = [V2Unit(a if i == 0 else b, b, 2 if stage and i == 0 else 1, norm) for i in range(units)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            a = b
        self.linear = nn.Linear(a, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu() if self.norm else self.conv1(x)
        return self.linear(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def stretched(x: Tensor, stride: int) -> Tensor:
    return F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


class JaxUnit(nn.Module):
    """deepmind-research's units: `wide` ones name their convolutions conv_0 and conv_1 and have a 1x1 shortcut."""

    def __init__(self, a: int, b: int, stride: int, wide: bool) -> None:
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
        self.names, self.stride, self.wide = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2"), stride, wide
        self.add_module(self.names[0], conv(a, b, 3, stride, padding=0))
        self.add_module(self.names[1], conv(b, b))
        if a != b:
            self.shortcut = conv(a, b, 1, stride) if wide else conv(a, b, 3, stride, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        ready = F.silu(self.batchnorm_0(x))
        first, second = (self.get_submodule(name) for name in self.names)
        y = second(F.silu(self.batchnorm_1(first(stretched(ready, self.stride)))))
        if not hasattr(self, "shortcut"):
            return x + y
        return y + (self.shortcut(ready) if self.wide else self.shortcut(stretched(x, self.stride)))


class Jax(nn.Module):
    def __init__(self, wide: bool, classes: int = 10) -> None:
        super().__init__()
        stem, widths = (16, (32, 64, 128)) if wide else (8, (8, 16, 32, 64))
        self.add_module("init_conv" if wide else "conv_2d", conv(3, stem))
        self.stem, stages, a = "init_conv" if wide else "conv_2d", [], stem
        for stage, b in enumerate(widths):
            units = [JaxUnit(a if i == 0 else b, b, 2 if stage and i == 0 else 1, wide) for i in range(2)]
            stages.append(nn.Sequential(*units))
            a = b
        if wide:
            self.layer = nn.Sequential(*(nn.ModuleDict({"block": block}) for block in stages))
        else:
            for number, block in enumerate(stages):
                self.add_module(f"layer_{number}", block)
        self.stages = stages  # a list: registered above, under the names of the file
        self.batchnorm, self.logits = nn.BatchNorm2d(a), nn.Linear(a, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule(self.stem)(x)
        for block in self.stages:
            x = block(x)
        return self.logits(F.silu(self.batchnorm(x)).mean((2, 3)))


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Its BatchNorms as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return net.eval()


def family(name: str, classes: int = 10) -> tuple[nn.Module, object, str]:
    """The network, what its file holds, and the data set."""
    if name.startswith("trades"):
        net = trained(Trades(head="linear" if name == "trades-linear" else "fc"))
        return net, net.state_dict(), "cifar10"
    if name.startswith(("cohen", "smoothadv")):
        std = (1.0, 1.0, 1.0) if name == "smoothadv" else (0.2023, 0.1994, 0.2010)
        net = nn.Sequential(Constants(CENTRE, std, ("", "")), Plain((2, 2, 2), 16, "downsample", "fc"))
        trained(net)
        return net, {"epoch": 90, "arch": "cifar_resnet110", "state_dict": net.state_dict(), "optimizer": {}}, "cifar10"
    if name.startswith("chen"):
        net = trained(nn.Sequential(Constants(*IMAGENET), V2(norm=name != "chen-plain")))
        held = net[1].state_dict() if name == "chen-bare" else net.state_dict()
        return net, {"epoch": 1, "state_dict": held, "best_prec1": torch.tensor(80.0)}, "cifar10"
    if name.startswith("rebuffi"):
        cifar100 = name.endswith("100")
        mean, std = (CENTRE, (0.2471, 0.2435, 0.2616))
        if cifar100:
            mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        inner = trained(Jax("wrn" in name, 100 if cifar100 else 10))
        return nn.Sequential(Constants(mean, std, ("", "")), inner), inner.state_dict(), "cifar100" if cifar100 else "cifar10"
    assert name == "madry"
    net = nn.Module()
    net.normalizer = Constants(CENTRE, (0.2023, 0.1994, 0.2010), ("new_mean", "new_std"), (3, 1, 1))
    net.model = trained(Plain((2, 1, 1, 1), 8, "shortcut", "linear", deep=True))
    net.attacker = nn.ModuleDict({"normalize": net.normalizer, "model": net.model})
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    return nn.Sequential(net.normalizer, net.model), {"model": state, "epoch": 149}, "cifar10"


# name: (recipe, options of import, architecture, protocol)
CASES = {
    "trades": ("trades", {}, "wrn", "supervised"),
    "trades-linear": ("rcs", {"recipe": "rcs"}, "wrn", "supervised"),
    "cohen": ("cohen", {"recipe": "cohen", "noise": "gaussian:0.25"}, "resnet", "supervised"),
    "smoothadv": ("smoothadv", {"recipe": "smoothadv", "noise": "gaussian:0.12"}, "resnet", "supervised"),
    "chen": ("ssp", {}, "resnet50v2", "AFF"),
    "chen-plain": ("ssp", {}, "resnet50v2", "AFF"),
    "chen-bare": ("ssp", {}, "resnet50v2", "AFF"),
    "rebuffi": ("dataaug", {}, "preact-resnet", "supervised"),
    "rebuffi-100": ("dataaug", {}, "preact-resnet", "supervised"),
    "rebuffi-wrn": ("dataaug", {"extra_data": "1M of DDPM"}, "wrn", "supervised"),
    "madry": ("pgd_at", {}, None, "supervised"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_imported_network_predicts_as_the_original(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, options, architecture, protocol = CASES[name]
    net, held, dataset = family(name)
    if name == "madry":  # a small bottleneck has no name of its own among the networks; the real one is resnet50
        monkeypatch.setitem(NETWORKS, "small", {"blocks": [2, 1, 1, 1], "width": 8, "block": "bottleneck"})
        architecture = "small"
    torch.save(held, tmp_path / "file.pt")
    card = import_checkpoint(tmp_path / "file.pt", "mine", dataset=dataset, store=tmp_path / "models", **options).card
    assert (card["recipe"], card["network"]["name"], card["protocol"]) == (recipe, architecture, protocol)
    assert card["pretrain_dataset"] == ("cifar10" if recipe == "ssp" else None)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(images)
    assert expected.std(0).min() > 1e-2, "the reference must depend on the image"
    defense = load_defense("mine" if card["noise"] is None else "mine@1", store=tmp_path / "models").base()
    found = defense.predict(images, Stream(0, "test")).probabilities
    assert torch.allclose(found, expected.softmax(1), atol=1e-5)
    assert torch.allclose(defense.as_module(Stream(0, "test"))(images), expected.log_softmax(1), atol=1e-4)


@pytest.mark.parametrize("name", ["trades", "cohen", "chen", "rebuffi", "rebuffi-wrn"])
def test_files_that_are_not_whole(name: str, tmp_path: Path) -> None:
    _, held, dataset = family(name)
    state = dict(held.get("state_dict", held))
    last = [key for key in state if key.endswith(("bn1.running_var", "batchnorm_1.running_var"))][-1]
    file = tmp_path / "file.pt"
    options = {"dataset": dataset, "store": tmp_path / "models", **CASES[name][1]}
    torch.save({key: value for key, value in state.items() if key != last}, file)
    with pytest.raises(BadInput, match="1 missing"):
        import_checkpoint(file, "mine", **options)
    stray = ("1." if name in ("cohen", "chen") else "") + "se.weight"
    torch.save(state | {stray: torch.ones(2)}, file)
    with pytest.raises(BadInput, match=r"1 not accounted for \(encoder\.se\.weight\)"):
        import_checkpoint(file, "mine", **options)
    assert not (tmp_path / "models").exists()


def real(name: str) -> Tensors:
    """Keys and shapes of the published files, without their numbers."""
    with torch.device("meta"):
        if name == "resnet110":
            net: nn.Module = nn.Sequential(nn.Identity(), Plain((18, 18, 18), 16, "downsample", "fc"))
        elif name == "resnet50":
            net = nn.ModuleDict({"model": Plain((3, 4, 6, 3), 64, "shortcut", "linear", deep=True), "attacker": nn.Identity()})
            net.normalizer = nn.BatchNorm2d(3)
            net.normalizer.register_buffer("new_mean", torch.zeros(3, 1, 1))
        elif name == "resnet50v2":
            net = nn.Sequential(nn.Identity(), V2(True, (3, 4, 6, 3), 64))
        else:
            depth, k = map(int, name.split("-")[1:])
            net = Trades((depth - 4) // 6, k)
    return net.state_dict()


@pytest.mark.parametrize("name", ["resnet110", "resnet50", "resnet50v2", "wrn-34-10", "wrn-28-10", "wrn-70-16"])
def test_the_published_sizes_are_known_by_name(name: str) -> None:
    """S4.1's signatures: a stem of 16 x 3 x 3 x 3 and a head of 10 x 64 in Cohen's, `block1.layer.0.bn1` in TRADES'."""
    state = real(name)
    found = recognise(state)
    own = {k.removeprefix(found.prefix): v for k, v in state.items() if not re.match(found.ignorable, k)}
    own = {k: v for k, v in own.items() if not k.startswith(("fc.", "linear.", "normalizer."))}
    assert spec_of(renamed(own, found), {**found.network, "classes": 10})["name"] == name
    if name == "resnet110":
        assert state["1.conv1.weight"].shape == (16, 3, 3, 3) and state["1.fc.weight"].shape == (10, 64)


def test_noise_must_be_told_and_makes_rows_with_votes(tmp_path: Path) -> None:
    _, held, _ = family("cohen")
    folder = tmp_path / "resnet110" / "noise_0.25"
    folder.mkdir(parents=True)
    file, store = folder / "checkpoint.pth.tar", tmp_path / "models"
    torch.save(held, file)
    with pytest.raises(BadInput, match=r"folder says noise_0\.25.*--noise gaussian:0\.25, or --noise none"):
        import_checkpoint(file, "mine", dataset="cifar10", store=store, recipe="cohen")
    line = ["import", str(file), "--name", "mine", "--dataset", "cifar10", "--store", str(store), "--recipe", "cohen"]
    done = CliRunner().invoke(main, [*line, "--noise", "gaussian:0.25"])
    assert done.exit_code == 0, done.output
    assert load_defense("mine@64", store=store).noise.to_dict() == {"law": "gaussian", "scale": 0.25}
    other = CliRunner().invoke(main, [*line, "--noise", "gaussian:0.5"])
    assert other.exit_code == 2 and "another model or encoder named 'mine'" in other.stderr
    card = import_checkpoint(file, "bare", dataset="cifar10", store=store, recipe="cohen", noise="none").card
    assert (card["noise"], card["votes"]) == (None, [0])


def test_an_imported_smoothed_model_is_certified(tmp_path: Path) -> None:
    import numpy as np

    net, held, _ = family("cohen")
    torch.save(held, tmp_path / "file.pt")
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(2)).numpy().astype(np.uint8)
    with torch.no_grad():
        labels = net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
    data = tmp_path / "mine.npz"
    np.savez(data, test_images=images, test_labels=labels, classes=np.array([str(k) for k in range(10)]))
    options = {"recipe": "cohen", "noise": "gaussian:0.01", "store": tmp_path / "models"}
    import_checkpoint(tmp_path / "file.pt", "mine", dataset=str(data), **options)
    line = ["certify", "mine", "--dataset", str(data), "--store", str(tmp_path / "models"), "--out", str(tmp_path / "results")]
    done = CliRunner().invoke(main, [*line, "--n", "2", "--n0", "10", "--draws", "50", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "mine" in done.output


@pytest.mark.parametrize(
    ("path", "std", "extra"),
    [
        ("cifar10/PGD_2steps/eps_64", 1.0, None),
        ("cifar10/finetune_cifar_from_imagenet_PGD2steps/eps_64", 0.2023, "ImageNet"),
        ("cifar10/self_training/eps_64", 0.2023, "500k Tiny Images"),
    ],
)
def test_smoothadv_is_normalised_by_its_path(path: str, std: float, extra: str | None, tmp_path: Path) -> None:
    """S4.1: runs that start from ImageNet or use unlabelled images have Cohen's layer, all others centre only."""
    _, held, _ = family("smoothadv")
    folder = tmp_path / path
    folder.mkdir(parents=True)
    file = folder / "checkpoint.pth.tar"
    torch.save(held, file)
    options = {"dataset": "cifar10", "store": tmp_path / "models", "noise": "gaussian:0.12"}
    with pytest.raises(BadInput, match=r"say --recipe cohen, smoothadv"):
        import_checkpoint(file, "mine", **options)
    done = import_checkpoint(file, "mine", recipe="smoothadv", **options)
    assert done.card["network"]["std"][0] == std and done.card["network"]["mean"] == list(CENTRE)
    assert extra is None if done.card["extra_data"] is None else extra in done.card["extra_data"]
    assert any("normalisation is not in the file" in note and "--normalise" in note for note in done.notes)
    said = import_checkpoint(file, "said", recipe="smoothadv", normalise="imagenet", **options)
    assert said.card["network"]["mean"] == list(IMAGENET[0])
    assert not any("normalisation is not in the file" in note for note in said.notes)


def test_what_normalise_takes(tmp_path: Path) -> None:
    assert parse("none") == ((), ()) and parse("halves") == ((0.5,) * 3, (0.5,) * 3)
    assert parse("0.1,0.2,0.3/1,2,4") == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    net, held, _ = family("trades")
    torch.save(held, tmp_path / "wrn.pt")
    torch.save(family("chen")[1], tmp_path / "chen.pt")

    def attempt(file: str, how: str, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            import_checkpoint(tmp_path / file, "mine", dataset="cifar10", store=tmp_path / "models", normalise=how)

    attempt("wrn.pt", "imagnet", "did you mean 'imagenet'")
    attempt("wrn.pt", "0.4,0.4/0.2,0.2,0.2", "give one of each a channel")
    attempt("wrn.pt", "125,123,114/63,62,67", r"not for images in \[0,1\]")
    attempt("wrn.pt", "0,0,0/0.2,0.2,0.2", r"not for images in \[0,1\]")  # twice normalised, or never centred
    attempt("wrn.pt", "0.5,a,0.5/1,1,1", "not a number")
    attempt("chen.pt", "cifar10", "leave --normalise out")
    card = import_checkpoint(tmp_path / "wrn.pt", "m", dataset="cifar10", store=tmp_path / "models", normalise="halves").card
    assert card["network"]["mean"] == [0.5] * 3 and not any("no normalisation" in note for note in card["notes"])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(2 * images - 1).softmax(1)
    found = load_defense("m", store=tmp_path / "models").predict(images, Stream(0, "test")).probabilities
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_that_answers_rotations_is_no_classifier(tmp_path: Path) -> None:
    net, held, _ = family("chen")
    with torch.no_grad():
        net[1].linear.weight[4:], net[1].linear.bias[4:] = 0, 0
    state = {key: value[:4] if key.startswith("1.linear.") else value for key, value in held["state_dict"].items()}
    torch.save(state, tmp_path / "rotation.pt")
    options = {"dataset": "cifar10", "store": tmp_path / "models"}
    with pytest.raises(BadInput, match=r"no classifier in this file; .*--as encoder.*--head"):
        import_checkpoint(tmp_path / "rotation.pt", "mine", **options)
    torch.save(net[1].linear.state_dict(), tmp_path / "head.pt")
    card = import_checkpoint(tmp_path / "rotation.pt", "mine", head=tmp_path / "head.pt", protocol="SLF", **options).card
    assert (card["network"]["classes"], card["protocol"]) == (10, "SLF")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).softmax(1)
    found = load_defense("mine", store=tmp_path / "models").predict(images, Stream(0, "test")).probabilities
    assert torch.allclose(found, expected, atol=1e-5)


def test_routes_of_a_wide_network(tmp_path: Path) -> None:
    """RCS's WideResNets have `bn_list` as its ResNets do."""
    net = trained(Trades())
    state: Tensors = {}
    for key, value in net.state_dict().items():
        if match := re.match(r"(.*bn\d)\.(\w+)$", key):
            for k in (0, 1):
                state[f"{match[1]}.bn_list.{k}.{match[2]}"] = value + (1 - k) * (0.5 if value.is_floating_point() else 1)
        else:
            state[key] = value
    torch.save({"state_dict": state}, tmp_path / "file.pt")
    done = import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", store=tmp_path / "models", recipe="rcs")
    assert (done.card["source"]["bn_route"], done.card["source"]["routes"]) == (1, 2)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).softmax(1)
    found = load_defense("mine", store=tmp_path / "models").predict(images, Stream(0, "test")).probabilities
    assert torch.allclose(found, expected, atol=1e-5)
