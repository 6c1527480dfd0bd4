"""Settings: what a number may be is declared once, and holds in Python, on the command line and in every registered class."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from rush_bench.certificates.sampling import Sampling
from rush_bench.errors import BadInput
from rush_bench.registry import attacks, recipes
from rush_bench.settings import Count, NonNegative, Range, Settings, Share, check, hints, override, to_dict
from rush_bench.threats import Threat
from rush_bench.training.inner import InnerSettings
from rush_bench.training.options import NetworkSettings, Optimisation, RunSettings

ABSURD = (-1, -0.5, 0, 1e300, math.inf, -math.inf, math.nan)
SHARED = (InnerSettings, NetworkSettings, Optimisation, RunSettings, Sampling)


@dataclass(frozen=True)
class Inner(Settings):
    steps: Count = 20
    step: Annotated[float, Range(0, 4, above=True)] = 0.25
    parts: tuple[Share, ...] = (0.5,)
    most: Count | None = None
    kind: Literal["a", "b", 2] = "a"
    free: float = 0.0
    on: bool = True


@dataclass(frozen=True)
class Longer(Inner):
    steps: int = 100  # another default keeps the range
    step: Annotated[float, Range(0, 100)] = 0.0  # another range takes its place


@dataclass(frozen=True)
class Outer(Settings):
    inner: Inner = field(default_factory=Inner)
    epochs: NonNegative = 1.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("steps", 0, "a whole number, at least 1 and at most 10000000"),
        ("steps", 2.5, "a whole number"),
        ("steps", 10**400, "a whole number"),
        ("free", 10**400, "a finite number"),
        ("steps", math.inf, "a whole number"),
        ("steps", math.nan, "a whole number"),
        ("steps", True, "a whole number"),
        ("step", 0, "above 0 and at most 4"),
        ("step", 4.5, "above 0 and at most 4"),
        ("step", math.nan, "a finite number, above 0"),
        ("parts", (0.5, 1.5), "at least 0 and at most 1"),
        ("most", -1, "a whole number, at least 1"),
        ("free", math.inf, "a finite number"),
        ("kind", "c", "named 'c'; known: 2, a, b"),
        ("on", 2, "true or false"),
    ],
)
def test_what_does_not_fit_is_refused_in_python_and_in_text(key: str, value: Any, says: str) -> None:
    with pytest.raises(BadInput, match=f"{key}.*{says}"):
        Inner(**{key: value})
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if value is not True:  # as text, no number
        with pytest.raises(BadInput, match=rf"inner\.{key}.*{says}"):
            override(Outer(), {f"inner.{key}": text})
    with pytest.raises(BadInput, match=rf"pgd\.{key}.*{says}"):
        override(Inner(), {key: value}, name="pgd")


def test_text_becomes_a_value_of_its_type() -> None:
    text = {"inner.steps": "1e3", "inner.step": "8/255", "inner.parts": "0.1, 1", "inner.kind": "2", "inner.on": "no"}
    made = override(Outer(), text, {"inner": {"most": 7}, "epochs": 3})
    assert made == Outer(Inner(1000, 8 / 255, (0.1, 1.0), 7, 2, 0.0, False), 3.0)
    assert override(made, {"inner.most": "none"}).inner.most is None
    assert override(Outer(), to_dict(made)) == made


def test_a_subclass_keeps_the_range_of_a_setting() -> None:
    assert hints(Longer)["steps"] == Count
    with pytest.raises(BadInput, match="steps=0 must be a whole number, at least 1"):
        Longer(steps=0)
    assert Longer(step=50.0).step == 50


@pytest.mark.parametrize("key", ["inner", "epochs.more", "inner.stps", "nothing"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(BadInput, match=key.split(".")[-1]):
        override(Outer(), {key: "1"})


@pytest.mark.parametrize("eps", ABSURD[:3] + ABSURD[4:])
def test_a_threat_has_a_radius(eps: float) -> None:
    with pytest.raises(BadInput, match="eps"):
        Threat("linf", eps)


def numbers_of(made: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of all numeric settings with the type of each, groups included."""
    found = []
    for one in dataclasses.fields(made):
        value, hint = getattr(made, one.name), hints(type(made))[one.name]
        if dataclasses.is_dataclass(value):
            found += numbers_of(value, f"{prefix}{one.name}.")
        elif any(kind in _kinds(hint) for kind in (int, float)):
            found.append((prefix + one.name, hint))
    return found


def _kinds(hint: Any) -> set[Any]:
    inner = typing.get_args(hint) if typing.get_origin(hint) is not Literal else ()
    return {hint, *(kind for one in inner for kind in _kinds(one))}


def registered() -> list[Any]:
    made = {name: attacks.load(name)() for name in attacks.entries}
    made |= {name: recipes.load(name).settings for name in recipes.entries} | {kind.__name__: kind() for kind in SHARED}
    return [pytest.param(one, id=name) for name, one in made.items()]


@pytest.mark.parametrize("made", registered())
def test_every_number_of_every_class_says_what_it_may_be(made: Any) -> None:
    """No numeric setting takes what it does not declare, and each declares something: -1, inf and NaN are nowhere a number."""
    for key, hint in numbers_of(made):
        several = "tuple" in str(hint)
        refused = []
        for value in ABSURD:
            value = (value,) if several else value
            try:
                check(key, hint, value)
            except BadInput:
                refused.append(value)
                text = str(value).strip("(,)")
                for layer in ({key: value}, {key: text}):
                    with pytest.raises(BadInput, match=key.rpartition(".")[2]):
                        override(made, layer)
        least = 2 if key.endswith("mean") else 4  # a mean over pixels may be any number
        assert len(refused) >= least, f"{type(made).__name__}.{key} accepts too much: it refuses only {refused}"
