"""An ensemble: the mean of the members' probabilities, and gradients through all of them."""

import pytest
import torch

from rush_bench.errors import BadInput
from rush_bench.networks import build, resolve

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "classes": 5, "members": 3}


def members(network):
    single = [build({**SPEC, "members": 1}) for _ in range(3)]
    for number, one in enumerate(single):
        one.encoder.load_state_dict(network.encoder.members[number].state_dict())
        one.head.load_state_dict(network.head.members[number].state_dict())
    return [one.eval() for one in single]


def test_outputs_are_logs_of_the_mean_probability():
    network, x = build(SPEC, 1).eval(), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sum(one(x).double().softmax(1) for one in members(network)) / 3
    torch.testing.assert_close(network(x).double().exp(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network.folded()(x), network(x), atol=1e-5, rtol=1e-4)


def test_the_input_gradient_is_that_of_the_mean_probability():
    network, x = build(SPEC, 1).eval(), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, gradients = torch.tensor([1, 3]), []
    for function in (network, lambda v: (sum(one(v).softmax(1) for one in members(network)) / 3).log()):
        v = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(torch.nn.functional.nll_loss(function(v), labels), v)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_members_start_apart_and_build_is_repeatable():
    network = build(SPEC, 1)
    first, second = (network.encoder.members[k].conv1.weight for k in (0, 1))
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), build(SPEC, 1).parameters(), strict=True))
    assert network.spec == resolve(SPEC) and network.head.in_features == 3 * 8 and network.head.out_features == 5


def test_weights_load_into_a_new_ensemble():
    network, other = build(SPEC, 1), build(SPEC, 2)
    other.load_state_dict(network.state_dict())
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.eval()(x), network.eval()(x))


@pytest.mark.parametrize("wrong", [{"members": 0}, {"members": 2, "routes": 2}])
def test_bad_specs(wrong):
    with pytest.raises(BadInput, match="members"):
        build({**SPEC, **wrong})
