"""Routed BatchNorm: each route is a network of its own, convolutions are shared, a view follows its network."""

import copy

import pytest
import torch
from torch import nn

from rush_bench.errors import BadInput
from rush_bench.networks import build, resolve, route, routed, routes, set_route, single_route
from rush_bench.networks.routes import RoutedBatchNorm

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "classes": 3}


def images(seed: int, count: int = 16) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(count: int = 3):
    """A network whose routes have seen different images and have different gamma and beta."""
    network = build({**SPEC, "routes": count}, seed=1)
    for k in range(count):
        with network.route(k):
            for step in range(3):
                network(images(10 * k + step) * (k + 1))
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.encoder.named_parameters():
        if ".sets." in name:
            weight.data.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def test_every_batchnorm_has_all_routes_and_nothing_else_changes():
    plain, network = build(SPEC, seed=1), build({**SPEC, "routes": 3}, seed=1)
    norms = [part for part in plain.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 6  # the shortcut's among them
    assert sum(isinstance(part, RoutedBatchNorm) for part in network.modules()) == 6
    assert sum(isinstance(part, nn.BatchNorm2d) for part in network.modules()) == 18
    assert "encoder.layer2.0.downsample.1.sets.2.running_mean" in network.state_dict()
    for key, weight in plain.state_dict().items():  # same draw of weights
        if key in network.state_dict():
            assert torch.equal(weight, network.state_dict()[key])


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_route_is_a_network_of_its_own(k):
    network, x = trained(), images(99)
    with network.route(k):
        expected = network(x)
    single, folded = network.single_route(k), network.folded(k)
    assert single.spec["routes"] == 1 and set(single.state_dict()) == set(build(SPEC).state_dict())
    assert torch.equal(single.eval()(x), expected)
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)
    others = [j for j in range(3) if j != k]
    assert all(not torch.allclose(network.single_route(j).eval()(x), expected, atol=1e-3) for j in others)
    single.encoder.conv1.weight.data.zero_()
    assert network.encoder.conv1.weight.any()  # a copy


def test_only_the_route_taken_moves():
    network = trained().train()
    before = copy.deepcopy(network.state_dict())
    with network.route(1):
        network(images(5)).square().sum().backward()
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(".sets.1." in key for key in moved)
    asked = {name for name, weight in network.encoder.named_parameters() if weight.grad is not None}
    assert not [name for name in asked if ".sets.0." in name or ".sets.2." in name]


def test_the_route_before_comes_back_even_after_an_error():
    network = build({**SPEC, "routes": 3})
    set_route(network, 2)
    with pytest.raises(RuntimeError), route(network, 0):
        assert network.encoder.bn1.current == 0
        raise RuntimeError
    assert all(part.current == 2 for part in network.modules() if isinstance(part, RoutedBatchNorm))


def test_a_view_shares_its_networks_weights():
    plain = build(SPEC, seed=1)
    view = routed(plain.encoder, 2, place=1)
    x = images(0)
    set_route(view, 1)
    assert torch.equal(view.eval()(x), plain.eval().encoder(x))
    view.train()
    view(x).square().sum().backward()
    assert plain.encoder.conv1.weight.grad is not None and plain.encoder.bn1.weight.grad is not None
    set_route(view, 0)
    mean = plain.encoder.bn1.running_mean.clone()
    view(x)
    assert torch.equal(plain.encoder.bn1.running_mean, mean)  # the other route has its own
    # Loading and moving either does both.
    state = {key: value + 1 if value.is_floating_point() else value for key, value in plain.encoder.state_dict().items()}
    plain.encoder.load_state_dict(state)
    assert torch.equal(view.bn1.sets[1].running_mean, state["bn1.running_mean"])
    assert torch.equal(view.conv1.weight, state["conv1.weight"])
    view.double()
    assert plain.encoder.conv1.weight.dtype == torch.float64
    assert plain.encoder.bn1.running_mean.dtype == torch.float64
    assert len(list(nn.ModuleList([plain.encoder, view]).parameters())) == len(list(view.parameters()))


def test_a_projector_can_be_routed_too():
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    view = routed(head, 2)
    assert routes(view) == 2 and routes(head) == 1 and isinstance(single_route(view, 1)[1], nn.BatchNorm1d)


def test_padding_of_the_stem():
    network = build({**SPEC, "padding": 2})
    sizes = []
    network.encoder.conv1.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    network(images(0))
    assert sizes == [10]  # 34 x 34 at 32 pixels: DeACL's (sources S2.13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build({**SPEC, "routes": 2}).folded(), r"which, as in folded\(1\)"),
        (lambda: build({**SPEC, "routes": 2}).folded(2), "no route 2; this network has 0 to 1"),
        (lambda: resolve({**SPEC, "routes": 0}), "routes=0 must be"),
    ],
)
def test_wrong_routes(call, message):
    with pytest.raises(BadInput, match=message):
        call()


def test_wrong_route_numbers_inside_are_value_errors():
    network = build(SPEC)
    for wrong in (lambda: set_route(network, 1), lambda: single_route(network, 1), lambda: routed(routed(network, 2), 2)):
        with pytest.raises(ValueError, match="rout"):
            wrong()
