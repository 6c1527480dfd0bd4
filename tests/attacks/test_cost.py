"""What attacks cost, counted: rows and operations, host synchronisations; no clock.

A row forward is 1 forward equivalent (fe), an input gradient 2 (design, section 7).
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rush_bench.attacks.apgd import EOTAPGD
from rush_bench.attacks.autoattack import AutoAttack
from rush_bench.attacks.pgd import EOT, PGD
from rush_bench.attacks.square import Square
from rush_bench.attacks.suites import FULL, QUICK
from rush_bench.defenses import Deterministic, Smoothed, as_module
from rush_bench.evaluation.score import score
from rush_bench.networks import build
from rush_bench.noise import Stream
from rush_bench.registry import attacks
from rush_bench.settings import override
from rush_bench.threats import Threat

SHAPE = (1, 8, 8)
STREAM = Stream(0, "attack")
SMALL = Threat("linf", 1e-4)
IMAGES = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(5))
LABELS = torch.full((4,), 2)


class Operations(TorchDispatchMode):
    """Counts operations, and those that wait for the device where there is one."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def syncs(self):
        return self.count["_local_scalar_dense"] + self.count["nonzero"]


@pytest.fixture(scope="module")
def stub():
    """Class 2 of 10 by far, whatever the attack: none ends early."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        network[1].weight.copy_(0.05 * torch.randn(10, 64, generator=torch.Generator().manual_seed(6)))
        network[1].bias.copy_(5 * nn.functional.one_hot(torch.tensor(2), 10))
    return network


def _defense(network, votes):
    options = {"shape": SHAPE}
    return Smoothed(network, noise="uniform:0.3", votes=votes, **options) if votes else Deterministic(network, **options)


def _spent(attack, defense, labels=LABELS, threat=SMALL):
    before = defense.passes.forwards, defense.passes.backwards
    attack.run(defense, IMAGES, labels, threat, STREAM)
    return (defense.passes.forwards - before[0]) / 4, (defense.passes.backwards - before[1]) / 4


# fe per image that stands to the end, of each column at its settings in the suite, on defences of 0, 1 and 64 votes
FE = {
    "full": {"pgd": (42, 90, 2690), "eot": (None, 13_442, 13_442), "aa": (9_774, 159_728, 638_912)},
    "quick": {"pgd": (22, 46, 1346), "eot": (None, 706, 770), "apgd": (44, 800, 3_200), "square": (501, 1_328, 1_328)},
    "beside": {"eot-apgd": (407, 6_722, 26_114), "eot-apgd-t": (1_495, 25_921, 96_832), "square": (5_001, 104_180, 326_336)},
}
SUITES = {"full": FULL, "quick": QUICK, "beside": {name: {} for name in FE["beside"]}}
CASES = [(suite, name) for suite, columns in SUITES.items() for name in columns if name != "clean"]


@pytest.mark.parametrize(("suite", "name"), CASES)
@pytest.mark.parametrize(("place", "votes"), list(enumerate((0, 1, 64))))
def test_cost_of_a_suite(stub, suite, name, place, votes):
    """`passes` says it before a run; test_passes holds that to what a run counts, and so does this where a run is short."""
    fe = FE[suite][name][place]
    if fe is None:
        pytest.skip("not a column of a deterministic defence")
    attack, defense = override(attacks.load(name)(), SUITES[suite][name]), _defense(stub, votes)
    assert sum(attack.passes(defense)) == fe
    if name == "pgd" or (suite, name) == ("quick", "eot"):
        assert sum(_spent(attack, defense)) == fe


def test_pgd_at_one_vote_costs_little_more_in_looks_than_in_gradients(stub):
    assert sum(_spent(PGD(), _defense(stub, 1))) <= 90


def test_no_draw_of_a_bank_goes_forward_twice_for_a_gradient(stub):
    """Images are cut into batches that fit."""
    found, attack = [], AutoAttack(parts=("apgd-ce",), steps=40, least_bank=16)
    for rows in (10**6, 16 * 3):
        defense = _defense(stub, 1)
        defense.body.rows = rows
        forwards, backwards = _spent(attack, defense)
        found.append((forwards + backwards) / backwards)
        assert defense.passes.backwards >= 40 * 4 * 16
    assert found == pytest.approx(2 * [found[0]], abs=0.1)
    assert found[0] < 2.3  # the rest are the package's checks and its passes that decide, few beside 100 steps


def test_gradients_of_a_bank_in_parts_are_those_of_the_whole():
    network = build({"name": "resnet", "blocks": [1], "width": 4, "classes": 10, "channels": 1, "size": 8}, seed=1).eval()
    found = []
    for size in (4, 2, 1):
        module = as_module(_defense(network.double(), 1).bank(16, 0))
        parts = []
        for x, y in zip(IMAGES.split(size), LABELS.split(size), strict=True):
            x = x.clone().requires_grad_()
            parts.append(torch.autograd.grad(nn.functional.cross_entropy(module(x), y, reduction="sum"), x)[0])
        found.append(torch.cat(parts))
    for other in found[1:]:
        assert ((other - found[0]).abs().max() / found[0].abs().max()) < 1e-6


def test_noise_costs_few_operations_and_no_sync_of_its_own():
    network = build({"name": "resnet", "blocks": [2, 2], "width": 4, "classes": 10, "channels": 1, "size": 8}, seed=1).eval()
    spent = []
    for votes in (0, 1):
        with Operations() as made:
            PGD(steps=10, select_every=5).run(_defense(network, votes), IMAGES, LABELS, SMALL, STREAM)
        spent.append((made.count.total(), made.syncs))
    assert spent[1][0] <= 1.5 * spent[0][0]
    assert spent[1][1] <= spent[0][1] + 8  # two looks: two for each prediction, two to see who leaves
    defense = _defense(network, 1)
    for call, most in (
        (lambda: score(defense, IMAGES, LABELS, torch.arange(4), STREAM, 100), 2),
        (lambda: defense.predictions(IMAGES, STREAM, 64), 2),
        (lambda: defense.gradient(IMAGES, LABELS, "ce", 64, STREAM), 2),
        (lambda: Square(queries=6).run(defense, IMAGES, LABELS, SMALL, STREAM), 2 * 6 + 6),
    ):
        with Operations() as made:
            call()
        assert made.syncs <= most


@pytest.mark.parametrize(
    ("attack", "least"), [(EOT(steps=50), 4), (EOTAPGD(losses=("ce",)), 10), (PGD(steps=40), 1.5)], ids=repr
)
def test_images_that_are_broken_pay_no_more(stub, attack, least):
    """A wrong label breaks every image at the first look."""
    stands, falls = (sum(_spent(attack, _defense(stub, 1), labels)) for labels in (LABELS, (LABELS + 1) % 10))
    assert falls <= stands / least
    still = _defense(stub, 0)
    if isinstance(attack, PGD):  # without noise every iterate counts, and none leaves
        assert _spent(attack, still) == _spent(attack, still, (LABELS + 1) % 10)
