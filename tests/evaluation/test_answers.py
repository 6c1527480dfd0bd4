"""Defences of somebody's own: refused before anything is measured where they draw elsewhere or look at their batch."""

import pytest
import torch
import torch.nn.functional as F

from rush_bench.datasets import as_images
from rush_bench.defenses import Defense, Gradient, Passes, Prediction, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation.answers import check_answers
from rush_bench.evaluation.runner import attack

SHAPE = (1, 4, 4)


class Own(Defense):
    """Logits of a linear network, and what is done with them, the images and the stream."""

    def __init__(self, does=lambda net, x, stream: net(x), draws=0, hard=False, per_image=True):
        self.name, self.classes, self.shape, self.draws, self.passes = "own", 5, SHAPE, draws, Passes()
        self.draws_per_image, self.does, self.hard, self.mean = per_image, does, hard, 0.5
        weight = 3 * torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
        self.net = lambda x: (x.flatten(1) - 0.5) @ weight.T

    def predict(self, images, stream):
        p = self.does(self.net, images, stream).softmax(1)
        votes = F.one_hot(p.argmax(1), 5)
        return Prediction(p.argmax(1), votes, votes.float() if self.hard else p)

    def gradient(self, images, labels, loss, draws, stream):
        return Gradient(torch.zeros_like(images), torch.ones(len(images)))


def noisy(net, x, stream):
    return net(x + 0.3 * (stream.uniform(len(x), 1, SHAPE)[:, 0] - 0.5))


def by_batch(net, x, stream):
    return net(x + 0.3 * (stream.at(None).uniform(len(x), 1, SHAPE)[:, 0] - 0.5))


def images_of(count):
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels[0, 0, 0, 0] = 255
    return as_images(pixels, torch.arange(count) % 5, classes=list("abcde"))


REFUSED = {
    "mean": (lambda: Own(lambda net, x, s: net(x) - net(x).mean(0)), "other images of the batch"),
    "a hundredth": (lambda: Own(lambda net, x, s: net(x) - 0.01 * net(x).mean(0)), "other images of the batch"),
    "number": (lambda: Own(lambda net, x, s: net(x) * (1 if len(x) > 2 else -1)), "other images of the batch"),
    "brightness": (lambda: Own(lambda net, x, s: net(x / x.mean()), draws=1), "other images of the batch"),
    "elsewhere": (lambda: Own(lambda net, x, s: net(x + torch.randn_like(x))), "from the stream alone"),
    "elsewhere, labels alone": (lambda: Own(lambda net, x, s: net(x + torch.randn_like(x)), 1, True), "from the stream alone"),
    "says it draws nothing": (lambda: Own(noisy), "draws = 0 says"),
    "by place": (lambda: Own(by_batch, 1), "set draws_per_image = False"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_number_may_come_of_is_refused_before_anything_runs(kind, tmp_path):
    make, says = REFUSED[kind]
    with pytest.raises(BadInput, match=says):
        attack(make(), "linf8-quick", images_of(20), out=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize(
    "make",
    [
        Own,
        lambda: Own(noisy, 1),
        lambda: Own(noisy, 1, hard=True),
        lambda: Own(by_batch, 1, per_image=False),
        lambda: Own(lambda net, x, s: net(x).half().float()),
    ],
)
def test_what_keeps_to_the_stream_and_the_image_is_taken(make, count):
    state, defense = torch.get_rng_state(), make()
    check_answers(defense, images_of(count))
    assert torch.equal(torch.get_rng_state(), state) and defense.passes == Passes()


def test_networks_that_were_asked_already_are_not_asked_again(linear, monkeypatch):
    class Less(Smoothed):
        def predict(self, images, stream):
            found = super().predict(images, stream)
            p = (found.logs - found.logs.mean(0)).softmax(1).float()
            return Prediction(p.argmax(1), F.one_hot(p.argmax(1), 5), p)

    with pytest.raises(BadInput, match="other images of the batch"):
        check_answers(Less(linear, noise="uniform:0.1", votes=3, shape=SHAPE), images_of(20))
    plain = Smoothed(linear, noise="uniform:0.1", votes=3, shape=SHAPE)
    monkeypatch.setattr(plain, "predictions", None)
    check_answers(plain, images_of(20))


def test_one_that_fails_is_left_to_its_cells():
    def fails(net, x, stream):
        raise ValueError("no such thing")

    check_answers(Own(fails), images_of(5))
