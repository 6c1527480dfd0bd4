"""Published checkpoints: synthetic files with the families' keys, against torchvision's ResNet-18 at an eighth of its width."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import Tensor, nn

from rush_bench.cli import main
from rush_bench.defenses import load_defense
from rush_bench.defenses.published import import_checkpoint, recognise
from rush_bench.defenses.published.importing import renamed
from rush_bench.defenses.published.shapes import spec_of
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.store import read_card, read_weights
from tests.defenses.narrow import Narrow

Tensors = dict[str, Tensor]
BATCHNORM = re.compile(r"(^|\.)(bn\d|downsample\.1)\.(weight|bias|running_mean|running_var|num_batches_tracked)$")
IMAGENET = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}
CIFAR = {"mean": torch.tensor([0.4914, 0.4822, 0.4465]), "std": torch.tensor([0.247, 0.243, 0.261])}


def reference(seed: int, make: Callable[[], nn.Module] = Narrow) -> nn.Module:
    """A network with BatchNorm statistics as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    return net.eval()


def resnet18() -> nn.Module:
    """torchvision's, with the CIFAR stem."""
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return reference(0)


def dense(name: str, out: int, into: int, bias: bool = True) -> Tensors:
    return {f"{name}.weight": torch.ones(out, into)} | ({f"{name}.bias": torch.ones(out)} if bias else {})


def norm(name: str, size: int) -> Tensors:
    parts = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), torch.ones(size))
    return {f"{name}.{key}": value for key, value in parts.items()} | {f"{name}.num_batches_tracked": torch.tensor(3)}


def trunk(net: nn.Module) -> Tensors:
    """The network without its classifier."""
    return {key: value.clone() for key, value in net.state_dict().items() if not key.startswith("fc.")}


def routed(net: nn.Module, count: int) -> Tensors:
    """`bn_list` of each BatchNorm: route 1 is the network's own, the others are shifted."""
    state: Tensors = {}
    for key, value in trunk(net).items():
        found = BATCHNORM.search(key)
        new = key.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
        if not found:
            state[new] = value
            continue
        stem, _, last = new.rpartition(".")
        for k in range(count):
            state[f"{stem}.bn_list.{k}.{last}"] = value + (k - 1) * (0.25 if value.is_floating_point() else 1)
    return state


def kl(net: nn.Module) -> Tensors:
    return {key.replace("downsample", "shortcut"): value for key, value in trunk(net).items()}


def normalisation(prefix: str = "") -> Tensors:
    return {f"{prefix}normalize.{key}": value for key, value in IMAGENET.items()}


def projector(net: nn.Module) -> Tensors:
    dim = net.fc.in_features
    state = dense("fc.fc1", dim, dim) | dense("fc.fc2", dim, dim, False) | dense("fc.fc3", dim, dim, False)
    for layer in (1, 2, 3):
        for k in range(2):
            state |= norm(f"fc.bn{layer}.bn_list.{k}", dim)
    return state


def advcl(net: nn.Module) -> Tensors:
    state, dim = routed(net, 3), net.fc.in_features
    for clusters in (2, 10, 50, 100, 500):
        state |= dense(f"fc_{clusters:03d}", clusters, dim)
    for head, into, out in (("ce", dim, 1000), ("proj", dim, 128), ("pred", 128, 128)):
        state |= dense(f"head_{head}.0", into, into) | norm(f"head_{head}.1", into) | dense(f"head_{head}.3", out, into)
    return {f"module.{key}": value for key, value in state.items()}


def advcl_tuned(net: nn.Module) -> Tensors:
    dim = net.fc.in_features
    state = kl(net) | dense("linear", 10, dim)
    for head, into, out in (("proj", dim, 128), ("pred", 128, 128)):
        state |= dense(f"head_{head}.0", into, into) | dense(f"head_{head}.2", out, into)
    return state


def fc(net: nn.Module, name: str = "fc") -> Tensors:
    return {f"{name}.weight": net.fc.weight.detach().clone(), f"{name}.bias": net.fc.bias.detach().clone()}


def save(folder: Path, content: object, name: str = "file.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def agrees(folder: Path, net: nn.Module, constants: Tensors | None) -> None:
    """The model of the store predicts as the reference does."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # pooled, so of any size
    stored = build(read_card(folder / "models", "mine")["network"])
    stored.load_state_dict(read_weights(folder / "models", "mine"))
    seen = images if constants is None else (images - constants["mean"].view(3, 1, 1)) / constants["std"].view(3, 1, 1)
    with torch.no_grad():
        expected = net(seen).softmax(1)
        found = stored.eval()(images).softmax(1)
    assert torch.allclose(found, expected, atol=2e-5)
    assert expected.std(0).max() > 1e-3, "the reference must depend on the image"


# family: (what the file holds, with --head, normalisation, recipe, protocol)
def content(family: str, net: nn.Module) -> tuple[object, bool, Tensors | None, str, str]:
    rest = {"epoch": 3, "optim": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    if family == "acl":
        return {**rest, "state_dict": normalisation() | routed(net, 2) | projector(net)}, True, IMAGENET, "acl", "not stated"
    if family == "acl-dual-tuned":  # DynACL's AFF keeps both routes
        return {"state_dict": normalisation() | routed(net, 2) | fc(net)}, False, IMAGENET, "acl", "not stated"
    if family == "acl-tuned":
        return {**rest, "state_dict": normalisation() | trunk(net) | fc(net)}, False, IMAGENET, "acl", "not stated"
    if family == "dynacl":
        one = normalisation() | routed(net, 2) | projector(net)
        both = {f"encoder_k.{k}": v for k, v in one.items()} | {f"encoder_q.{k}": v + 1 for k, v in one.items()}
        return {"state_dict": both}, True, IMAGENET, "dynacl", "not stated"
    if family == "advcl":
        return {"model": advcl(net), "epoch": 1000, "rng_state": torch.get_rng_state()}, True, None, "advcl", "not stated"
    if family == "advcl-tuned":
        return {"model": advcl_tuned(net), "classifier": fc(net), "epoch": 25}, False, None, "advcl", "SLF"
    if family == "rocl":
        return {"model": {f"module.{k}": v for k, v in kl(net).items()}, "acc": 83.0}, True, None, "rocl", "not stated"
    if family == "trades":
        return kl(net) | fc(net, "linear"), False, None, "trades", "supervised"
    assert family in ("deacl", "deacl-buffers")
    state, dim = {f"backbone.{k}": v for k, v in trunk(net).items()}, net.fc.in_features
    state |= dense("classifier", 10, dim) | dense("classifier_adv", 10, dim)
    if family == "deacl-buffers":
        state |= {f"backbone.normalize.{key}": value for key, value in CIFAR.items()}
    state |= {f"momentum_backbone.{k}": v for k, v in trunk(net).items()}
    return {"state_dict": state}, True, CIFAR, "deacl", "not stated"


FAMILIES = ["acl", "acl-dual-tuned", "acl-tuned", "dynacl", "advcl", "advcl-tuned", "rocl", "trades", "deacl", "deacl-buffers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_network_predicts_as_the_original(net: nn.Module, tmp_path: Path, family: str) -> None:
    net = reference(2, partial(Narrow, padding=2)) if family.startswith("deacl") else net
    held, needs_head, constants, recipe, protocol = content(family, net)
    file = save(tmp_path, held)
    if needs_head:
        with pytest.raises(BadInput, match=r"no classifier in this file; .*--as encoder.*--head"):
            import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models", recipe=recipe)
        assert not (tmp_path / "models").exists()
    head = save(tmp_path, {"model": fc(net, "module.0")}, "file_linear") if needs_head else None
    done = import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models", head=head, recipe=recipe)
    card = done.card
    assert (card["recipe"], card["protocol"], card["dataset"], card["votes"]) == (recipe, protocol, "cifar10", [0])
    assert len(card["source"]["sha256"]) == 64 and bool(card["source"]["head_sha256"]) == needs_head
    assert card["source"]["bn_route"] == (1 if family in ("acl", "acl-dual-tuned", "dynacl", "advcl") else None)
    shape = {"name": "resnet", "blocks": [2, 2, 2, 2], "width": 8, "padding": 2 if family.startswith("deacl") else 1}
    assert shape.items() <= card["network"].items()
    agrees(tmp_path, net, constants)


def test_the_stem_of_96_pixel_networks(tmp_path: Path) -> None:
    """ACL and DynACL on STL-10: 7 x 7 stem with max-pool, torchvision's own. From safetensors, too."""
    from safetensors.torch import save_file

    net = reference(4, partial(Narrow, stem="imagenet"))
    save_file(normalisation() | trunk(net) | fc(net), tmp_path / "file.safetensors")
    import_checkpoint(tmp_path / "file.safetensors", "mine", dataset="stl10", store=tmp_path / "models")
    defense = load_defense("mine", store=tmp_path / "models")
    assert defense.shape == (3, 96, 96)
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net((images - IMAGENET["mean"].view(3, 1, 1)) / IMAGENET["std"].view(3, 1, 1)).softmax(1)
    assert torch.allclose(defense.predict(images, Stream(0, "test")).probabilities, expected, atol=2e-5)


def test_shapes_of_the_synthetic_files_are_those_of_the_published_ones() -> None:
    """S4.2: 256 entries of ACL, 357 of AdvCL, 122 of a kl ResNet-18 with linear; and their counts of parameters."""

    def parameters(state: Tensors) -> int:
        return sum(value.numel() for key, value in state.items() if key.endswith((".weight", ".bias")))

    with torch.device("meta"):
        net = resnet18()
        acl, one, plain = routed(net, 2) | projector(net), advcl(net), kl(net) | fc(net, "linear")
    assert (len(acl | normalisation()), parameters(acl)) == (256, 11_971_520)
    assert (len(one), parameters(one)) == (357, 12_666_942)
    assert len(plain) == 122
    assert spec_of(renamed(kl(net), recognise(plain)), {"classes": 10})["name"] == "resnet18"


def test_the_route_is_chosen_openly(net: nn.Module, tmp_path: Path) -> None:
    file = save(tmp_path, {"state_dict": normalisation() | routed(net, 2) | fc(net)})
    one = import_checkpoint(file, "one", dataset="cifar10", store=tmp_path / "models")
    assert any("BatchNorm route 1 of 0, 1 was taken" in note for note in one.notes)
    zero = import_checkpoint(file, "zero", dataset="cifar10", store=tmp_path / "models", bn_route=0)
    first, second = (read_weights(tmp_path / "models", name) for name in ("zero", "one"))
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert not any("was taken" in note for note in zero.notes)
    with pytest.raises(BadInput, match="no BatchNorm route 2; this file has 0, 1"):
        import_checkpoint(file, "two", dataset="cifar10", store=tmp_path / "models", bn_route=2)
    plain = save(tmp_path, kl(net) | fc(net, "linear"), "plain.pt")
    with pytest.raises(BadInput, match="leave --bn-route out"):
        import_checkpoint(plain, "two", dataset="cifar10", store=tmp_path / "models", bn_route=1, recipe="trades")


@pytest.mark.parametrize("gap", [1e-8, 1e-3])
def test_collapsed_routes_are_told(net: nn.Module, tmp_path: Path, gap: float) -> None:
    state = routed(net, 2)
    for key in state:
        if ".bn_list.0." in key and state[key].is_floating_point():
            state[key] = state[key.replace(".bn_list.0.", ".bn_list.1.")] + gap
    file = save(tmp_path, {"state_dict": normalisation() | state | fc(net)})
    notes = import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models").notes
    assert any("collapsed" in note for note in notes) == (gap < 1e-6)


def test_advcl_silent_failure(net: nn.Module, tmp_path: Path) -> None:
    """On one GPU AdvCL's fine-tuning loads `module.*` with strict=False: nothing arrives, and it trains a head on an
    encoder as it was drawn. Our loader takes the same file whole; and the file that comes out of theirs is refused."""
    held = advcl(net)
    fresh = Narrow()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    outcome = fresh.load_state_dict(held, strict=False)  # what their code does
    assert len(outcome.unexpected_keys) == len(held) and all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())
    head = save(tmp_path, fc(net), "head.pt")
    import_checkpoint(save(tmp_path, {"model": held}), "mine", dataset="cifar10", store=tmp_path / "models", head=head)
    agrees(tmp_path, net, None)
    silent = save(tmp_path, {"model": advcl_tuned(fresh), "classifier": fc(net), "epoch": 25}, "silent.pt")
    with pytest.raises(BadInput, match=r"never trained .*one GPU"):
        import_checkpoint(silent, "silent", dataset="cifar10", store=tmp_path / "models")
    assert not (tmp_path / "models" / "silent").exists()


def damaged(state: Tensors, how: str) -> Tensors:
    if how == "missing":
        del state["layer3.1.bn2.running_var"]
    elif how == "extra":
        state["layer5.0.conv1.weight"] = torch.ones(3)
    elif how == "shape":
        state["layer4.0.conv1.weight"] = torch.ones(64, 32, 1, 1)
    elif how == "nan":
        state["layer1.0.conv1.weight"][0] = torch.nan
    elif how == "pixels":
        state["normalize.mean"] = 255 * state["normalize.mean"]
    elif how == "zero head":
        state["fc.weight"].zero_()
    elif how == "buffers":
        del state["normalize.std"]
    elif how == "bottleneck":
        state["layer1.0.conv3.weight"] = torch.ones(32, 8, 1, 1)
    return state


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"1 missing \(encoder.layer3.1.bn2.running_var\); nothing was imported"),
        ("extra", r"1 not accounted for \(encoder.layer5"),
        ("shape", r"1 of another shape \(encoder.layer4"),
        ("nan", "not finite"),
        ("pixels", r"not for images in \[0,1\]"),
        ("zero head", "all zeros"),
        ("buffers", "normalize.std are missing"),
        ("bottleneck", "--model package.module:function"),
    ],
)
def test_what_does_not_fit_is_refused(net: nn.Module, tmp_path: Path, how: str, says: str) -> None:
    file = save(tmp_path, damaged(normalisation() | trunk(net) | fc(net), how))
    with pytest.raises(BadInput, match=says):
        import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["branch1.conv1.weight", "branch2.conv1.weight"], "Chen2020Adversarial"),
        (["linear_1.weight", "linear_2.weight"], "projector"),
        (["0.weight", "0.bias"], "--head"),
        (["encoder.conv1.weight", "head.weight"], "of rush-bench itself"),
        (["stem.weight", "blocks.0.weight", "head.weight"], "no known family"),
    ],
)
def test_other_networks_are_refused_by_name(keys: list[str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        recognise(keys)


def test_files_that_are_no_checkpoints(net: nn.Module, tmp_path: Path) -> None:
    def attempt(file: Path, says: str, **options: str) -> None:
        with pytest.raises(BadInput, match=says):
            import_checkpoint(
                file,
                options.pop("name", "mine"),
                **({"dataset": "cifar10", "store": tmp_path / "m", "recipe": "trades"} | options),
            )

    attempt(tmp_path / "absent.pt", "cannot be read")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    attempt(tmp_path / "cut.pt", "cannot be read")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678{")
    attempt(tmp_path / "cut.safetensors", "download it again")
    attempt(save(tmp_path, {0: torch.ones(1)}), "no state dict found")
    four = kl(net) | {"linear.weight": torch.ones(10, 64, 1, 1), "linear.bias": torch.ones(10)}
    attempt(save(tmp_path, four), "has 10 classes; change --dataset")
    attempt(save(tmp_path, {"code": Path("x")}), "no state dict found; beside tensors there is code")
    attempt(save(tmp_path, [1, 2]), "not a state dict")
    attempt(save(tmp_path, {"epoch": 1, "args": {}}), "no state dict found; beside tensors there is epoch, args")
    good = save(tmp_path, kl(net) | fc(net, "linear"))
    attempt(good, "has 100 classes; change --dataset", dataset="cifar100")
    attempt(good, "did you mean 'cifar10'", dataset="cifar1")
    attempt(good, "plain folder name", name="a/b")
    attempt(good, "leave --head out", head=str(save(tmp_path, fc(net), "head.pt")))
    attempt(good, "no recipe that writes the keys of plain ResNet", recipe="dacl")
    attempt(save(tmp_path, kl(net), "net.pt"), "must hold one linear layer", head=str(good))


def test_the_command(net: nn.Module, tmp_path: Path) -> None:
    file = save(tmp_path, {"state_dict": normalisation() | routed(net, 2) | fc(net)})
    line = ["import", str(file), "--name", "mine", "--dataset", "cifar10", "--store", str(tmp_path / "models"), "--json"]
    line += ["--recipe", "dynacl", "--protocol", "AFF"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert (card["recipe"], card["protocol"], card["source"]["bn_route"]) == ("dynacl", "AFF", 1)
    assert str(tmp_path) not in (tmp_path / "models" / "mine" / "card.json").read_text()
    assert "note: BatchNorm route 1" in result.stderr
    assert CliRunner().invoke(main, line).exit_code == 0, "the same command again"
    other = CliRunner().invoke(main, [*line, "--bn-route", "0"])
    assert other.exit_code == 2 and "another model or encoder named 'mine'" in other.stderr
    agrees(tmp_path, net, IMAGENET)
