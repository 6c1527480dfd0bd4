"""The papers' other networks: sizes, forward passes against plain functions of their descriptions, folding, routes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.defenses import Deterministic
from rush_bench.defenses.load import load_defense
from rush_bench.errors import BadInput
from rush_bench.files import read_json
from rush_bench.networks import NETWORKS, build, resolve, set_route
from rush_bench.networks.classifier import encoder_of
from rush_bench.noise import Stream
from rush_bench.recipes.free import FreeSettings
from rush_bench.training.run import train

# Parameters with a head of ten classes. Published: 36.5 M and 46.2 M (Zagoruyko and Komodakis 2016; TRADES), 267 M (Rebuffi
# et al. 2021), 1.7 M (He et al. 2016); the others counted by hand from docs/sources.md in `counted`.
PUBLISHED = {
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
    "resnet110": 1_730_714,
    "wrn-28-10": 36_479_194,
    "wrn-34-10": 46_160_474,
    "wrn-70-16": 266_796_506,
}
SMALL = {
    "wide": {"name": "wrn", "blocks": [2, 1, 1], "width": 8, "stem_width": 4},
    "free": {"name": "wrn-32-10", "blocks": [2, 1, 1], "width": 8, "stem_width": 4},
    "silu": {"name": "preact-resnet", "blocks": [2, 1], "width": 8, "stem_width": 8},
    "v2": {"name": "resnet50v2", "blocks": [2, 1], "width": 4, "stem_width": 4},
    "v2-bare": {"name": "resnet50v2", "blocks": [1, 1], "width": 4, "stem_norm": False, "shortcut_norm": False},
    "wide-silu": {"name": "wrn", "blocks": [1, 1], "width": 8, "activation": "silu", "same": True},
    "bottleneck": {"name": "resnet50", "blocks": [2, 1], "width": 4, "mean": [0.4] * 3, "std": [0.2] * 3},
    "deep": {"name": "resnet110", "blocks": [3, 3, 3], "width": 4},
}


def counted(name: str) -> int:
    """Weights by hand: 3 x 3 convolutions are 9 ab, BatchNorm 2 a."""
    if name == "preact-resnet18":  # S2.9: stages of two blocks, a 3x3 shortcut in the last three
        total, before = 27 * 64, 64
        for width in (64, 128, 256, 512):
            first = 2 * before + 9 * before * width + 2 * width + 9 * width * width
            total += first + (9 * before * width if width != before else 0) + 4 * width + 18 * width * width
            before = width
        return total + 2 * 512 + 512 * 10 + 10
    if name == "wrn-32-10":  # S2.6: WRN-34-10 less its three shortcuts
        return 46_160_474 - (16 * 160 + 160 * 320 + 320 * 640)
    assert name == "resnet50v2"  # MadryLab's ResNet-50 with BatchNorm before the convolutions in place of after them
    change = 0
    for inside, count, before in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024)):
        change += 2 * (before + (count - 1) * 4 * inside) - 2 * count * 4 * inside
    return 23_520_842 + change


@pytest.mark.parametrize("name", [*PUBLISHED, "preact-resnet18", "wrn-32-10", "resnet50v2"])
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):  # shapes alone: WRN-70-16 is a gigabyte
        encoder = encoder_of(resolve({"name": name}))
    head = 10 * encoder.dim + 10
    assert sum(p.numel() for p in encoder.parameters()) + head == (PUBLISHED[name] if name in PUBLISHED else counted(name))


def warmed(name: str, routes: int = 1) -> tuple[nn.Module, Tensor]:
    """A network whose BatchNorm parameters and statistics are away from their start, in eval mode, and images for it."""
    network, generator = build(SMALL[name] | {"classes": 5, "routes": routes}, 3), torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval(), torch.rand(4, 3, 16, 16, generator=generator)


def by_hand(state: dict[str, Tensor], style: str, x: Tensor) -> Tensor:
    """The networks of sources S2.6, S2.9, S2.11 and S2.16 as one plain function of their weights."""

    def norm(key: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            state[f"encoder.{key}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return weight * (x - mean) / (var + 1e-5).sqrt() + bias

    def conv(key: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"encoder.{key}.weight"]
        if weight.shape[2] == 3:
            same = style in ("free", "silu", "wide-silu") and stride == 2
            x = torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) if same else F.pad(x, (0, 0, 1, 1))
            x = torch.cat([x, torch.zeros_like(x[..., :1])], 3) if same else F.pad(x, (1, 1, 0, 0))
        return F.conv2d(x, weight, stride=stride)

    def act(x: Tensor) -> Tensor:
        if style == "free":
            return torch.where(x < 0, 0.1 * x, x)
        return x / (1 + (-x).exp()) if style in ("silu", "wide-silu") else x.clamp_min(0)

    if style == "free":  # tf.image.per_image_standardization of pixels 0..255
        pixels = (255 * x).double()
        sizes = [(p.mean(), max(p.std(correction=0).item(), p.numel() ** -0.5)) for p in pixels]
        x = torch.stack([(p - mean) / size for p, (mean, size) in zip(pixels, sizes, strict=True)]).float()
    x = conv("conv1", x)
    if style == "v2":
        x = act(norm("bn1", x))
    for stage, count in enumerate(resolve(SMALL[style])["blocks"], 1):
        for k in range(count):
            at, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            pre = act(norm(f"{at}.bn1", x))
            if style.startswith("v2"):
                y = conv(f"{at}.conv1", pre)
                y = conv(f"{at}.conv3", act(norm(f"{at}.bn3", conv(f"{at}.conv2", act(norm(f"{at}.bn2", y)), stride))))
            else:
                y = conv(f"{at}.conv2", act(norm(f"{at}.bn2", conv(f"{at}.conv1", pre, stride))))
            if y.shape == x.shape:
                x = x + y
            elif style == "free":
                side = pre if (stage, k) == (1, 0) else x
                side = F.avg_pool2d(side, stride)
                empty = side.new_zeros(len(x), (y.shape[1] - side.shape[1]) // 2, *side.shape[2:])
                x = torch.cat([empty, side, empty], 1) + y
            elif style == "silu":
                x = conv(f"{at}.shortcut", x, stride) + y
            elif style == "v2":
                x = norm(f"{at}.shortcut.1", conv(f"{at}.shortcut.0", pre, stride)) + y
            else:
                x = conv(f"{at}.shortcut", pre, stride) + y
    if not style.startswith("v2"):
        x = act(norm("bn", x))
    return x.flatten(2).mean(2) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("name", ["wide", "free", "silu", "v2", "v2-bare", "wide-silu"])
def test_the_forward_pass_is_the_papers(name: str) -> None:
    network, images = warmed(name)
    expected = by_hand(network.state_dict(), name, images)
    assert expected.std(0).min() > 1e-3
    torch.testing.assert_close(network(images), expected, atol=1e-4, rtol=1e-4)


def test_bottlenecks_are_torchvisions() -> None:
    """With fewer blocks a stage: how many there are is in `test_parameter_counts`."""
    from torchvision.models.resnet import Bottleneck, ResNet

    network = build({"name": "resnet50", "blocks": [2, 1, 1, 1], "classes": 10}, 1)
    with torch.random.fork_rng():
        other = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    state = {key.removeprefix("encoder.").replace("head.", "fc."): value for key, value in network.state_dict().items()}
    other.load_state_dict(state)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(network.eval()(images), other.eval()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_folded_equals_unfolded(name: str) -> None:
    network, images = warmed(name)
    folded = network.folded()
    images.requires_grad_()
    torch.testing.assert_close(folded(images), network(images), atol=1e-4, rtol=1e-4)
    one, other = (torch.autograd.grad(net(images).square().sum(), images)[0] for net in (folded, network))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert one.abs().sum() > 0 and not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("name", SMALL)
def test_routes(name: str) -> None:
    network, images = warmed(name, routes=2)
    with network.route(1):
        second = network(images)
    assert not torch.allclose(second, network(images)), "each route has statistics of its own"
    torch.testing.assert_close(network.single_route(1)(images), second)
    torch.testing.assert_close(network.folded(1)(images), second, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="routes count from 0"):
        set_route(network, 2)


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_and_a_second_build(name: str) -> None:
    network, images = warmed(name)
    again = build(network.spec)
    again.load_state_dict(network.state_dict())
    assert again.spec == network.spec and torch.equal(again.eval()(images), network(images))
    network.train()(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.encoder(images, stages=1).shape[0] == 4


def test_a_black_image_has_a_gradient() -> None:
    """Standardisation divides by a deviation of at least that of one grey level."""
    network, _ = warmed("free")
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(black).sum(), black)
    assert gradient.isfinite().all()


def test_constants_and_activation_make_another_defence() -> None:
    """The same weights behind another normalisation or activation are another classifier: records must not be shared."""
    specs = [{}, {"mean": [0.5] * 3, "std": [1.0] * 3}, {"mean": [0.5] * 3, "std": [0.2] * 3}, {"activation": "silu"}]
    networks = [build(SMALL["wide"] | {"size": 16} | spec, 1).eval() for spec in specs]
    assert all(torch.equal(networks[0].encoder.conv1.weight, network.encoder.conv1.weight) for network in networks)
    defenses = [Deterministic(network, shape=(3, 16, 16)) for network in networks]
    assert len({defense.identity()["weights"] for defense in defenses}) == len(specs)
    images = torch.rand(2, 3, 16, 16)
    answers = [defense.predict(images, Stream(0, "test")).probabilities for defense in defenses]
    assert not torch.allclose(answers[1], answers[2])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "wrn-28-1"}, "did you mean 'wrn-28-10'"),
        ({"name": "wrn", "stem": "imagenet"}, "CIFAR stem only"),
        ({"name": "wrn", "activation": "relux"}, "did you mean 'relu'"),
        ({"name": "wrn", "shortcut": "conv2x2"}, "did you mean"),
        ({"name": "wrn-32-10", "mean": [0.5] * 3, "std": [0.5] * 3}, "standardise=false"),
        ({"name": "wrn", "block": "basic"}, "start from"),
        ({"name": "resnet18", "activation": "silu"}, "no network key named 'activation'"),
        ({"name": "wrn", "stem_width": 0}, "stem_width=0 must be"),
    ],
)
def test_a_wrong_spec_names_the_fix(spec: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(spec)


def test_every_name_resolves() -> None:
    assert all(resolve(resolve({"name": name})) == resolve({"name": name}) for name in NETWORKS)


def test_free_trains_on_its_own_network(tmp_path: Path) -> None:
    """S2.6: WRN-32-10, here a small one of its kind, by `--set network.name=wrn-32-10`; a table names the network."""
    small = ["network.name=wrn-32-10", "network.blocks=1,1,1", "network.width=8", "size=8", "train.batch_size=32"]
    folder = train("free", dataset="digits", preset="smoke", sets=small, store=tmp_path, device="cpu")
    card = read_json(folder / "card.json")
    assert card["network"]["name"] == "wrn-32-10" and card["network"]["standardise"] and card["network"]["shortcut"] == "pool"
    assert card["validation"]["clean"] > 0.3, "chance is 0.1"
    defense = load_defense(card["name"], store=tmp_path)
    assert defense.labels()["architecture"] == "wrn-32-10"
    assert resolve({"name": FreeSettings().network.name})["name"] == "resnet18"  # what `paper` trains, and its rows say
