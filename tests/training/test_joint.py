"""Joint pre-training: log det and its gradient, the attack on three tasks at once, what learns and what does not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.networks import build
from rush_bench.training.inner import InnerSettings
from rush_bench.training.joint import JointSettings, JointStage, log_det
from rush_bench.training.options import RunSettings
from rush_bench.training.stage import Batch, Context

SPEC = {"name": "resnet", "blocks": [1, 1], "width": 4, "channels": 1, "size": 8, "members": 3}
ATTACK = InnerSettings(eps=0.1, step=0.03, steps=3, mode="train")
SMALL = JointSettings(dim=16, layers=1, heads=2, feedforward=16, dropout=0.0, padding=0, flip=0.0)
COUNT = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joint(run: RunSettings | None = None, attack: InnerSettings = ATTACK, network=(), **changes) -> JointStage:
    pixels = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=seeded(2), dtype=torch.uint8)
    data = as_images(pixels, torch.arange(COUNT), classes=[str(k) for k in range(10)])
    context = Context(build({**SPEC, **dict(network)}, 1), run or RunSettings(), {"pretrain": data, "val": data}, seed=0)
    return JointStage(context, replace(SMALL, **changes), attack)


def batch(stage: JointStage) -> Batch:
    return Batch(stage.splits["pretrain"], torch.arange(COUNT), seeded(), 0, 0)


def questions(stage: JointStage):
    """What the tasks ask, and the images of all three."""
    problems = [task.problem(batch(stage).images, seeded(number)) for number, task in enumerate(stage.tasks)]
    return problems, torch.cat([problem[0] for problem in problems])


def objective(stage: JointStage, problems, x: torch.Tensor) -> tuple[float, float]:
    """The sum of the losses, and lambda h."""
    total, h = stage.objective(x.clone().requires_grad_(), problems)
    return float(total.detach()), float(h.detach() if isinstance(h, torch.Tensor) else h)


@pytest.mark.parametrize("shape", [(3, 4, 10), (2, 5, 1, 3, 3), (3, 1, 3, 8, 8)])
def test_log_det_against_float64_loops(shape):
    g, expected = torch.randn(shape, generator=seeded()) * 1e-3, []
    for image in g.double().numpy().swapaxes(0, 1):
        rows = [row.ravel() / math.sqrt((row**2).sum()) for row in image]
        gram = [[float(a @ b) + 1e-5 * (i == j) for j, b in enumerate(rows)] for i, a in enumerate(rows)]
        expected.append(math.log(np.linalg.det(np.array(gram))))
    assert float(log_det(g)) == pytest.approx(sum(expected) / len(expected), rel=1e-4, abs=1e-5)


def test_log_det_of_orthogonal_and_of_equal_directions():
    lengths = torch.tensor([1.0, 7.0, 0.1], dtype=torch.float64)
    apart = torch.diag(lengths)[:, None]  # (3 directions, 1 image, 3 numbers)
    assert float(log_det(apart, 1e-5)) == pytest.approx(3 * math.log1p(1e-5), abs=1e-8)
    same = lengths[:, None, None] * torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    assert float(log_det(same, 1e-5)) == pytest.approx(math.log(1e-5**2 * (3 + 1e-5)), rel=1e-6)
    assert torch.isfinite(log_det(torch.zeros(3, 2, 5)))  # an image whose losses are flat


def test_the_gradient_of_the_objective_is_exact(monkeypatch):
    """By finite differences in float64, through the derivative of the normalised gradients, on smooth scores."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    stage, problems = joint(diversity=0.5), []
    for task, classes in enumerate((4, 31, 4)):
        first, last = (torch.randn(s, generator=seeded(task), dtype=torch.float64) for s in ((64, 9), (9, classes)))
        answers = torch.arange(COUNT) % classes
        problems.append((torch.empty(0), lambda v, a=first, b=last: torch.tanh(v.flatten(1) @ a / 4) @ b, answers))
    x = torch.rand(3 * COUNT, 1, 8, 8, generator=seeded(), dtype=torch.float64).requires_grad_()

    def parts(v):
        total, h = stage.objective(v, problems)
        return torch.stack([total, h])

    gradients = [torch.autograd.grad(parts(x)[k], x)[0] for k in (0, 1)]
    for seed in range(3):
        direction, step = torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64), 1e-5
        ends = [parts((x.detach() + sign * step * direction).requires_grad_()).detach() for sign in (1, -1)]
        slopes = (ends[0] - ends[1]) / (2 * step)
        for k in (0, 1):
            assert float((gradients[k] * direction).sum()) == pytest.approx(float(slopes[k]), rel=1e-5)


def test_the_loss_against_task_by_task(monkeypatch):
    stage, seen = joint().train(), []
    losses = stage.losses
    monkeypatch.setattr(stage, "losses", lambda v, problems: seen.append((v.detach().clone(), problems)) or losses(v, problems))
    loss = stage.loss(batch(stage))
    (x, problems), (attacked, _) = seen[-2:]
    assert len(seen) == ATTACK.steps + 2
    assert float((attacked - x).abs().max()) <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1

    total, directions = 0.0, []
    for number, (_, scores, answers) in enumerate(problems):
        for images in (x, attacked):
            part = images[number * COUNT : (number + 1) * COUNT].clone().requires_grad_()
            given = scores(part)
            if number == 2:  # Selfie: the places' cross-entropies are summed
                own = sum(F.cross_entropy(given[place::4], answers[place::4]) for place in range(4))
            else:
                own = F.cross_entropy(given, answers)
            total += float(own.detach())
        directions.append(torch.autograd.grad(own, part)[0])
    expected = total / 6 + 0.1 * float(log_det(torch.stack(directions)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    plain = joint(penalise=False).train().loss(batch(stage))
    assert float(plain.detach()) == pytest.approx(total / 6, rel=1e-4)


def test_the_attack_counts_in_batchnorm_and_leaves_weights_alone():
    stage = joint().train()
    loss = stage.loss(batch(stage))
    trunk, lasts = stage.encoders[0], [encoder.layer2[0].bn1 for encoder in stage.encoders]
    assert int(trunk.bn1.num_batches_tracked) == 3 * (ATTACK.steps + 2)  # train() in the attack as well
    assert [int(norm.num_batches_tracked) for norm in lasts] == [ATTACK.steps + 2, ATTACK.steps + 2, 0]
    assert all(weight.grad is None and weight.requires_grad for weight in stage.parameters())
    loss.backward()
    idle = {id(weight) for part in (stage.network.head, stage.encoders[2].layer2) for weight in part.parameters()}
    assert all((weight.grad is None) == (id(weight) in idle) for weight in stage.parameters())
    groups = stage.parameter_groups()
    assert len({id(weight) for weight in groups}) == len(groups)
    assert {id(w) for w in stage.parameters()} - {id(w) for w in groups} == {id(w) for w in stage.network.head.parameters()}


@pytest.mark.parametrize("diversity", [0.0, 10.0])
def test_the_attack_raises_its_objective(diversity):
    stage = joint(diversity=diversity).eval()
    problems, x = questions(stage)
    attack = InnerSettings(eps=0.1, step=0.02, steps=8)
    attacked = attack.run(stage, lambda v: sum(stage.objective(v, problems)), x, seeded())
    assert sum(objective(stage, problems, attacked)) > sum(objective(stage, problems, x)) + 0.02


def test_lambda_makes_the_gradients_more_diverse():
    judge, found = joint(diversity=1.0).eval(), {}
    problems, x = questions(judge)
    for diversity in (0.0, 100.0):
        stage = joint(diversity=diversity).eval()
        attacked = InnerSettings(eps=0.1, step=0.02, steps=8).run(
            stage, lambda v, stage=stage: sum(stage.objective(v, problems)), x, seeded()
        )
        found[diversity] = objective(judge, problems, attacked)
    assert found[100.0][1] > found[0.0][1] + 1e-3 and found[0.0][0] > found[100.0][0]


def test_bfloat16():
    stage = joint(RunSettings(precision="bfloat16")).train()
    loss = stage.loss(batch(stage))
    loss.backward()
    assert torch.isfinite(loss) and all(bool(w.grad.isfinite().all()) for w in stage.parameters() if w.grad is not None)
    assert float(loss.detach()) == pytest.approx(float(joint().train().loss(batch(stage)).detach()), rel=0.1)


def test_validation_has_a_share_for_each_task_and_asks_the_same_again():
    stage = joint()
    numbers = stage.validate()
    assert set(numbers) == {"rotation", "jigsaw", "selfie"} and numbers == stage.validate()
    assert all(0 <= value <= 1 for value in numbers.values())


def test_afterwards_each_member_has_the_trunk_and_its_own_last_stage():
    stage = joint()
    first, *others = stage.encoders
    assert all(other.layer1 is first.layer1 and other.layer2 is not first.layer2 for other in others)
    with torch.no_grad():
        first.layer1[0].conv1.weight.add_(1)
    stage.finish()
    for other in others:
        assert other.layer1 is not first.layer1 and torch.equal(other.layer1[0].conv1.weight, first.layer1[0].conv1.weight)
        assert torch.equal(other.bn1.running_mean, first.bn1.running_mean)
        assert not torch.equal(other.layer2[0].conv1.weight, first.layer2[0].conv1.weight)


@pytest.mark.parametrize("members", [1, 2])
def test_a_member_for_each_task(members):
    with pytest.raises(BadInput, match=r"network\.members=3"):
        joint(network={"members": members})


def test_a_pre_activation_network_keeps_its_last_batchnorm_to_each_member():
    stage = joint(network={"name": "preact-resnet", "stem_width": 4}).train()
    first, *others = stage.encoders
    assert all(other.layer1 is first.layer1 and other.bn is not first.bn for other in others)
    stage.loss(batch(stage)).backward()
    assert [encoder.bn.weight.grad is None for encoder in stage.encoders] == [False, False, True]
    assert float(first.layer1[0].conv1.weight.grad.abs().max()) > 0
