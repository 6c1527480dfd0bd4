"""Settings are frozen dataclasses; layers of plain values (preset, TOML file, `--set key=value`) override their defaults.

Nested dataclasses take dotted keys (`pretrain.lr`). Fractions parse (`8/255`). Unknown keys and wrong types are BadInput.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from rush_bench.errors import BadInput, unknown_name

S = TypeVar("S")


def parse_number(text: str | float) -> float:
    """A number or a fraction such as `8/255`, as a float."""
    try:
        return float(Fraction(text)) if isinstance(text, str) and "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"{text!r} is not a number; write 0.03 or 8/255") from error


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as a flat mapping of dotted keys to text."""
    layer = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise BadInput(f"--set takes key=value, not {assignment!r}")
        layer[key.strip()] = value.strip()
    return layer


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a flat mapping of dotted keys."""
    try:
        return _flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadInput(f"settings file {path} cannot be read: {error}") from error


def override(settings: S, *layers: Mapping[str, Any]) -> S:
    """A copy of a settings dataclass with the layers applied in order, later ones last."""
    for layer in layers:
        for key, value in _flatten(layer).items():
            settings = _set(settings, key, key.split("."), value)
    return settings


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested plain values, which `override` reads back."""
    return dataclasses.asdict(settings)


def _flatten(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _set(settings: Any, full_key: str, path: list[str], value: Any) -> Any:
    hints = typing.get_type_hints(type(settings))
    if path[0] not in hints:
        raise unknown_name("setting", full_key, _keys(settings, full_key.removesuffix(".".join(path))))
    current = getattr(settings, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            raise BadInput(f"setting {full_key!r} is a group; set one of {', '.join(_keys(current, full_key + '.'))}")
        new = _set(current, full_key, path[1:], value)
    elif len(path) > 1:
        raise BadInput(f"setting {full_key!r}: {path[0]!r} is a single value, it has no {path[1]!r}")
    else:
        new = _convert(full_key, hints[path[0]], value)
    return dataclasses.replace(settings, **{path[0]: new})


def _keys(settings: Any, prefix: str) -> list[str]:
    keys = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        keys += _keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]
    return keys


def _convert(key: str, hint: Any, value: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    wrong = BadInput(f"setting {key}={value!r} is not of the type {getattr(hint, '__name__', None) or hint}")
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in options):
            return None
        return _convert(key, next(o for o in options if o is not type(None)), value)
    if origin is typing.Literal:
        if value not in options:
            raise unknown_name(f"value for {key}", str(value), map(str, options))
        return value
    if origin is tuple:
        items = [part for part in value.strip("()[] ").split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise wrong
        return tuple(_convert(key, options[0], item.strip() if isinstance(item, str) else item) for item in items)
    if hint is bool:
        named = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in named:
            raise wrong
        return named[str(value).lower()]
    if hint is int:
        number = parse_number(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        if number is None or number != int(number):
            raise wrong
        return int(number)
    if hint is float:
        if isinstance(value, bool):
            raise wrong
        return parse_number(value)
    return str(value)
