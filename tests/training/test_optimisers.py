"""Learning rates in closed form; LARS against a loop; neither stops the device."""

import itertools
import math

import pytest
import torch

from rush_bench.errors import BadInput
from rush_bench.training.optimisers import LARS, learning_rate, make_optimiser
from rush_bench.training.options import Optimisation
from rush_bench.training.prepare import prepare


def test_cosine_from_lr_to_lr_min():
    settings = Optimisation(epochs=10, lr=0.5, lr_min=0.001)
    rates = [learning_rate(settings, step, 4) for step in range(41)]
    assert rates[0] == 0.5 and rates[40] == pytest.approx(0.001)
    assert rates[20] == pytest.approx((0.5 + 0.001) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_warm_up_is_linear_and_ends_at_lr():
    settings = Optimisation(epochs=10, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(settings, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0 and rates[49] == pytest.approx((1 + math.cos(math.pi * 39 / 40)) / 2)


def test_sgd_is_torchs_with_every_key():
    settings = Optimisation(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(2))
    one = make_optimiser(settings, [ours])
    other = torch.optim.SGD([theirs], lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    for _ in range(3):
        for weight, optimiser in ((ours, one), (theirs, other)):
            optimiser.zero_grad()
            weight.square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exclude_1d", [True, False])
def test_lars_equals_a_loop(exclude_1d):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (4,), (2, 2))]
    start[2].zero_()  # a zero tensor moves by the plain gradient
    weights = [torch.nn.Parameter(x.clone()) for x in start]
    optimiser = LARS(weights, lr=2.0, momentum=0.9, weight_decay=0.1, trust=0.01, exclude_1d=exclude_1d)
    expected, buffers = [x.clone() for x in start], [torch.zeros_like(x) for x in start]
    for _ in range(4):
        for k, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            gradient, w = weight.grad, expected[k]
            if w.ndim > 1 or not exclude_1d:
                size, norm = float(gradient.square().sum().sqrt()), float(w.square().sum().sqrt())
                ratio = 0.01 * norm / (size + 0.1 * norm) if norm > 0 and size > 0 else 1.0
                gradient = (gradient + 0.1 * w) * ratio
            buffers[k] = 0.9 * buffers[k] + gradient
            expected[k] = w - 2.0 * buffers[k]
        optimiser.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value)


def test_settings_choose_lars():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = make_optimiser(Optimisation(optimiser="lars", lr=5.0, lars_exclude_1d=False), [weight])
    assert isinstance(optimiser, LARS) and not optimiser.exclude_1d


@pytest.mark.parametrize(
    ("recipe", "sets", "says"),
    [
        ("standard", ["train.nesterov=true", "train.momentum=0"], r"train\.nesterov=true needs train\.momentum above 0"),
        ("dataaug", ["train.momentum=0"], r"train\.nesterov=true needs train\.momentum above 0"),
        ("ssp_selfie", ["selfie.momentum=0"], r"selfie\.nesterov=true needs selfie\.momentum above 0"),
        ("standard", ["train.nesterov=true", "train.optimiser=adam"], r"nesterov is for optimiser=sgd, and .* is adam"),
        ("standard", ["train.decay=0.5", "train.schedule=cosine"], r"decay is for schedule=steps, and .* is cosine"),
        ("standard", ["train.lr_min=0.01"], r"lr_min is for schedule=cosine, and .* is steps"),
        ("dataaug", ["train.momentum=0", "train.nesterov=false"], ""),
        ("dataaug", ["train.optimiser=adam"], ""),  # its nesterov is the recipe's
        ("simclr", ["pretrain.schedule=steps"], ""),  # and so is its lr_min
        ("standard", ["train.nesterov=true", "train.schedule=cosine", "train.lr_min=0.01"], ""),
    ],
)
def test_what_no_optimiser_would_read_is_refused_before_anything_runs(recipe, sets, says, tmp_path):
    wanted = {"dataset": "digits", "preset": "smoke", "sets": sets, "store": tmp_path}
    if not says:
        assert prepare(recipe, **wanted).card["recipe"] == recipe
        return
    with pytest.raises(BadInput, match=says):
        prepare(recipe, **wanted)


@pytest.mark.parametrize(
    ("option", "given", "setting", "other"),
    [
        ("noise", "uniform:0.3", "noise", "gaussian:0.25"),
        ("protocol", "SLF", "finetune.protocol", "ALF"),
        ("n_train", 99, "n_train", "98"),
    ],
)
def test_an_option_and_its_setting_are_refused_where_they_differ(option, given, setting, other, tmp_path):
    wanted = {"dataset": "digits", "preset": "smoke", "store": tmp_path, option: given}
    recipe = "simclr" if option == "protocol" else "noise_sup"
    with pytest.raises(BadInput, match=rf"{setting} is asked for twice, as {given} and in --set {setting}={other}; leave one"):
        prepare(recipe, sets=[f"{setting}={other}"], **wanted)
    assert prepare(recipe, sets=[f"{setting}={given}"], **wanted).card["recipe"] == recipe


@pytest.mark.parametrize(
    ("recipe", "sets", "says"),
    [
        ("dynacl_pp", "probe.clusters=1", "a whole number, at least 2"),
        ("advcl", "pretrain.clusters=[1]", "at least 2"),
        ("advcl", "pretrain.clusters=[]", "pretrain.clusters is empty; give a number of clusters"),
    ],
)
def test_pseudo_labels_have_two_clusters_or_more(recipe, sets, says, tmp_path):
    with pytest.raises(BadInput, match=says):
        prepare(recipe, dataset="digits", preset="smoke", sets=[sets], store=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"preset": None}, "no preset named 'None'; known: "),
        ({"dataset": torch.zeros(3)}, "dataset takes the name of a data set or a path as text, not Tensor"),
        ({"pretrain_on": 3}, "pretrain_on takes the name of a data set or a path as text, not int"),
    ],
)
def test_what_is_no_name_is_refused_in_a_line(wrong, says, tmp_path):
    with pytest.raises(BadInput, match=says):
        prepare("standard", **{"dataset": "digits", "preset": "smoke", "store": tmp_path} | wrong)
