"""Read a benchmark file. A table is a command, its keys are the command's options; no torch is imported.

title = "SimCLR and RUSH on digits"
out = "results/demo"             # records, tables and figures; default results/<name of the file>
store = "results/demo/models"    # default models

[[train]]
recipe = ["simclr", "rush"]      # a list of recipes, seeds, models or suites is a job each
dataset = "digits"
set.pretrain.epochs = 5          # as --set pretrain.epochs=5

[[attack]]                       # models: those of this file, unless it names some
suite = ["linf8-quick", "linf25.5-quick"]
n = 200
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click

from rush_bench.cli.group import main
from rush_bench.errors import BadInput, unknown_name
from rush_bench.settings import flatten

SHIPPED = Path(__file__).with_name("files")
HEAD = ("title", "out", "store", "equal_cost")
OURS = ("store", "out", "results", "data-dir", "device", "max-minutes", "shard", "json", "plan", "config", "read")
Value = str | int | float | bool


@dataclass(frozen=True)
class Kind:
    """A command in a file: the key of its argument, the keys whose lists are a job each, the keys that we add."""

    argument: str = ""
    each: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


# In the order in which they need each other.
KINDS = {
    "import": Kind("file"),
    "train": Kind("recipe", ("recipe", "cost", "seed"), ("cost",)),
    "attack": Kind("", ("models", "suite", "seed")),
    "certify": Kind("models", ("models", "seed")),
    "corruptions": Kind("models"),
    "settle": Kind("models", ("models",)),
    "audit": Kind("models", ("models",)),
    "table": Kind(),
    "figure": Kind("kinds"),
    "report": Kind("results"),
}


@dataclass(frozen=True)
class Entry:
    """One table of the file: `[[attack]]`, the second of its kind, say. `sets` are its settings by dotted key."""

    kind: str
    place: str  # for messages: `table1.toml: [[attack]] 2`
    options: dict[str, Value | list[Value]]
    sets: dict[str, Any] = field(default_factory=dict)

    def each(self) -> Iterator[dict[str, Value | list[Value]]]:
        """The options of every job that the table stands for."""
        keys = [key for key in KINDS[self.kind].each if isinstance(self.options.get(key), list)]
        for values in product(*(self.options[key] for key in keys)):  # type: ignore[arg-type]
            yield {**self.options, **dict(zip(keys, values, strict=True))}


@dataclass(frozen=True)
class Benchmark:
    """A file as it was read; `equal_cost` is the training that sets the budget of those with a `cost`, if any."""

    name: str
    title: str
    out: Path
    store: Path
    entries: tuple[Entry, ...]
    equal_cost: Entry | None


def shipped() -> dict[str, Path]:
    """The files that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find(name: str) -> Path:
    """A path to a benchmark file, or the name of one that is shipped; BadInput with a suggestion for neither."""
    if name in shipped():
        return shipped()[name]
    if not Path(name).is_file():
        raise unknown_name("benchmark, nor a file,", name, shipped())
    return Path(name)


def read(path: Path) -> Benchmark:
    """A benchmark file, every key known to its command; BadInput names the table, the key and what would do."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    for key, value in found.items():
        if key not in (*HEAD, *KINDS):
            raise unknown_name(f"table or key of {path.name}", key, (*HEAD, *KINDS))
        if key in KINDS and not (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
            raise BadInput(f"{path}: {key} is to be a list of tables; write [[{key}]]")
        if key in ("title", "out", "store") and not isinstance(value, str):
            raise BadInput(f"{path}: {key} is to be text, not {value!r}")
    entries = [
        _entry(kind, f"{path.name}: [[{kind}]] {number}", part)
        for kind in KINDS
        for number, part in enumerate(found.get(kind, []), start=1)
    ]
    if not entries:
        raise BadInput(f"{path} has nothing to do; write a table such as [[train]] or [[attack]]")
    if all(entry.kind != "table" for entry in entries) and any(entry.kind == "attack" for entry in entries):
        entries.append(Entry("table", f"{path.name}: its table", {"format": "csv,md"}))
    spent = found.get("equal_cost")
    reference = None if spent is None else _entry("train", f"{path.name}: [equal_cost]", spent)
    for entry in entries:
        if "cost" in entry.options and reference is None:
            raise BadInput(f"{entry.place}: cost is a share of what a training spends: say of which in [equal_cost]")
    out, store = found.get("out", f"results/{path.stem}"), found.get("store", "models")
    return Benchmark(path.stem, found.get("title", path.stem), Path(out), Path(store), tuple(entries), reference)


def group() -> click.Context:
    """What a command's context stands in when it is called from the shell."""
    return click.Context(main, info_name="rush-bench", **main.context_settings)


def command(kind: str) -> click.Command:
    """A command of rush-bench."""
    found = main.get_command(group(), kind)
    assert found is not None
    return found


def parameters(kind: str) -> dict[str, click.Parameter]:
    """What a command takes, by the key that a file has for it."""
    known: dict[str, click.Parameter] = {}
    for parameter in command(kind).params:
        if isinstance(parameter, click.Option):
            names = [*parameter.opts, *parameter.secondary_opts]
            known |= {name.removeprefix("--"): parameter for name in names if name.startswith("--")}
        elif KINDS[kind].argument not in ("", *known):
            known[KINDS[kind].argument] = parameter
    return known


def _entry(kind: str, place: str, given: Any) -> Entry:
    if not isinstance(given, Mapping):
        raise BadInput(f"{place} is to be a table")
    known = [key for key in (*parameters(kind), *KINDS[kind].extra) if key not in OURS]
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in OURS:
            raise BadInput(f"{place}: {key} is for the whole file: at its top, or an option of rush-bench run")
        if key not in known:
            raise unknown_name(f"key of {place}", key, known)
        if key == "set":
            if not isinstance(value, Mapping):
                raise BadInput(f"{place}: set is a table of settings, such as set.pretrain.epochs = 5")
            continue
        plain = isinstance(value, Value) or (isinstance(value, list) and value and all(isinstance(v, Value) for v in value))
        if not plain:
            raise BadInput(f"{place}: {key} = {value!r} is to be text, a number, true or false, or a list of them")
        options[key] = value
    needed = KINDS[kind].argument
    if needed and needed not in ("models", *OURS, *options):
        raise BadInput(f"{place}: {needed} is missing")
    return Entry(kind, place, options, flatten(given.get("set", {})))


def words(kind: str, options: Mapping[str, Value | list[Value]], sets: Mapping[str, Any], place: str) -> list[str]:
    """Options and settings as the words of a command line; BadInput where the command would refuse them."""
    known = parameters(kind)
    line: list[str] = []
    for key, value in options.items():
        parameter = known[key]
        if isinstance(parameter, click.Argument):
            line.insert(0, text(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            other = next(iter(parameter.secondary_opts), None)
            chosen = f"--{key}" if value else other
            line += [chosen] if chosen else []
        elif parameter.multiple and isinstance(value, list):
            line += [part for item in value for part in (f"--{key}", text(item))]
        else:
            line += [f"--{key}", text(value)]
    line += [part for key, value in sets.items() for part in ("--set", f"{key}={setting(value)}")]
    context(kind, line, place)
    return line


def context(kind: str, line: list[str], place: str = "") -> click.Context:
    """The command's own reading of its words."""
    try:
        return command(kind).make_context(kind, list(line), parent=group())
    except click.UsageError as error:
        raise BadInput(f"{place}: {error.format_message()}") from error


def text(value: Value | list[Value]) -> str:
    """A value as a word: lists by commas."""
    return ",".join(text(part) for part in value) if isinstance(value, list) else setting(value)


def setting(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(setting(part) for part in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
