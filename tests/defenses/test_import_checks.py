"""What import reads of a file with pickled objects in it, and the clean accuracy that it compares with the published one."""

import contextlib
import dataclasses
import datetime
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from rush_bench.cli import main
from rush_bench.defenses.published import expected, import_checkpoint
from rush_bench.defenses.published.safe_unpickling import Shell, load_safely
from rush_bench.errors import BadInput
from rush_bench.files import sha256_file
from rush_bench.networks import build
from rush_bench.store import model_names

Tensors = dict[str, Tensor]
SPEC = {"name": "resnet", "blocks": [1, 1], "width": 8}
SAID = {"recipe": "trades", "network": "resnet,size=8"}  # of images that are no larger


def network(seed: int = 0, **spec: object) -> nn.Module:
    """A small ResNet with BatchNorm statistics as after training."""
    net, generator = build(SPEC | spec, seed), torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():  # so that every class is the answer to some image
        net.head.bias -= net.eval()(images(200, generator)[:, : spec.get("channels", 3)]).mean(0)
    return net.eval()


def images(count: int, generator: torch.Generator) -> Tensor:
    """Coarse noise, on the grid of 8 bits."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (nn.functional.interpolate(coarse, size=8) * 255).round() / 255


def kl(net: nn.Module) -> Tensors:
    """Its weights as TRADES names them."""
    names = (("encoder.", ""), ("head.", "linear."), ("downsample", "shortcut"))
    state = {}
    for key, value in net.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        state[key] = value
    return state


class Gadget:
    """Runs code where a pickle of it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).touch()",))


def foreign(mark: Path) -> dict[str, object]:
    """What MadryLab's trainer saves beside the weights, and worse: settings of a class that is not here, dates, numpy."""
    module = types.ModuleType("robustness_like")
    made = type("Parameters", (dict,), {"__module__": module.__name__})
    listed = type("Steps", (list,), {"__module__": module.__name__})
    module.Parameters, module.Steps = made, listed
    sys.modules["robustness_like"] = module
    args = made(lr=0.1)
    args.steps = listed([1, 2])
    rest = {"epoch": 3, "args": args, "when": datetime.datetime(2020, 1, 1), "acc": np.float64(0.5)}
    return rest | {"gadget": Gadget(mark), "root": mark}


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_left_out_and_run_nothing(zipped: bool, tmp_path: Path) -> None:
    net, mark, file = network(), tmp_path / "ran", tmp_path / "file.pt"
    torch.save({"state_dict": kl(net), **foreign(mark)}, file, _use_new_zipfile_serialization=zipped)
    del sys.modules["robustness_like"]  # the reader does not have that package
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    done = import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models", recipe="trades")
    assert not mark.exists() and "robustness_like" not in sys.modules
    assert any("no code of theirs was run" in note for note in done.notes)
    content = load_safely(file)
    assert all(isinstance(content[key], Shell) for key in ("args", "when", "acc", "gadget", "root"))
    assert content["epoch"] == 3
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in kl(net).items())
    with pytest.raises(ModuleNotFoundError):  # the gadget is one: careless loading gets as far as it can
        torch.load(file, weights_only=False)


@pytest.mark.parametrize(("first", "second"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_other_weights_of_the_network_are_named(first: str, second: str, tmp_path: Path) -> None:
    content = {first: kl(network()), second: kl(network(1)), "optimizer": {"state": {}}, "best": 0.9}
    torch.save(content, tmp_path / "file.pt")
    done = import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", store=tmp_path / "models", recipe="trades")
    assert [f"torch.load(file)['{second}']" in note for note in done.notes].count(True) == 1
    assert not any("optimizer" in note for note in done.notes)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_leave_the_keys(prefix: str, tmp_path: Path) -> None:
    net = network()
    torch.save({prefix + key: value for key, value in kl(net).items()}, tmp_path / "file.pt")
    import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", store=tmp_path / "models", recipe="trades")
    kept = load_file(tmp_path / "models" / "mine" / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("said", "size"), [(None, 16), ("resnet,size=8", 8)])
def test_a_network_takes_images_of_ones_own_as_they_are(said: str | None, size: int, tmp_path: Path) -> None:
    file, options = tmp_path / "file.pt", {"dataset": "digits", "recipe": "trades", "store": tmp_path / "models"}
    torch.save(kl(network(channels=1)), file)
    done = import_checkpoint(file, "mine", network=said, keep=False, **options)
    assert done.card["network"]["size"] == size


@pytest.mark.parametrize(
    ("channels", "normalise", "says"),
    [
        (3, "0.4,0.4,0.4/inf,inf,inf", "not for images"),
        (3, "1/2/1/4", "give decimals"),
        (3, "0.1307,0.1307,0.1307/0.3081,0.3081,0.3081", "moves a mean pixel"),
        (1, "33.3/78.6", "divide them by 255"),
        (1, "0.1307/0.3081", None),  # MNIST's
    ],
)
def test_constants_are_those_of_images_in_0_1(channels: int, normalise: str, says: str | None, tmp_path: Path) -> None:
    options = {"dataset": "digits" if channels == 1 else "cifar10", "recipe": "trades", "store": tmp_path / "models"}
    torch.save(kl(network(channels=channels)), tmp_path / "file.pt")
    with contextlib.nullcontext() if says is None else pytest.raises(BadInput, match=says):
        done = import_checkpoint(tmp_path / "file.pt", "mine", normalise=normalise, keep=False, **options)
        assert done.card["network"]["mean"] == [0.1307]


def test_an_import_is_of_a_model_or_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"kind of import named 'modle'; did you mean 'model'"):
        import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", as_="modle")


def test_the_gadget_is_one(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "file.pt"
    torch.save({"state_dict": {}, "gadget": Gadget(mark)}, file)
    load_safely(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_a_parameter_and_half_precision_survive(tmp_path: Path) -> None:
    held = {
        "a": nn.Parameter(torch.arange(3.0)),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.zeros(()),
        "x": Path("x"),
    }
    torch.save(held, tmp_path / "file.pt")
    content = load_safely(tmp_path / "file.pt")
    assert isinstance(content["a"], nn.Parameter) and torch.equal(content["a"], held["a"])
    assert content["b"].dtype == torch.bfloat16 and content["c"].shape == ()


@pytest.mark.parametrize("content", [b"\x80\x04cos\nsystem\nnonsense", b"\x80\x02K\x01.", b"", b"hello world"])
def test_damaged_pickles(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read as a checkpoint"):
        import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", store=tmp_path / "models")


@pytest.mark.parametrize("name", ["checkpoint-70000.data-00000-of-00001", "checkpoint-70000.meta", "cifar10_linf.npy"])
def test_files_of_tensorflow_and_jax(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(BadInput, match=r"TensorFlow or JAX.*train free --set network\.name=wrn-32-10"):
        import_checkpoint(tmp_path / name, "mine", dataset="cifar10", store=tmp_path / "models")


def test_selfie_pretraining_is_refused(tmp_path: Path) -> None:
    torch.save({"P_state": {"0.mean": torch.ones(3)}, "selfie_state": {}}, tmp_path / "file.pt")
    with pytest.raises(BadInput, match=r"Selfie pre-training.*ata_best_model"):
        import_checkpoint(tmp_path / "file.pt", "mine", dataset="cifar10", store=tmp_path / "models")


def labelled(folder: Path, net: nn.Module, count: int = 600, wrong: float = 0.2) -> Path:
    """Noisy images whose labels are the network's own answers, a part of them changed."""
    generator = torch.Generator().manual_seed(5)
    pixels = images(count, generator)
    with torch.no_grad():
        labels = net(pixels).argmax(1)
    changed = torch.randperm(count, generator=generator)[: int(wrong * count)]
    labels[changed] = (labels[changed] + 1) % 10
    names = np.array([str(k) for k in range(10)])
    np.savez(
        folder / "mine.npz",
        test_images=(255 * pixels).round().to(torch.uint8).numpy(),
        test_labels=labels.numpy(),
        classes=names,
    )
    return folder / "mine.npz"


def test_clean_accuracy_is_compared(tmp_path: Path) -> None:
    """The labels are 80 % right for this network: it agrees with 0.8, not with 0.6; behind other constants it does not."""
    net = network()
    torch.save(kl(net), tmp_path / "file.pt")
    options = {"dataset": str(labelled(tmp_path, net)), "store": tmp_path / "models", **SAID}
    done = import_checkpoint(tmp_path / "file.pt", "right", expect_clean=0.8, **options)
    assert any("clean accuracy on 500 test images is" in note and "expected 80.0%" in note for note in done.card["notes"])
    for wrong in ({"expect_clean": 0.6}, {"expect_clean": "0.8", "normalise": "cohen"}):
        with pytest.raises(BadInput, match=r"too far off for chance.*--normalise.*--bn-route"):
            import_checkpoint(tmp_path / "file.pt", "wrong", **wrong, **options)
    assert model_names(tmp_path / "models") == ["right"]
    unasked = import_checkpoint(tmp_path / "file.pt", "unasked", expect_clean="none", **options)
    assert any("clean accuracy on 500 test images is" in note and "nothing is published" in note for note in unasked.notes)
    for value in ("1.2", 0.0):
        with pytest.raises(BadInput, match="must be a part of 1"):
            import_checkpoint(tmp_path / "file.pt", "other", expect_clean=value, **options)


def test_a_smoothed_model_is_measured_under_its_noise(tmp_path: Path) -> None:
    net = network()
    torch.save(kl(net), tmp_path / "file.pt")
    options = {
        "dataset": str(labelled(tmp_path, net, 120, 0.0)),
        "store": tmp_path / "models",
        "expect_clean": 0.99,
        **SAID,
    }
    import_checkpoint(tmp_path / "file.pt", "little", noise="gaussian:0.001", **options)
    with pytest.raises(BadInput, match="too far off"):
        import_checkpoint(tmp_path / "file.pt", "much", noise="gaussian:2", **options)


def test_the_manifest_knows_files_by_name_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    torch.save(kl(net), tmp_path / "known.pt")
    data = labelled(tmp_path, net)
    entry = expected.Expected("known.pt", "plain ResNet (names of torchvision and timm, or kl)", "mine", 0.5, "a test")
    monkeypatch.setattr(expected, "MANIFEST", (entry,))
    options = {"dataset": str(data), "store": tmp_path / "models", **SAID}
    with pytest.raises(BadInput, match=r"expected 50\.0% \(a test\)"):
        import_checkpoint(tmp_path / "known.pt", "mine", **options)
    torch.save(kl(net), tmp_path / "other.pt")
    import_checkpoint(tmp_path / "other.pt", "other", **options)
    import_checkpoint(tmp_path / "known.pt", "user", expect_clean=0.8, **options)  # the user's number goes before
    by_digest = dataclasses.replace(entry, file="elsewhere.pt", sha256=sha256_file(tmp_path / "other.pt"))
    monkeypatch.setattr(expected, "MANIFEST", (by_digest,))
    with pytest.raises(BadInput, match=r"expected 50\.0% \(a test\)"):
        import_checkpoint(tmp_path / "other.pt", "renamed", **options)


def test_the_manifest_is_sound() -> None:
    assert len({entry.file for entry in expected.MANIFEST}) == len(expected.MANIFEST)
    assert all(0.6 < entry.clean < 0.92 and entry.dataset in ("cifar10", "cifar100") for entry in expected.MANIFEST)
    known = expected.expectation("model_cifar_wrn.pt", "", "WideResNet (TRADES)", "cifar10", None, None)
    assert known is not None and known.clean == 0.8492  # sources S2.16
    assert expected.expectation("model_cifar_wrn.pt", "", "RoCL", "cifar10", None, None) is None


def test_nothing_is_downloaded_to_compare(tmp_path: Path) -> None:
    torch.save(kl(network()), tmp_path / "file.pt")
    line = ["import", str(tmp_path / "file.pt"), "--name", "mine", "--dataset", "cifar10", "--store", str(tmp_path / "models")]
    done = CliRunner().invoke(
        main, [*line, "--recipe", "trades", "--expect-clean", "0.84", "--data-dir", str(tmp_path), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "was not measured (expected 84.0% (the user's))" in done.stderr
    assert "cifar10 is not on this machine" in done.stderr and model_names(tmp_path / "models") == ["mine"]
