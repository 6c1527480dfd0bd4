"""The same classifier at any scale of its logits: the same attack."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.audits.scale import usual_scale
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.defenses.body import usual_spread
from rush_bench.noise import Stream, Uniform
from rush_bench.registry import attacks
from rush_bench.settings import override
from rush_bench.threats import Threat

IMAGES = torch.rand((20, 1, 4, 4), generator=torch.Generator().manual_seed(1))


class Times(nn.Module):
    """A network with its logits multiplied."""

    def __init__(self, network: nn.Module, by: float) -> None:
        super().__init__()
        self.network, self.by = network, by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.network(x)


def two_classes() -> nn.Module:
    """A network whose logits are some ten apart: of two classes CE has one direction, whatever the scale."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    with torch.no_grad():
        network[3].weight.mul_(20)
        network[3].bias.sub_(network(IMAGES).median(0).values)  # about half the images to each class
    return network.eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "eot-apgd", "apgd"])
def test_the_scale_of_the_logits_changes_no_attack(norm: str, name: str) -> None:
    """The same classifier at any scale: the same labels, and the same x' up to rounding."""
    threat, stream = Threat(norm, 0.05 if norm == "linf" else 0.2), Stream(0, "scale", torch.arange(20))
    scales = (1, 1e-30, 1e-16, 1e-7, 30, 1e7)
    plain, *others = (Deterministic(Times(two_classes(), by).eval(), shape=(1, 4, 4)) for by in scales)
    labels = plain.predict(IMAGES, stream).labels
    attack = override(attacks.load(name)(), {"losses": "ce", "stop": "no", "steps": "20"} if name == "eot-apgd" else {})
    expected = plain.predict(attack.run(plain, IMAGES, labels, threat, stream), stream).labels
    assert 2 < int((expected != labels).sum()) < 18
    for other in others:
        assert torch.equal(other.predict(IMAGES, stream).labels, labels), other.body.network.by
        found = other.predict(attack.run(other, IMAGES, labels, threat, stream), stream).labels
        assert torch.equal(found, expected), other.body.network.by


@pytest.mark.parametrize("by", [1, 1e3])
def test_a_class_that_is_masked_says_nothing_of_the_scale(by: float) -> None:
    """A third logit of -1e9 leaves what AutoAttack's code finds as it is."""

    class Masked(Times):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(super().forward(x), (0, 1), value=-1e9)

    threat, stream = Threat("linf", 0.05), Stream(0, "scale", torch.arange(20))
    found = []
    for network in (two_classes(), Masked(two_classes(), by).eval()):
        defense = Deterministic(network, shape=(1, 4, 4))
        labels = defense.predict(IMAGES, stream).labels
        attacked = attacks.load("apgd")().run(defense, IMAGES, labels, threat, stream)
        found.append(defense.predict(attacked, stream).labels != labels)
    assert torch.equal(*found) and 2 < int(found[0].sum()) < 18


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "eot-apgd", "apgd"])
def test_small_logits_of_several_classes_are_attacked_as_usual_ones(norm: str, name: str) -> None:
    """CE of logits half as far apart, or less, pushes towards the mean of the other classes, unless the attack sees to it."""
    torch.manual_seed(0)
    images = torch.rand(100, 1, 4, 4)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        plain[3].weight.mul_(15 / (plain(images).amax(1) - plain(images).amin(1)).median())
        plain[3].bias.sub_(plain(images).mean(0))
    masked = nn.Sequential(Times(plain, 1e-4), nn.ConstantPad1d((0, 1), -1e9))  # an eleventh class that nobody is given
    threat, stream = Threat(norm, 0.08 if norm == "linf" else 0.25), Stream(0, "scale", torch.arange(100))
    attack = override(attacks.load(name)(), {"losses": "ce", "steps": "20"} if name == "eot-apgd" else {})
    broken = []
    for network in (*(Times(plain, by) for by in (1, 0.5, 0.3, 0.1, 0.02, 1e-5)), masked):
        defense = Deterministic(network.eval(), shape=(1, 4, 4))
        labels = defense.predict(images, stream).labels
        attacked = attack.run(defense, images, labels, threat, stream)
        broken.append(int((defense.predict(attacked, stream).labels != labels).sum()))
    assert len(set(broken[1:])) == 1 and 60 < broken[0] < 95
    assert broken[1] >= broken[0] - 1, broken


def of_spread(spread: float) -> Deterministic:
    """Ten classes whose logits are so far apart."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).eval()
    with torch.no_grad():
        logits = network(torch.rand(1000, 1, 4, 4))
    return Deterministic(Times(network, spread / float((logits.amax(1) - logits.amin(1)).median())).eval(), shape=(1, 4, 4))


@pytest.mark.parametrize("name", ["pgd", "eot", "eot-apgd", "apgd"])
def test_a_key_says_whether_logits_were_taken_further_apart(name: str) -> None:
    """Records of CE of logits as they are keep the key that they had, and `steeper=no` makes them again."""
    defense = of_spread(6)
    assert attacks.load(name)().on(defense).settings()["steeper"] is True
    plain = override(attacks.load(name)(), {"steeper": "no"}).on(defense)
    assert "steeper" not in plain.settings()
    images, stream = torch.rand(100, 1, 4, 4), Stream(0, "key", torch.arange(100))
    labels = defense.predict(images, stream).labels
    steep, own = (attack.run(defense, images, labels, Threat("linf", 0.05), stream) for attack in (attacks.load(name)(), plain))
    assert not torch.equal(steep, own)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("pgd-published", {}), ("aa", {}), ("eot-apgd-t", {}), ("pgd", {"loss": "dlr"}), ("pgd", {"loss": "ce@logits"})],
)
def test_replays_and_losses_that_know_no_scale_get_logits_as_they_are(name: str, changed: dict[str, str]) -> None:
    assert "steeper" not in override(attacks.load(name)(), changed).on(of_spread(6)).settings()


class Uneven(nn.Module):
    """Linear logits times a positive factor of the image: the same classifier, its robust accuracy known in closed form."""

    def __init__(self, steep: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.line, self.steep = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), steep
        with torch.no_grad():
            self.line[1].weight.mul_(15)
            self.line[1].bias.copy_(-self.line(torch.rand(500, 1, 4, 4)).mean(0) + self.line[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * (self.steep * (0.29 - x.flatten(1).std(1))).exp()[:, None]

    def stands(self, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Which images (B,) no x' in the ball and the box changes; float64."""
        weight, bias = self.line[1].weight.double(), self.line[1].bias.double()
        x = x.flatten(1).double()
        gap, low, high = weight[labels][:, None] - weight, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        margins = (gap * torch.where(gap > 0, low[:, None], high[:, None])).sum(2) + bias[labels][:, None] - bias
        return margins.scatter(1, labels[:, None], torch.inf).amin(1) > 0


@pytest.mark.parametrize("name", ["pgd", "apgd", "eot-apgd"])
@pytest.mark.parametrize("steep", [-20, 0, 20])
def test_logits_are_seen_at_one_scale_image_by_image(name: str, steep: float) -> None:
    """What probes or the other images have says nothing of an image whose logits are flat, or sure beyond float32."""
    network, images = Uneven(steep).eval(), torch.rand(80, 1, 4, 4)
    defense, stream = Deterministic(network, shape=(1, 4, 4)), Stream(0, "uneven", torch.arange(80))
    labels = defense.predict(images, stream).labels
    stands = network.stands(images, labels, 0.04)
    assert 20 < int(stands.sum()) < 60
    attack = override(attacks.load(name)(), {"losses": "ce"} if name == "eot-apgd" else {})
    attacked = attack.run(defense, images, labels, Threat("linf", 0.04), stream)
    left = defense.predict(attacked, stream).labels == labels
    assert not (stands & ~left).any()
    assert int(left.sum()) - int(stands.sum()) <= 4, (int(left.sum()), int(stands.sum()))


@pytest.mark.parametrize("votes", [0, 4])
@pytest.mark.parametrize("spread", [1e-6, 6, 60])
def test_the_objective_of_an_attack_is_ce_of_logits_20_apart_where_it_began(spread: float, votes: int) -> None:
    """By hand: the mean over draws of the softmax of each image's logits times its own constant; elsewhere too."""
    images, stream, line = torch.rand(5, 1, 4, 4), Stream(0, "climb", torch.arange(5)), of_spread(spread)
    law = Uniform(0.1)
    defense = Smoothed(line.body.network, noise=law, votes=votes, shape=(1, 4, 4)) if votes else line
    labels = defense.predict(images, stream).labels
    begun = defense.to_climb(images, stream)
    assert begun.spreads is not None
    factor = torch.tensor([max(1.0, 20 / float(begun.spreads.values[k])) for k in range(5)], dtype=torch.float64)
    x = (images + 0.2 * torch.rand_like(images)).clamp(0, 1)
    noise = stream.noise(law, 5, votes, (1, 4, 4), torch.device("cpu")) if votes else torch.zeros(5, 1, 1, 4, 4)
    point = x.double().requires_grad_()
    logits = (
        copy.deepcopy(line.body.network).double()((point[:, None] + noise.double()).flatten(0, 1)).unflatten(0, noise.shape[:2])
    )
    mean = (factor[:, None, None] * logits).softmax(2).mean(1)
    loss = -mean.gather(1, labels[:, None])[:, 0].log()
    (truth,) = torch.autograd.grad(loss.sum(), point)
    found = begun.gradient(x, labels, "ce@steep", votes or 1, stream)
    assert torch.allclose(found.loss.double(), loss.detach(), rtol=1e-3, atol=1e-4)
    sizes = [g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True) for g in (found.gradient.double(), truth)]
    assert torch.allclose(*sizes, atol=1e-3)
    own = usual_spread(line.body.outcome(images, exact=True))
    if not votes:
        assert float(begun.spreads.values.median()) == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("spread", [1e-9, 6, 300])
def test_an_audit_s_probes_see_one_scale(spread: float) -> None:
    """Tiny logits are multiplied before: what comes on top of that counts from there."""
    images, stream = torch.rand(200, 1, 4, 4), Stream(0, "scale", torch.arange(200))
    scaled = usual_scale(of_spread(spread), images, stream)
    logits = scaled.body.outcome(images, exact=True)
    assert float((logits.amax(1) - logits.amin(1)).median()) == pytest.approx(20, rel=1e-3)
    assert torch.equal(logits.argmax(1), of_spread(spread).predict(images, stream).labels)


@pytest.mark.parametrize("votes", [0, 4])
def test_an_attack_without_gradients_sees_points_apart_at_any_scale(votes: int) -> None:
    """The probabilities of tiny logits are equal in float32, those of huge ones are all 0 or 1; Square climbs all the same."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = two_classes()

        def forward(self, x: Tensor) -> Tensor:
            return self.network((x * 255).round() / 255)

    broken = []
    for by in (1, 1e-25, 1e-8, 1e7):
        network = Times(Rounded(), by).eval()
        one, many = Deterministic(network, shape=(1, 4, 4)), Smoothed(network, noise="uniform:0.02", votes=4, shape=(1, 4, 4))
        defense, stream = many if votes else one, Stream(0, "scale", torch.arange(20))
        labels = defense.predict(IMAGES, stream).labels
        settings = {"queries": 100, "draws": 4, "redraw": 30, "select_draws": 8}
        attacked = override(attacks.load("square")(), settings).run(defense, IMAGES, labels, Threat("linf", 0.2), stream)
        broken.append(int((defense.predict(attacked, stream).labels != labels).sum()))
    assert min(broken) >= 4 and max(broken) - min(broken) <= 1, broken


@pytest.mark.parametrize("memory", [2**31, 1])
def test_the_gradient_of_ce_keeps_its_direction_where_every_draw_is_sure(memory: int) -> None:
    """Against float64: mean over draws of which some are right and some wrong by hundreds, in one piece and draw by draw."""
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    network, stream = Times(two_classes(), 100).eval(), Stream(0, "sure", torch.arange(2))
    defense = Smoothed(network, noise=Uniform(0.5), votes=8, shape=(1, 4, 4), memory=memory)
    found = defense.gradient(images, labels, "ce", 8, stream).gradient.flatten(1)
    noise = stream.noise(Uniform(0.5), 2, 8, (1, 4, 4), torch.device("cpu")).double()
    x = images.double().requires_grad_()
    z = network.double()((x[:, None] + noise).flatten(0, 1)).unflatten(0, (2, 8))
    odds = (1 - 2 * labels[:, None]) * (z[..., 1] - z[..., 0])  # of two classes
    # d log mean sigmoid(-odds) = -sum p (1 - p) d odds / sum p, in the log domain
    share = F.logsigmoid(odds) + F.logsigmoid(-odds)
    weight = (share - share.logsumexp(1, keepdim=True)).exp().detach()
    (truth,) = torch.autograd.grad((weight * odds).sum(), x)
    truth = truth.flatten(1)
    one, two = (g / g.abs().amax(1, keepdim=True) for g in (found.double(), truth))
    assert torch.allclose(one, two, atol=1e-5)
