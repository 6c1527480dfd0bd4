"""Networks: shape, size, folding, and errors that name the fix."""

import pytest
import torch

from rush_bench.errors import BadInput
from rush_bench.networks import build, resolve

SPECS = [
    {"name": "tiny", "channels": 1, "size": 16},
    {"name": "resnet", "blocks": [1, 2], "width": 8, "classes": 7, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]},
    {"name": "resnet", "blocks": [1, 1, 1, 1], "width": 4, "size": 96, "stem": "imagenet"},
]


def warmed(spec: dict, seed: int = 0):
    """A network whose BatchNorm statistics and parameters are away from their start, and images for it."""
    network, generator = build(spec, seed), torch.Generator().manual_seed(seed)
    shape = (network.spec["channels"], network.spec["size"], network.spec["size"])
    images = torch.rand(8, *shape, generator=generator)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    for _ in range(3):
        network(images)
    return network.eval(), images


def test_resnet18_is_the_literatures():
    network = build({"name": "resnet18"})
    assert sum(p.numel() for p in network.encoder.parameters()) == 11_168_832
    sizes = []
    for stage in range(1, 5):
        network.encoder.get_submodule(f"layer{stage}").register_forward_hook(
            lambda module, args, output: sizes.append(tuple(output.shape[1:]))
        )
    assert network.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_folded_equals_unfolded(spec, channels_last):
    network, images = warmed(spec)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    folded = network.folded()
    torch.testing.assert_close(folded(images), network(images), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded.training
    assert all(parameter.requires_grad for parameter in network.parameters())  # the original is left as it was


def test_folding_a_network_in_train_mode_leaves_it_there():
    network = build(SPECS[0]).train()
    network.folded()
    assert network.training and isinstance(network.encoder.bn1, torch.nn.BatchNorm2d)


def test_normalisation_is_inside():
    plain, images = warmed(SPECS[1] | {"mean": [], "std": []})
    inside = build(SPECS[1])
    inside.load_state_dict(plain.state_dict())  # the constants are no weights
    mean, std = (torch.tensor(SPECS[1][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(inside.eval()(images), plain((images - mean) / std), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_builds_the_same_network_again(spec):
    network, images = warmed(spec)
    again = build(network.spec)
    assert again.spec == network.spec == resolve(network.spec)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images), network(images))
    assert again(images).shape == (8, network.spec["classes"])


def test_weights_come_from_the_seed_and_not_from_the_global_generator():
    before = torch.random.get_rng_state()
    one, same, other = build(SPECS[0], 1), build(SPECS[0], 1), build(SPECS[0], 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.encoder.conv1.weight, same.encoder.conv1.weight)
    assert not torch.equal(one.encoder.conv1.weight, other.encoder.conv1.weight)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnet81"}, "did you mean 'resnet18'"),
        ({"name": "tiny", "widht": 3}, "did you mean 'width'"),
        ({"name": "tiny", "width": 0}, "width=0 must be"),
        ({"name": "tiny", "classes": "ten"}, "classes='ten'"),
        ({"name": "resnet", "blocks": []}, "blocks"),
        ({"name": "resnet", "blocks": [2, 0]}, "blocks"),
        ({"name": "tiny", "stem": "cifra"}, "did you mean 'cifar'"),
        ({"name": "tiny", "mean": [0.5]}, "mean and std"),
        ({"name": "tiny", "mean": [0.5] * 3, "std": [0.0] * 3}, "positive"),
    ],
)
def test_a_wrong_spec_names_the_fix(spec, message):
    with pytest.raises(BadInput, match=message):
        build(spec)
