"""`settle`: forms of a defence, resuming, sharing, failing cells, costs; on plug-ins and on few classes."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rush_bench.attacks.pgd import PGD
from rush_bench.attacks.square import Square
from rush_bench.audits import settle as room
from rush_bench.audits.forecast import rates
from rush_bench.audits.settle import form_of_trial, settle
from rush_bench.datasets import as_images
from rush_bench.defenses import Defense, Deterministic, Gradient, Passes, Prediction, Randomised, Smoothed
from rush_bench.errors import BadInput
from rush_bench.noise import Gaussian, Laplace, Stream, Uniform

SHAPE = (1, 4, 4)
EPS = 0.1


def named(evidence, experiment: str, trial: str):
    return next(entry for entry in evidence.of(experiment) if entry.trial == trial)


@pytest.fixture(scope="module")
def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()


def images_of(classes: int, n: int = 24, network: nn.Module | None = None):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, *SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes if network is None else network(pixels.float() / 255).argmax(1)
    return as_images(pixels, labels, classes=[f"c{k}" for k in range(classes)], name="made")


@pytest.fixture(scope="module")
def data(linear):
    return images_of(5, network=linear)


@pytest.fixture
def short(tiny):
    return dataclasses.replace(
        tiny,
        points=3,
        sweep=(1, 2, 4),
        queries=(10,),
        part_steps=2,
        steps=2,
        losses_steps=2,
        sweep_steps=2,
        rand_steps=2,
        long=3,
        lengths=(1, 2, 3),
        certificate=200,
    )


@pytest.fixture
def run(data, short, tmp_path):
    def run(defense, images=None, **options):
        where = {"out": tmp_path, "store": tmp_path / "models", "quiet": True}
        return settle([defense], images or data, **{"budget": short, "eps": EPS, "repeats": 4, **where, **options})

    return run


def smooth(linear, votes: int = 4):
    return Smoothed(linear, noise=Gaussian(0.2), votes=votes, shape=SHAPE, name=f"smooth@{votes}")


def frames(found) -> dict:
    return {
        (e.experiment, e.trial): e.result.frame.drop(columns=["seconds"]).sort_values("index").reset_index(drop=True)
        for e in found.evidence[0].entries
    }


def test_all_experiments_of_a_smoothed_defence(linear, run) -> None:
    found = run(smooth(linear))
    assert found.complete and not found.failed and not found.contradictions
    evidence = found.evidence[0]
    there = {entry.experiment for entry in evidence.entries}
    assert there == {f"T{k}" for k in range(16)} - {"T14"}  # no other model to ablate or to send through both doors
    assert len(evidence.certificates) == 1 and evidence.labels["n"] == 24
    # the worst case is over every attack on itself at the threat, and over the clean images
    of = set(evidence.worst.result.identity["attack"]["of"])
    parts = {entry.result.folder.name for entry in evidence.own()}
    assert {key[:16] for key in of} == parts | {evidence.clean.result.folder.name}
    assert named(evidence, "T15", "worst case over all").result.identity["attack"]["of"] == list(
        evidence.worst.result.identity["attack"]["of"]
    )
    least = min(entry.estimate.value for entry in evidence.own())
    assert evidence.worst.estimate.value <= least + 0.1


def test_a_cell_of_two_experiments_is_run_once(linear, run, tmp_path, monkeypatch) -> None:
    """T14's own arm is T10 at 1 eps, T9's projected clamp is T1's at as many draws, and so on."""
    calls: list[str] = []
    original = PGD.run

    def counted(self, defense, *rest):
        calls.append(f"{defense.name} {self}")
        return original(self, defense, *rest)

    monkeypatch.setattr(PGD, "run", counted)
    found = run(smooth(linear), only=["T1", "T2", "T9", "T13"])
    entries = found.evidence[0].entries
    cells = {entry.result.folder for entry in entries}
    assert len(cells) < len(entries) and len(calls) == len(cells) == len(set(calls))
    assert named(found.evidence[0], "T1", "m=4").result.folder == named(found.evidence[0], "T9", "projected").result.folder


def test_stopped_at_once_and_finished_later(linear, run, tmp_path) -> None:
    only = ["T0", "T1", "T11", "T12"]
    stopped = run(smooth(linear), only=only, max_minutes=0, out=tmp_path / "parts")
    assert not stopped.complete and not stopped.failed and not stopped.evidence[0].complete
    finished = run(smooth(linear), only=only, out=tmp_path / "parts")
    whole = run(smooth(linear), only=only, out=tmp_path / "whole")
    assert finished.complete and whole.complete
    same(frames(finished), frames(whole))


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for key in one:
        pd.testing.assert_frame_equal(one[key], two[key], check_exact=True, obj=str(key))


def test_two_shards_give_the_bits_of_one_run(linear, run, tmp_path) -> None:
    only = ["T0", "T1", "T7", "T11", "T12"]
    for k in (2, 1):
        part = run(smooth(linear), only=only, out=tmp_path / "parts", chunk=7, shard=(k, 2))
        assert part.complete == (k == 1)
    whole = run(smooth(linear), only=only, out=tmp_path / "whole", chunk=7)
    same(frames(part), frames(whole))


def test_a_plan_runs_nothing_and_its_cost_is_finite(linear, run, tmp_path) -> None:
    heard = []
    found = run(smooth(linear), before=lambda planned: heard.extend(planned) or False)
    assert not found.complete and not (tmp_path / "settle").exists()
    costs = heard[0].costs
    assert set(costs) == {entry.experiment for entry in found.evidence[0].entries}
    for cost in costs.values():
        assert cost.jobs > 0 and math.isfinite(cost.seconds) and cost.seconds > 0 and cost.forwards >= 24
    again = []
    run(smooth(linear), only=["T1"])
    run(smooth(linear), only=["T1", "T0"], before=lambda planned: again.extend(planned) or False)
    assert set(again[0].costs) == {"T0"}  # what is there costs nothing more


def test_a_failing_cell_fails_alone_and_takes_the_worst_case_with_it(linear, run, monkeypatch) -> None:
    def broken(self, *rest):
        raise ValueError("no such luck")

    monkeypatch.setattr(Square, "run", broken)
    found = run(smooth(linear), only=["T1", "T7", "T11"])
    assert not found.complete
    evidence = found.evidence[0]
    assert {e.experiment for e in evidence.entries if not e.complete} == {"T7", "T11"} and len(evidence.of("T1")) == 3
    assert any("T7" in label and "no such luck" in reason for label, reason in found.failed.items())
    assert any("T11" in label and "needs" in reason for label, reason in found.failed.items())
    assert evidence.worst is None
    monkeypatch.undo()
    assert run(smooth(linear), only=["T1", "T7", "T11"]).complete


class Plain(Defense):
    """A defence of a user's own: no bank, no base, no logits for others."""

    def __init__(self, network: nn.Module, draws: int) -> None:
        self.network, self.name, self.classes, self.shape = network, f"own@{draws}", 5, SHAPE
        self.draws, self.passes = draws, Passes()

    def _mean(self, images, stream, draws):
        draws = max(draws, 1)
        noise = stream.noise(Uniform(0.1 if self.draws else 0.0), len(images), draws, SHAPE, images.device)
        return self.network((images[:, None] + noise).flatten(0, 1)).softmax(1).unflatten(0, (len(images), draws)).mean(1)

    def predict(self, images, stream):
        with torch.no_grad():
            p = self._mean(images, stream, self.draws)
        votes = nn.functional.one_hot(p.argmax(1), 5) * max(self.draws, 1)
        return Prediction(p.argmax(1), votes, p)

    def gradient(self, images, labels, loss, draws, stream):
        from rush_bench.defenses.aggregate import objective_named

        function, _ = objective_named(loss)
        x = images.clone().requires_grad_()
        value = function(self._mean(x, stream, draws).log(), labels)
        return Gradient(torch.autograd.grad(value.sum(), x)[0], value.detach())


@pytest.mark.parametrize("draws", [0, 2])
def test_a_plug_in_has_the_trials_that_it_can_take(linear, run, draws) -> None:
    found = run(Plain(linear, draws), images_of(5, 8, linear))
    assert found.complete, found.failed
    used = {entry.result.labels["attack"] for entry in found.evidence[0].entries}
    assert not used & {"aa", "aa-rand", "aa-published", "transfer"} and {"square", "eot-apgd", "worst", "clean"} <= used
    assert all(entry.result.labels["on"] == "" for entry in found.evidence[0].entries)


@dataclasses.dataclass(frozen=True)
class Shift:
    """A random shift of brightness: all its randomness comes from the stream."""

    def __call__(self, images, stream, draws):
        return images[:, None] + 0.2 * (stream.uniform(len(images), draws, (1, 1, 1), images.device) - 0.5)


def test_a_randomised_defence_has_votes_and_banks_too(linear, run) -> None:
    defense = Randomised(linear, transform=Shift(), votes=2, shape=SHAPE, name="shift@2")
    found = run(defense, only=["T5", "T6", "T7", "T8", "T13", "T12"])
    assert found.complete, found.failed
    evidence = found.evidence[0]
    assert [entry.trial for entry in evidence.of("T13")] == ["1 votes", "4 votes"]
    assert [entry.result.identity["defense"]["votes"] for entry in evidence.of("T13")] == [1, 4]
    assert evidence.of("T6") and evidence.of("T5") and evidence.of("T8", "from the un-noised base")
    assert not evidence.certificates and not evidence.of("T12")  # no theorem


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("votes", [0, 2])
def test_few_classes(run, classes, votes) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    made = smooth(network, votes) if votes else Deterministic(network, shape=SHAPE, name="plain")
    found = run(made, images_of(classes), only=["T4", "T5", "T6", "T10", "T11", "T15", "T16"])
    assert found.complete, found.failed
    assert {"T4", "T10", "T11", "T15"} <= {entry.experiment for entry in found.evidence[0].entries}
    assert bool(found.evidence[0].of("T5")) == bool(votes)  # of two classes with the losses that exist


def test_other_models_are_one_of_each_recipe_first(linear, data, monkeypatch, tmp_path) -> None:
    """Three seeds of one ablation would leave no place for another."""
    network = {"name": "resnet", "image": list(SHAPE), "classes": 5}
    recipes = {"noise-c": "noise_sup", "noise-c-s1": "noise_sup", "noise-c-x4": "noise_sup", "mine-s1": "rush"}
    recipes |= {"probe-c": "random_probe", "plain-c": "simclr", "at-c": "pgd_at", "at-c-s1": "pgd_at"}
    votes = {name: ["@1", "@64"] if recipe not in ("simclr", "pgd_at") else [""] for name, recipe in recipes.items()}
    cards = {name + end: {"recipe": recipe, "network": network} for name, recipe in recipes.items() for end in votes[name]}
    monkeypatch.setattr(room, "listed", lambda store, dataset: cards)
    monkeypatch.setattr(room, "image_shape", lambda spec: SHAPE)
    about = {"recipe": "rush", "model": "mine"}
    mine = Smoothed(linear, noise=Gaussian(0.2), votes=4, shape=SHAPE, name="mine@4", about=about)
    names = [name for name, _, _ in room._peers(mine, data, tmp_path)]
    first, second = ["at-c", "plain-c", "at-c-s1"], ["noise-c@64", "probe-c@64", "mine-s1@64", "noise-c-s1@64", "noise-c-x4@64"]
    assert names == first + second


def test_forms(linear) -> None:
    defense, nothing = smooth(linear), lambda name: pytest.fail(name)
    assert form_of_trial(defense, "", nothing) is defense
    other = form_of_trial(defense, "votes=7", nothing)
    assert (other.draws, other.name, other.body is defense.body) == (7, "smooth@7", True) and defense.draws == 4
    bank = form_of_trial(defense, "bank=3", nothing)
    assert bank.deterministic and bank.identity()["bank"] == 3
    plain = Deterministic(linear, shape=SHAPE, name="plain")
    assert form_of_trial(defense, "model=plain", lambda name: plain) is plain
    for on, load in (("still", nothing), ("still:model=plain", lambda name: plain)):
        still = form_of_trial(plain if on == "still" else defense, on, load)
        images, stream = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), Stream(0, "x", torch.arange(3))
        assert still.draws == 1 and still.noise.scale == 0
        assert torch.allclose(still.predict(images, stream).probabilities, plain.predict(images, stream).probabilities)
    with pytest.raises(BadInput, match="without noise"):
        form_of_trial(defense, "still", nothing)
    with pytest.raises(BadInput, match="no form"):
        form_of_trial(defense, "upside-down", nothing)


def test_a_network_that_gives_probabilities_goes_through_the_other_door_too(linear) -> None:
    soft = nn.Sequential(linear, nn.Softmax(1)).eval()
    plain = Deterministic(soft, shape=SHAPE, outputs="probabilities", name="soft")
    still = form_of_trial(plain, "still", lambda name: plain)
    images, stream = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), Stream(0, "x", torch.arange(3))
    assert torch.allclose(still.predict(images, stream).probabilities, plain.predict(images, stream).probabilities)


def test_a_multiple_of_an_l2_radius_is_not_cut_to_the_box(linear, run) -> None:
    for norm, eps, expected in (("l2", 0.5, [2.0, 4.0]), ("linf", 0.3, [1.0, 1.0])):
        evidence = run(Deterministic(linear, shape=SHAPE, name="plain"), norm=norm, eps=eps, only=["T10"]).evidence[0]
        assert [named(evidence, "T10", f"{scale} eps").eps for scale in (4, 8)] == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 0.0}, "no radius"),
        ({"eps": -1.0}, "no radius"),
        ({"eps": 1.5}, "no radius"),
        ({"norm": "l2", "eps": 1.01 * math.sqrt(math.prod(SHAPE))}, "no radius"),  # beyond the diameter of the box
        ({"norm": "l2", "eps": 1e300}, "no radius"),
        ({"eps": math.nan}, "no radius"),
        ({"budget": "quik"}, "did you mean 'quick'"),
        ({"only": ["T99"]}, "experiment"),
        ({"norm": "l3"}, "norm"),
        ({"shard": (3, 2)}, "shard"),
    ],
)
def test_bad_input_before_anything_runs(linear, run, options, says, tmp_path) -> None:
    with pytest.raises(BadInput, match=says):
        run(smooth(linear), **options)
    assert not (tmp_path / "settle").exists()


def test_two_of_one_name(linear, data, tmp_path) -> None:
    with pytest.raises(BadInput, match="share a name"):
        settle([smooth(linear), smooth(linear)], data, budget="quick", out=tmp_path)


def test_rates_leave_the_count_of_passes_alone_and_do_without_gradients(linear, data) -> None:
    defense = smooth(linear)
    defense.passes.forwards, defense.passes.backwards = 5, 7
    assert all(0 < seconds < 1 for seconds in rates(defense, data))
    assert (defense.passes.forwards, defense.passes.backwards) == (5, 7)

    class Blind(Plain):
        def gradient(self, images, labels, loss, draws, stream):
            raise NotImplementedError

    assert all(0 < seconds < 1 for seconds in rates(Blind(linear, 0), data))


def test_other_code_around_the_same_weights_is_not_taken_for_the_same_defence(linear, run) -> None:
    """What has no weights does not enter a cell's key: a record of it would be handed out for the other network."""

    class Before(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.network, self.function = linear, function

        def forward(self, x):
            return self.network(self.function(x))

    def made(function):
        return Deterministic(Before(function).eval(), shape=SHAPE, name="mine")

    first = run(made(lambda x: x), only=["T0"])
    assert first.complete and run(made(lambda x: x), only=["T0"]).complete
    for other in (lambda x: (2 * x).round() / 2, lambda x: x + 0.0 * x.detach() - x + x.detach()):
        with pytest.raises(BadInput, match="does not do what 'mine' did"):
            run(made(other), only=["T0"])


@pytest.mark.parametrize("law", [Gaussian(0.1), Laplace(0.05)], ids=lambda v: str(v))
def test_an_attack_below_a_certificate_is_a_contradiction(linear, run, monkeypatch, law) -> None:
    """Scores that say nothing is right where a certificate holds: the run itself finds it, in whichever room it lies.

    An l1 certificate meets attacks in the largest l2 ball that it holds.
    """
    from rush_bench.evaluation import runner

    original = runner.score

    def lying(defense, attacked, labels, *rest):
        scored = original(defense, attacked, labels, *rest)
        rows = np.arange(len(labels))
        scored["counts"][rows, (labels + 1) % 5] += scored["correct"]
        scored["counts"][rows, labels] = 0
        return scored | {"correct": np.zeros_like(scored["correct"])}

    monkeypatch.setattr(runner, "score", lying)
    defense = Smoothed(_sure(linear), noise=law, votes=4, shape=SHAPE, name="sure@4")
    found = run(defense, only=["T12"])
    assert {entry.result.labels["norm"] for entry in found.evidence[0].of("T12")} == {"l2"}
    assert found.contradictions and all(one.contradiction for one in found.contradictions)
    monkeypatch.undo()
    assert not run(defense, only=["T12"], seed=1, out=room.Path(found.folder).parent / "other").contradictions


def _sure(linear: nn.Module) -> nn.Module:
    """Its logits times 30: the noise hardly ever changes a label."""
    sure = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    sure[1].weight.data, sure[1].bias.data = 30 * linear[1].weight.data, 30 * linear[1].bias.data
    return sure.eval()


def test_passes_of_pgd_are_those_of_the_plan(linear, run) -> None:
    """The cost that is said beforehand is what the records then have, up to what ends early."""
    heard = []
    found = run(smooth(linear), only=["T1"], before=lambda planned: heard.extend(planned) or True)
    made = sum(entry.result.frame["forwards"].sum() for entry in found.evidence[0].of("T1"))
    scored = 24 * 4 * sum(entry.result.identity["repeats"] for entry in found.evidence[0].of("T1"))
    assert heard[0].costs["T1"].forwards == pytest.approx(made + scored)
    assert PGD().passes(smooth(linear))[0] > 0
