"""Files of encoders: the key sets that the authors' classes make, small, against the features of those very classes."""

import argparse
import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.defenses.published import import_checkpoint, recognise
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.store import ENCODERS, model_names, read_weights
from rush_bench.training import train
from tests.defenses.narrow import Narrow

Tensors = dict[str, Tensor]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
SOLO = ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def trained(net: nn.Module) -> nn.Module:
    """BatchNorm as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return net.eval()


def resnet(stem: str = "cifar", padding: int = 1) -> nn.Module:
    """torchvision's ResNet with a block in each stage, 64 features; fc is left out as all of these classes do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Narrow((1, 1, 1, 1), stem=stem, padding=padding)
    net.fc = nn.Identity()
    return trained(net)


class Lightly(nn.Module):
    """lightly's own ResNet, of whose children its benchmarks make a Sequential: ReLU is functional, so the stem loses it."""

    class Block(nn.Module):
        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
            self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
            way = [nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)] if stride > 1 or a != b else []
            self.shortcut = nn.Sequential(*way)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + self.shortcut(x))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for stage in range(4):
            a, b = width * 2 ** max(0, stage - 1), width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(self.Block(a, b, 2 if stage else 1)))
        self.linear = nn.Linear(8 * width, 10)


def prefixed(prefix: str, net: nn.Module) -> Tensors:
    return {f"{prefix}{key}": value.clone() for key, value in net.state_dict().items()}


def mlp(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def dialect(name: str) -> tuple[nn.Module, object, tuple, dict]:
    """The encoder, what its file holds, what it does to its inputs, and what import must be told."""
    said = {"recipe": "simclr"}
    if name.startswith(("deacl", "solo")):
        net = resnet(padding=2)
        state = prefixed("encoder." if name == "solo-old" else "backbone.", net) | prefixed("classifier.", nn.Linear(64, 10))
        if name.startswith("deacl"):  # solo/methods/base_for_adversarial_training.py; its ResNet-18 normalises inside
            state |= prefixed("classifier_adv.", nn.Linear(64, 10)) | prefixed("momentum_backbone.", net)
            if name == "deacl":
                for which in ("backbone", "momentum_backbone"):
                    state |= {
                        f"{which}.normalize.{key}": torch.tensor(v) for key, v in zip(("mean", "std"), CIFAR, strict=True)
                    }
            return net, {"state_dict": state, "epoch": 99, "hyper_parameters": argparse.Namespace(lr=0.5)}, CIFAR, {}
        state |= prefixed("projector.", mlp(64, 256, 32))
        if name == "solo-moco":
            state |= prefixed("momentum_backbone.", net) | prefixed("momentum_projector.", mlp(64, 256, 32))
            state |= {"queue": torch.ones(2, 32, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
            said = {"recipe": "mocov2plus"}
        return net, {"state_dict": state, "pytorch-lightning_version": "2.0"}, SOLO, said
    if name == "lightly-own":  # docs/source/getting_started/benchmarks/cifar10_benchmark.py
        backbone = nn.Sequential(*list(trained(Lightly()).children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    elif name == "lightly-named":  # benchmarks/imagenet/resnet50
        net = resnet("imagenet")
        state = prefixed("backbone.", net) | prefixed("projection_head.layers.", mlp(64, 128))
        return net, {"state_dict": state | prefixed("online_classifier.linear.", nn.Linear(64, 10))}, IMAGENET, said
    elif name.startswith("lightly"):  # examples/pytorch_lightning
        net = resnet("imagenet" if name == "lightly" else "cifar")
        backbone = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
    else:  # torchvision and timm: a bare state dict
        net = resnet("imagenet" if name == "torchvision" else "cifar")
        state = net.state_dict() | prefixed("fc.", nn.Linear(64, 10))
        return net, state, IMAGENET, {"recipe": "standard", "normalise": "imagenet", "network": "resnet,size=64"}
    state = prefixed("backbone.", backbone) | prefixed("projection_head.layers.", mlp(64, 128))
    state |= prefixed("backbone_momentum.", copy.deepcopy(backbone))
    return backbone, {"state_dict": state}, IMAGENET, said


DIALECTS = ["deacl", "deacl-50", "solo", "solo-old", "solo-moco", "lightly", "lightly-cifar", "lightly-own", "lightly-named"]
DIALECTS += ["torchvision", "timm-cifar"]


@pytest.mark.parametrize("name", DIALECTS)
def test_an_imported_encoder_gives_the_features_of_the_original(name: str, tmp_path: Path) -> None:
    net, held, (mean, std), said = dialect(name)
    file = tmp_path / "file.ckpt"
    torch.save(held, file)
    done = import_checkpoint(file, "mine", as_="encoder", dataset="cifar10", store=tmp_path / "models", **said)
    assert done.folder == tmp_path / "models" / ENCODERS / "mine" and model_names(tmp_path / "models") == []
    assert any("has no head" in note for note in done.notes)
    network = build(done.card["network"]).eval()
    weights = read_weights(done.folder.parent, "mine")
    assert all(key.startswith("encoder.") for key in weights)
    network.load_state_dict(network.state_dict() | weights)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = net((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        assert torch.allclose(network.encoder(images), expected, atol=1e-5)
    assert expected.std(0).max() > 1e-2, "the reference must depend on the image"


@pytest.mark.parametrize("name", ["deacl", "solo", "lightly-own", "timm-cifar"])
@pytest.mark.parametrize(("how", "says"), [("missing", "1 missing"), ("extra", r"1 not accounted for \(encoder\.(se|extra)")])
def test_damaged_and_foreign_ones_get_one_line(name: str, how: str, says: str, tmp_path: Path) -> None:
    _, held, _, said = dialect(name)
    state = dict(held.get("state_dict", held))
    last = [key for key in state if key.endswith("bn1.running_var") and "momentum" not in key][-1]
    if how == "missing":
        del state[last]
    else:
        state[last.replace("running_var", "gain").replace("bn1", "se")] = torch.ones(3)
        state = {key.replace("layer4.0.se", "se").replace("5.0.se", "se"): value for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "file.ckpt")
    with pytest.raises(BadInput, match=says) as caught:
        import_checkpoint(tmp_path / "file.ckpt", "mine", as_="encoder", dataset="cifar10", store=tmp_path / "models", **said)
    assert "\n" not in str(caught.value) and not (tmp_path / "models").exists()


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    _, held, _, said = dialect("timm-cifar")
    torch.save(held, tmp_path / "file.pt")

    def attempt(says: str, **options: object) -> None:
        with pytest.raises(BadInput, match=says):
            import_checkpoint(
                tmp_path / "file.pt", "mine", **({"dataset": "cifar10", "store": tmp_path / "m", **said} | options)
            )

    attempt("does not say how it was trained.*--recipe standard", recipe=None)
    attempt("states no normalisation, and of standard it is not known", normalise=None)
    attempt("--network resnet18: the file's tensors are those of resnet, blocks", network="resnet18")
    attempt("did you mean 'resnet18'", network="resnet17")
    attempt("no tensor's shape tells", network="resnet,width=4")
    attempt("--noise is for a model", as_="encoder", noise="gaussian:0.25")
    attempt("was trained under", recipe="cohen")
    assert recognise(["backbone.conv1.weight", "classifier.weight"]).choose
    assert not recognise(["backbone.conv1.weight", "classifier_adv.weight"]).choose


def test_a_head_on_a_foreign_encoder(tmp_path: Path) -> None:
    """RUSH's second stage on somebody else's SimCLR is one command, with its file."""
    net = trained(Lightly(4))
    backbone = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))
    torch.save({"state_dict": prefixed("backbone.", backbone)}, tmp_path / "theirs.ckpt")
    pixels = torch.randint(0, 256, (60, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    parts = {"train_images": pixels[:40], "test_images": pixels[40:], "train_labels": np.arange(40) % 2}
    data = tmp_path / "mine.npz"
    np.savez(data, **parts, test_labels=np.arange(20) % 2, classes=np.array(["a", "b"]))
    keys = {"dataset": str(data), "store": tmp_path / "models", "preset": "smoke", "protocol": "NSLF", "noise": "uniform:0.3"}
    with pytest.raises(BadInput, match="say --recipe"):
        train("finetune", from_=tmp_path / "theirs.ckpt", **keys)
    import_checkpoint(
        tmp_path / "theirs.ckpt", "theirs", as_="encoder", recipe="simclr", dataset=str(data), store=tmp_path / "models"
    )
    folder = train("finetune", from_="theirs", sets=["size=8"], **keys)
    weights = read_weights(tmp_path / "models", folder.name)
    assert folder.name == "theirs-NSLF" and torch.equal(weights["encoder.conv1.weight"], net.conv1.weight)
    with pytest.raises(BadInput, match="another model or encoder named 'theirs'"):
        import_checkpoint(
            tmp_path / "theirs.ckpt",
            "theirs",
            recipe="byol",
            dataset=str(data),
            store=tmp_path / "models",
            as_="encoder",
            normalise="none",
        )
