"""What an attack sees: a classifier under attack, its predictions and its gradients."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rush_bench.defenses.aggregate import Aggregation, objective_named
from rush_bench.defenses.losses import Loss
from rush_bench.devices import wide
from rush_bench.errors import BadInput, RushBenchError
from rush_bench.noise import Stream

LONGEST = 200  # letters of a name
UNKNOWN_LOSS = (BadInput, NotImplementedError, LookupError, ValueError)  # what `gradient` raises for a loss unknown to it


@dataclass(frozen=True)
class Prediction:
    """One prediction a row: labels (B,) int64, votes (B, K) int64, mean probabilities (B, K). Votes of an image that are all 0
    are taken as the label's.

    `scores` (B, K), where a defence gives them: the log of the mean probabilities in float64, which tells two points apart
    where probabilities are rounded to the same number, be the logits tiny or huge. Several predictions of each image have one
    more dimension in front (see `Defense.predictions`).
    """

    labels: Tensor
    votes: Tensor
    probabilities: Tensor
    scores: Tensor | None = None

    @property
    def logs(self) -> Tensor:
        """`scores`, or else the log of the probabilities, bounded below, in float64."""
        if self.scores is not None:
            return self.scores
        return self.probabilities.to(wide(self.probabilities.device)).clamp_min(1e-30).log()


@dataclass(frozen=True)
class Gradient:
    """Gradient of the loss in the images (B, C, H, W), and the loss itself (B,), both float32.

    `scores` (B, K), where a defence gives them: the log-probabilities over the draws that the loss was taken of.
    """

    gradient: Tensor
    loss: Tensor
    scores: Tensor | None = None


@dataclass
class Passes:
    """Rows that went forward and backward through the network so far: the cost that records report."""

    forwards: int = 0
    backwards: int = 0


class Defense:
    """A classifier under attack. Images are float32 in [0,1], (B, C, H, W).

    A custom defence sets the attributes and gives `predict` and `gradient`; `bank` too when it is randomised. `gradient`
    raises BadInput, NotImplementedError or KeyError for a loss that it does not know.
    `draws` is the number of votes m of one prediction, 0 for a deterministic classifier.
    What `predict` and `gradient` of any subclass return is checked: labels that are no classes, negative votes, parts of
    another shape and less than 1 draws of a gradient are errors, and so is a value that is not finite, with the image's name.

    Examples:
        >>> import torch, rush_bench as rb
        >>> from rush_bench.defenses import Gradient, Prediction
        >>> class Constant(rb.Defense):
        ...     name, classes, shape = "constant", 2, (1, 8, 8)
        ...     def predict(self, images, stream):
        ...         votes = torch.tensor([[1, 0]]).expand(len(images), 2)
        ...         return Prediction(votes.argmax(1), votes, votes.float())
        ...     def gradient(self, images, labels, loss, draws, stream):
        ...         return Gradient(torch.zeros_like(images), torch.zeros(len(images)))
        >>> Constant()
        Constant(constant, deterministic, 1x8x8 to 2 classes)
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    draws: int = 0
    device: torch.device = torch.device("cpu")
    precision: str = "float32"  # of the search; float32 alone judges
    # what is drawn for an image depends on (seed, purpose, image, draw) alone (A5), not on its batch
    draws_per_image: bool = True
    steepens: bool = False  # whether `gradient` knows `ce@steep`, of a defence `to_climb`
    saturated: bool = False  # whether its logits are so far apart that float32's cross-entropy has no gradient

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, checked in _CHECKS.items():
            if name in vars(cls):
                setattr(cls, name, checked(vars(cls)[name]))

    def __repr__(self) -> str:
        kind = "deterministic" if self.deterministic else f"{self.draws} votes"
        law = getattr(self, "noise", None)
        size = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({self.name}, {f'{law}, ' if law else ''}{kind}, {size} to {self.classes} classes)"

    @functools.cached_property
    def passes(self) -> Passes:
        """What it has cost so far; a defence that counts nothing stays at 0."""
        return Passes()

    @property
    def deterministic(self) -> bool:
        """Whether two predictions of the same image always agree."""
        return self.draws == 0

    def predict(self, images: Tensor, stream: Stream) -> Prediction:
        """One prediction per image, from draws 0..m-1 of the stream."""
        raise NotImplementedError(f"{type(self).__name__} has no predict(images, stream)")

    def predictions(self, images: Tensor, stream: Stream, repeats: int, *, exact: bool = True) -> Prediction:
        """`repeats` independent predictions per image: labels (repeats, B), votes and probabilities (repeats, B, K).

        The k-th is `predict` on draws k m..(k+1) m - 1 of the stream; a defence may put them into one batch. Without `exact`
        an equivalent network will do that is faster and differs by float32's rounding: for a search, never for a judgement.
        """
        each = [self.predict(images, stream.skip(k * max(self.draws, 1))) for k in range(repeats)]
        return Prediction(*(_stack([getattr(prediction, f.name) for prediction in each]) for f in fields(Prediction)))

    def gradient(self, images: Tensor, labels: Tensor, loss: str, draws: int, stream: Stream) -> Gradient:
        """Gradient of a loss of the log of the mean probability over `draws` draws (RUSH eq. 7).

        `loss` is a name in LOSSES, or in TARGETED (labels are then (B, 2): the true class and the target); `@logits` or
        `@vote` after it averages the draws otherwise, see `rush_bench.defenses.aggregate`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient(...); square needs none")

    def of_votes(self, votes: int) -> "Defense":
        """The same defence voting over so many draws; itself where it does not say how."""
        return self

    def base(self) -> "Defense":
        """The same defence without its randomness (smoothing removed); itself where there is none."""
        if self.deterministic:
            return self
        raise BadInput(f"{self.name} is randomised but has no base(); add one, or give the transfer attack another source")

    def bank(self, size: int, seed: int) -> "Defense":
        """The same defence with its draws fixed, hence deterministic; itself where it is deterministic already."""
        if self.deterministic:
            return self
        raise BadInput(f"{self.name} is randomised but has no bank(size, seed); add one, or leave out the aa attack")

    def as_module(self, stream: Stream) -> nn.Module:
        """Logits for attacks of other packages; see the function `as_module`."""
        raise BadInput(
            f"{type(self).__name__} has no as_module(stream), which autoattack needs; add one, or leave that attack out"
        )

    def loss(self, images: Tensor, labels: Tensor, loss: str, stream: Stream) -> Tensor:
        """The loss (B,) of one prediction at images (B, C, H, W), without its gradient."""
        function, averaging = self._objective(loss, images, stream)
        logs = averaging.each(self.predict(images, stream).logs[:, None])[:, 0]
        return function(averaging.scores(logs).log_softmax(1), labels)

    def _objective(self, loss: str, images: Tensor, stream: Stream) -> tuple[Loss, Aggregation]:
        """The loss and how its draws are averaged, for these images."""
        return objective_named(loss)

    def to_climb(self, images: Tensor, stream: Stream) -> "Defense":
        """The same, for an attack that begins at these images (B, C, H, W) of the stream: `ce@steep` of them is one function
        from there on, whatever it asks for. Itself where it does not say that it `steepens`."""
        return self

    def unsaturated(self) -> "Defense":
        """The same labels from logits that are closer together; itself where it is not `saturated`."""
        return self

    def identity(self) -> dict[str, Any]:
        """What decides its behaviour, JSON-able: the key of a record (weights digest, noise, votes)."""
        kind = type(self)
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "name": self.name, "draws": self.draws}

    def labels(self) -> dict[str, Any]:
        """What a table says about it: defense, model, recipe, votes, protocol, architecture, ..."""
        return {"defense": self.name, "model": self.name, "votes": self.draws}


def check_shown(name: Any) -> None:
    """Refuse a defence's name that no table or list can hold."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable() or "," in name:
        raise BadInput(f"name {name!r} must be text of 1 to {LONGEST} letters on one line, without a comma: lists have those")


def check_images(images: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse images of another shape, not float32, not finite or outside [0,1], naming the first at fault."""
    if images.dtype != torch.float32 or tuple(images.shape[1:]) != tuple(shape):
        raise BadInput(
            f"images are {images.dtype} {tuple(images.shape)}; this defence takes float32 (B, {', '.join(map(str, shape))})"
        )
    if not len(images):
        return
    low, high = images.aminmax()  # NaN where any pixel is
    if not (low >= 0) & (high <= 1):
        wrong = ~((images >= 0) & (images <= 1)).flatten(1).all(1)
        raise BadInput(
            f"image {int(wrong.int().argmax())} of the batch has pixels outside [0,1] or not finite; scale pixels to [0,1]"
        )


def check_finite(values: Tensor, images: Tensor | None, what: str) -> None:
    """A value that is not finite is an error that names the image: its position in the data set, where that is known."""
    if not (finite := values.isfinite()).all():
        row = int((~finite.flatten(1).all(1) if values.ndim > 1 else ~finite).int().argmax())
        known = images is not None and images.numel() == len(values)
        image = f"image {int(images[row])}" if images is not None and known else f"image {row} of the batch"
        raise RushBenchError(f"{what} of {image} is not finite; look at the network there, {REMEDY}")


def _stack(parts: list[Tensor | None]) -> Any:
    """Each prediction's part along a new dimension; None where a defence does not give it."""
    given = [part for part in parts if part is not None]
    return torch.stack(given) if len(given) == len(parts) else None


REMEDY = "such as a square root, logarithm or division at 0"


def _checked_predict(predict: Callable[..., Prediction]) -> Callable[..., Prediction]:
    @functools.wraps(predict)
    def checked(self: Defense, images: Tensor, stream: Stream, *repeats: int, **named: Any) -> Prediction:
        found = predict(self, images, stream, *repeats, **named)
        leading = (*repeats, *(named[name] for name in ("repeats",) if name in named))
        _check_parts(found, (*leading, len(images)), self.classes, f"{type(self).__name__}.{predict.__name__}")
        if found.probabilities.requires_grad:  # no search goes through a prediction
            scores = None if found.scores is None else found.scores.detach()
            found = replace(found, votes=found.votes.detach(), probabilities=found.probabilities.detach(), scores=scores)
        labels, probabilities, votes = found.labels, found.probabilities, found.votes
        within = (labels >= 0).all() & (labels < self.classes).all()
        counted = (votes >= 0).all() & (votes.sum(-1) > 0).all()
        if not within & (counted & probabilities.isfinite().all()).to(within.device):  # one number for the host to wait for
            check_finite(probabilities.transpose(0, -2), stream.images, "the prediction")  # images first
            if not (votes >= 0).all():
                raise RushBenchError(
                    f"{type(self).__name__}.{predict.__name__} of {self.name} gave votes that are negative or no numbers; "
                    "they are how many draws each class got, as in one_hot(labels, classes), or all 0"
                )
            if not within:
                raise RushBenchError(
                    f"{type(self).__name__}.{predict.__name__} of {self.name} gave labels from {int(labels.min())} to "
                    f"{int(labels.max())}; they must be classes from 0 to {self.classes - 1}, such as probabilities.argmax(1)"
                )
            label = torch.zeros_like(votes).scatter(-1, labels[..., None], max(self.draws, 1))
            return replace(found, votes=torch.where(votes.sum(-1, keepdim=True) == 0, label, votes))
        return found

    return checked


def _check_parts(found: Any, rows: tuple[int, ...], classes: int, who: str) -> None:
    """Refuse what is no prediction of so many rows: shapes and types, whatever the values."""
    wanted = f"a Prediction of labels {rows} int64 and, {(*rows, classes)} each, votes and probabilities"
    if not isinstance(found, Prediction):
        raise RushBenchError(f"{who} returned {type(found).__name__}; it must return {wanted}")
    for name, shape in (("labels", rows), ("votes", (*rows, classes)), ("probabilities", (*rows, classes))):
        part = getattr(found, name)
        if not isinstance(part, Tensor):
            raise RushBenchError(f"{who} returned {name} that are {type(part).__name__}, no tensor; it must return {wanted}")
        kinds = {"labels": not part.is_floating_point() and part.dtype != torch.bool, "votes": True}
        if tuple(part.shape) != shape or not kinds.get(name, part.is_floating_point()):
            given = f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
            raise RushBenchError(f"{who} returned {name} {given}; it must return {wanted}")


def _checked_gradient(gradient: Callable[..., Gradient]) -> Callable[..., Gradient]:
    @functools.wraps(gradient)
    def checked(self: Defense, images: Tensor, labels: Tensor, loss: str, draws: int, stream: Stream) -> Gradient:
        if draws < (0 if self.deterministic else 1):
            raise BadInput(f"a gradient of {self.name} takes at least 1 draw, not {draws}")
        found = gradient(self, images, labels, loss, draws, stream)
        _check_gradient_parts(found, images, f"{type(self).__name__}.gradient")
        fine = found.loss.isfinite() & found.gradient.flatten(1).isfinite().all(1)
        if not fine.all():  # one number for the host to wait for; which of the two it is, is asked then
            check_finite(found.loss, stream.images, "the loss")
            check_finite(found.gradient, stream.images, "the gradient")
        return found

    return checked


def _check_gradient_parts(found: Any, images: Tensor, who: str) -> None:
    """Refuse what is no gradient at these images: shapes and types, whatever the values."""
    shapes = {"gradient": tuple(images.shape), "loss": (len(images),)}
    wanted = f"a Gradient of gradient {shapes['gradient']} and loss {shapes['loss']}, both float32"
    if not isinstance(found, Gradient):
        raise RushBenchError(f"{who} returned {type(found).__name__}; it must return {wanted}")
    for name, shape in shapes.items():
        part = getattr(found, name)
        if not isinstance(part, Tensor) or tuple(part.shape) != shape or part.dtype != torch.float32:
            known = isinstance(part, Tensor)
            given = f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" if known else type(part).__name__
            raise RushBenchError(f"{who} returned {name} {given}; it must return {wanted}")


_CHECKS: dict[str, Callable[..., Any]] = {
    "predict": _checked_predict,
    "predictions": _checked_predict,
    "gradient": _checked_gradient,
}


def as_module(defense: Defense, stream: Stream | None = None) -> nn.Module:
    """An `nn.Module` with logits (B, K) for attacks of other packages: the log of the mean probability over the draws of
    `defense`, from `stream` (default: a stream of seed 0).

    CE on these logits is RUSH's eq. 7, and DLR and CW losses are well posed on them (sources S5.7). A bank or a deterministic
    defence gives a plain function of the image; a randomised one draws anew at each call. Memory stays within the budget.

    Examples:
        >>> import torch, rush_bench as rb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> module = rb.as_module(rb.Smoothed(net, noise="uniform:0.3", shape=(1, 8, 8)))
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if not isinstance(defense, Defense):
        fix = "; make a defence of it first: rb.Deterministic(network, shape=...)" if isinstance(defense, nn.Module) else ""
        raise BadInput(f"as_module takes a defence, not {type(defense).__name__}{fix}")
    return _Checked(defense.as_module(stream or Stream(0, "module")))


class _Checked(nn.Module):
    """A module whose outputs, and whose gradient in its input, are finite or an error that names the row of the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.view_as(images)
            images.register_hook(lambda gradient: check_finite(gradient, None, "the gradient"))
        scores = self.module(images)
        check_finite(scores.detach(), None, "the prediction")
        return scores
