"""Defences of the user's own: what a Python target gives, and what is given to the functions of the package."""

import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rush_bench.defenses.base import Defense
from rush_bench.defenses.probe import SHAPE
from rush_bench.defenses.smoothed import Deterministic, Network, Smoothed
from rush_bench.errors import BadInput, RushBenchError, unknown_name
from rush_bench.noise import Noise, noise_from

ABOUT = ("protocol", "extra_data", "architecture")  # what a table says of a model beside its name
NAME = re.compile(r"[\w(][\w .()+=-]{0,79}")


def from_target(
    target: str,
    *,
    noise: Noise | str | None = None,
    votes: int | None = None,
    shape: tuple[int, int, int] = SHAPE,
    name: str | None = None,
    about: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Defense]:
    """A user's own network from `package.module:function`, which returns a Defense or an `nn.Module` in eval mode.

    With `noise` a module is smoothed, at one vote and at `votes` (64); without, it is deterministic. One that draws at random
    itself is refused: the function is to return it as a `Randomised`. `name` stands in tables in place of
    `package.module.function`, `about` has the keys of ABOUT. `options` are those of the defence; `defaults` are options
    that a Defense which was returned need not follow. Of what is asked for, all is applied or a BadInput.
    """
    if name is not None:
        check_given_name(name)
    about = dict(about or {})
    for key in about:
        if key not in ABOUT:
            raise unknown_name("label", key, ABOUT)
    built, called = made_by(target), name or target.replace(":", ".")
    if isinstance(built, Defense):
        return [_adjusted(built, target, name, about, {"noise": noise_from(noise), "draws": votes, **options})]
    if votes is not None and noise is None:
        raise BadInput("votes need noise: without it every vote is the same")
    if not isinstance(built, nn.Module):
        raise BadInput(f"{target} gave {type(built).__name__}; it must return an nn.Module or a Defense")
    options = {"shape": shape, "about": about, **(defaults or {}), **options}
    if noise is None:
        return [Deterministic(built, name=called, **options)]
    return [Smoothed(built, noise=noise, votes=m, name=f"{called}@{m}", **options) for m in sorted({1, votes or 64})]


def check_given_name(name: str) -> None:
    """Refuse a name that could not be chosen on a command line, in a list or a pattern, or shown."""
    if not NAME.fullmatch(name):
        raise BadInput(f"name {name!r} must be 1 to 80 letters, digits, spaces and .()+=-, so that it can be chosen and shown")


def made_by(target: str) -> Any:
    """What `package.module:function` is or returns; BadInput in one line for whatever goes wrong in there."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not attribute or not module_name or "/" in module_name:
        raise BadInput(f"--model takes package.module:function, not {target!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # anybody's code
        raise BadInput(
            f"cannot import {module_name!r} ({_where(error)}); run from the folder that holds it, or install it"
        ) from error
    if not hasattr(module, attribute):
        raise BadInput(f"{module_name!r} has no {attribute!r}")
    found = getattr(module, attribute)
    if isinstance(found, nn.Module | Defense) or not callable(found):
        return found
    try:
        return found()
    except RushBenchError:
        raise
    except (Exception, SystemExit) as error:  # anybody's code
        raise BadInput(
            f"{target} is to return an nn.Module or a Defense when called without arguments: {_where(error)}"
        ) from error


def _where(error: BaseException) -> str:
    """An error in a line, and the file and line that it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if last.filename.startswith("<frozen") else f"{text}, {Path(last.filename).name}:{last.lineno}"


def _adjusted(defense: Defense, target: str, name: str | None, about: dict[str, str], asked: dict[str, Any]) -> Defense:
    """A Defense under the name and labels that were asked for; BadInput for what it does not do and cannot be made to."""
    for key, wanted in asked.items():
        if wanted in (None, getattr(defense, key, None)) or (key == "memory" and isinstance(defense, Network)):
            continue
        what = "votes" if key == "draws" else key
        raise BadInput(
            f"{target} gives a Defense, which is as it was made: {what} cannot be set from outside; say it in the function, or "
            "let that return the network"
        )
    if isinstance(defense, Network):
        if asked.get("memory"):
            defense.body.limit(asked["memory"])
        defense.about = {**defense.about, **about}
    elif about:
        raise BadInput(f"{target} gives a {type(defense).__name__}, whose labels() are its own; say {', '.join(about)} there")
    if name is not None:
        defense.name = f"{name}@{defense.draws}" if defense.draws else name
    return defense


def as_defenses(given: Any) -> list[Defense]:
    """One defence or several, as a list; BadInput that says how for anything else."""
    one_alone = isinstance(given, Defense | nn.Module | str) or not isinstance(given, Iterable)
    listed: list[Any] = [given] if one_alone else list(given)
    for item in listed:
        if isinstance(item, nn.Module):
            raise BadInput(
                "a bare network cannot be attacked: wrap it, as in rb.Deterministic(net, shape=(3, 32, 32)), or "
                "rb.Smoothed(net, noise=rb.Gaussian(0.25))"
            )
        if not isinstance(item, Defense):
            raise BadInput(f'{item!r} is no defence; load a model with rb.load_defense("rush@64"), or wrap your own network')
    return listed
