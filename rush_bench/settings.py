"""Settings are frozen dataclasses; layers of plain values (preset, TOML file, `--set key=value`) override their defaults.

Nested dataclasses take dotted keys (`pretrain.lr`). Fractions parse (`8/255`). Unknown keys, wrong types and numbers out of
range are BadInput. What a number may be is declared beside its default, and holds however the settings are made:

    class Search(Settings):
        steps: Count = 20
        step: Annotated[float, Range(0, 4, above=True)] = 0.25
"""

import dataclasses
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rush_bench.errors import BadInput, unknown_name

S = TypeVar("S")


@dataclass(frozen=True)
class Range:
    """What a number may be: `low` to `high`, without `low` itself where `above`, without `high` where `below`. Finite."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        """Whether a number is in it; inf and NaN never are."""
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return math.isfinite(number) and over and under

    def __str__(self) -> str:
        ends = [f"{'above' if self.above else 'at least'} {self.low:.10g}"] if math.isfinite(self.low) else []
        ends += [f"{'below' if self.below else 'at most'} {self.high:.10g}"] if math.isfinite(self.high) else []
        return " and ".join(ends) or "finite"


MOST = 10_000_000  # of anything that is counted: a larger number is a slip
Count = Annotated[int, Range(1, MOST)]
Several = Annotated[int, Range(2, MOST)]  # such as a batch whose images are compared with each other
Whole = Annotated[int, Range(0, MOST)]  # 0 is none, or leaves the number to something else
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Level = Annotated[float, Range(0, 1, above=True, below=True)]


class Settings:
    """Base of settings: a value of the wrong type or out of range is refused, in Python as on the command line.

    A subclass that gives a setting another default keeps its range, unless it declares one of its own.
    """

    def __post_init__(self) -> None:
        own: Any = self  # every subclass is a dataclass
        known = hints(own.__class__)
        for field in dataclasses.fields(own):
            check(field.name, known[field.name], getattr(own, field.name))


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The type of each setting of a class, with its range, which may stand in a base class."""
    found: dict[str, Any] = {}
    bare: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        plain = typing.get_type_hints(base)
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            if hint != plain[name] or bare.get(name) != plain[name]:  # it has a range, or another type than before
                found[name], bare[name] = hint, plain[name]
    return found


def parts(text: str | None) -> list[str]:
    """Words between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def check(key: str, hint: Any, value: Any) -> None:
    """BadInput, with what is allowed, unless a value has the type and lies in the range of a hint."""
    if not fits(hint, value):
        if typing.get_origin(hint) is typing.Literal:
            raise unknown_name(f"value for {key}", str(value), map(str, typing.get_args(hint)))
        raise _wrong(key, hint, value)


def fits(hint: Any, value: Any) -> bool:
    """Whether a value has the type and lies in the range of a hint."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(options[0], value) and all(allowed.holds(value) for allowed in options[1:])
    if origin in (types.UnionType, typing.Union):
        return any(fits(option, value) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(options[0], item) for item in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        number: Any = value
        return isinstance(value, kind) and not isinstance(value, bool) and abs(number) <= sys.float_info.max
    return not isinstance(hint, type) or isinstance(value, hint)


def _wrong(key: str, hint: Any, value: Any) -> BadInput:
    return BadInput(f"setting {key}={value!r} must be {_words(hint)}")


def _words(hint: Any) -> str:
    """What a hint allows, such as `a whole number, at least 1`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_words(options[0])}, {' and '.join(map(str, options[1:]))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if option is types.NoneType else _words(option) for option in options)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if origin is tuple:
        return f"a list, each {_words(options[0])}"
    named = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return named.get(hint) or f"of the type {getattr(hint, '__name__', hint)}"


def radius(given: Any) -> float:
    """The radius of a threat: a number, or text such as `8/255`; BadInput for anything else."""
    eps = parse_number(given) if isinstance(given, str) else given
    if not fits(float, eps):
        raise BadInput(f"eps {given!r} is no radius; give a number in pixel units, such as 8/255")
    return float(eps)


def parse_number(text: str | float) -> float:
    """A number or a fraction such as `8/255`, as a float."""
    try:
        above, slash, below = str(text).partition("/")
        return float(Fraction(above) / Fraction(below)) if slash else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise BadInput(f"{text!r} is not a number; write 0.03 or 8/255") from error


def parse_count(text: str, otherwise: int) -> int:
    """A whole number of plain digits, at most 18 of them; `otherwise` for any other text, such as one with a ²."""
    return int(text) if text.isdecimal() and len(text) <= 18 else otherwise


def parse_assignments(assignments: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """`["a.b=1", "c=x"]`, as an option takes them, as a flat mapping of dotted keys to text."""
    layer = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise BadInput(f"{option} takes key=value, not {assignment!r}")
        layer[key.strip()] = value.strip()
    return layer


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a flat mapping of dotted keys."""
    import tomllib  # builds its patterns when it is imported, which tables never need

    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise BadInput(f"settings file {path} cannot be read: {error}") from error


def override(settings: S, *layers: Mapping[str, Any], name: str = "") -> S:
    """A copy of a settings dataclass with the layers applied, later ones last; `name` is whose they are, for errors."""
    changes: dict[str, Any] = {}
    for layer in layers:
        changes |= flatten(layer)
    return _changed(settings, f"{name}." if name else "", changes)


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested plain values, which `override` reads back."""
    return dataclasses.asdict(settings)


def flatten(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _changed(settings: Any, prefix: str, changes: Mapping[str, Any]) -> Any:
    """With all changes at once: settings that depend on each other are checked together."""
    new: dict[str, Any] = {}
    known = hints(settings.__class__)
    names = [field.name for field in dataclasses.fields(settings)]
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        if first not in names:
            raise unknown_name("setting", prefix + key, _keys(settings, prefix))
        group = dataclasses.is_dataclass(getattr(settings, first))
        if group and not dot:
            keys = ", ".join(_keys(getattr(settings, first), f"{prefix}{first}."))
            raise BadInput(f"setting {prefix + key!r} is a group; set one of {keys}")
        if dot and not group:
            raise BadInput(f"setting {prefix + key!r}: {first!r} is a single value, it has no {rest!r}")
        if group:
            inner.setdefault(first, {})[rest] = value
        else:
            new[first] = _convert(prefix + key, known[first], value)
            check(prefix + key, known[first], new[first])
    for first, part in inner.items():
        new[first] = _changed(getattr(settings, first), f"{prefix}{first}.", part)
    return dataclasses.replace(settings, **new)


def _keys(settings: Any, prefix: str) -> list[str]:
    keys = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        keys += _keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]
    return keys


def _convert(key: str, hint: Any, value: Any) -> Any:
    """Text or a plain value as one of the hint's type; whether it is in range, `check` says."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    origin, options = typing.get_origin(plain), typing.get_args(plain)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in options):
            return None
        several = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
        kinds = [option for option in options if option is not type(None)]
        return _convert(key, next((o for o in kinds if (typing.get_origin(o) is tuple) == several), kinds[0]), value)
    if origin is typing.Literal:
        return next((option for option in options if str(option) == str(value)), value)
    if origin is tuple:
        items = [part for part in value.strip("()[] ").split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise _wrong(key, hint, value)
        return tuple(_convert(key, options[0], item.strip() if isinstance(item, str) else item) for item in items)
    if plain is bool:
        named = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        return named.get(str(value).lower(), value)
    if plain is str:
        return str(value)
    if plain in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        if plain is int and isinstance(value, int):
            return value
        try:
            number = parse_number(value)
        except BadInput as error:
            raise _wrong(key, hint, value) from error
        return int(number) if plain is int and number.is_integer() else number
    return value
