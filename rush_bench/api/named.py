"""Defences and images that are at hand or asked for by name: what every measurement begins with."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from rush_bench.datasets import Images, as_data, load_dataset
from rush_bench.datasets.loading import find_source
from rush_bench.defenses import Defense, as_defenses, from_target, load_defenses
from rush_bench.devices import choose_device
from rush_bench.errors import BadInput
from rush_bench.evaluation.precision import choose_precision, keep_precision
from rush_bench.registry import datasets
from rush_bench.settings import parse_count

Group = tuple[list[Defense], Images]


class ByName(TypedDict, total=False):
    """How what is asked for by name is loaded. Given for what is at hand already, each is a BadInput.

    Of images: `n` of them, a fixed stratified subset, or "all"; `size`, their side in pixels (default: what the model takes);
    `data_dir`, the folder of the data sets. Of defences: `store`, the folder of the models; `device` (auto, cpu, cuda:1);
    `memory`, the bytes that a step may use.
    """

    n: int | str | None
    size: int | None
    data_dir: Path | str | None
    store: Path | str
    device: str | None
    memory: int | None


IMAGES, DEFENSES = ("n", "size", "data_dir"), ("store", "device", "precision", "memory")


@dataclass(frozen=True)
class Target:
    """A network of the user's own, `package.module:function`, that is made when its images are known (see `from_target`)."""

    where: str
    noise: str | None = None
    votes: int | None = None
    name: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def load(self, images: Images, chosen: Mapping[str, Any], stated: Mapping[str, Any]) -> list[Defense]:
        """The defences that it makes for these images: as `chosen`; what is `stated` it must follow even if it is a Defense."""
        which: dict[str, Any] = {"noise": self.noise, "votes": self.votes, "name": self.name, "about": self.about}
        return from_target(self.where, shape=images.shape, defaults=chosen, **which, **stated)


@dataclass(frozen=True)
class Subjects:
    """What is to be measured: defences with their images, and how those that were loaded are worked with."""

    groups: list[Group]
    options: dict[str, Any]
    auto: bool
    out: Path

    def begin(self) -> None:
        """Before the first cell is opened: what `auto` precision is in this results folder is written down."""
        if self.auto:
            keep_precision("auto", self.options["precision"], self.out)


class Loader:
    """Test images by name, each data set and size once; `most` where no number is asked for, or all there are."""

    def __init__(self, data_dir: Path | str | None, n: int | str | None, size: int | None, most: int) -> None:
        check_count(n)
        self.data_dir, self.n, self.size, self.most = data_dir, n, size, most
        self.loaded: dict[tuple[str, int | tuple[int, ...] | None], Images] = {}

    def load(self, name: str, size: tuple[int, ...] | None) -> Images:
        """The subset that was asked for; `size` is what the model takes, unless another was asked for."""
        key = (name, self.size or size)
        if key not in self.loaded:
            place: dict[str, Any] = {"data_dir": self.data_dir, "size": key[1]}
            if self.n == "all":
                self.loaded[key] = load_dataset(name, "test", **place)
            else:  # the number that stands for none is always in the order in which subsets nest, too
                wanted = int(self.n) if self.n else min(self.most, len(load_dataset(name, "test", **place)))
                self.loaded[key] = load_dataset(name, "test", wanted, **place)
        return self.loaded[key]


def check_count(n: int | str | None) -> None:
    """Refuse what is no number of images."""
    if n not in (None, "all") and parse_count(str(n), 0) < 1:
        raise BadInput(f"--n takes a number of images or `all`, not {n!r}")


def subjects(
    defenses: Any, data: Any, out: Path | str, *, most: int, searched: bool = False, precision: str | None = None, **named: Any
) -> Subjects:
    """Defences and images of a measurement that goes to the results folder `out`.

    `defenses`: one or several, patterns of names in the store (`rush@64`, `all`), or a Target. `data`: what `as_data` takes,
    the name of a data set or a path, of which `most` images are taken unless `n` says how many; None: for models of the store
    what each was trained for. `searched`: they are attacked, in `precision` (None: `auto`). Errors: BadInput, also for an
    option that would have no effect.
    """
    if unknown := named.keys() - ByName.__annotations__.keys():
        raise TypeError(f"unexpected argument {', '.join(sorted(unknown))}; there is {', '.join(ByName.__annotations__)}")
    images = Loader(named.get("data_dir"), named.get("n"), named.get("size"), most)
    if not isinstance(data, str | Path | None):
        _refuse(named, IMAGES, "data is a data set by name; take a part of images at hand by images.take(range(100))")
    where = choose_device(named.get("device") or "auto")
    options: dict[str, Any] = {"device": where}
    options |= {"precision": choose_precision(precision or "auto", where, Path(out))} if searched else {}
    options |= {"memory": named["memory"]} if named.get("memory") is not None else {}
    stated = {key: options[key] for key in options if {**named, "precision": precision}.get(key)}
    if isinstance(defenses, Target):
        if data is None:
            raise BadInput("--model needs --dataset: which images is the network for?")
        own = _images(data, images)
        groups = [(defenses.load(own, options, stated), own)]
    elif patterns := patterns_of(defenses):
        groups = stored(patterns, Path(named.get("store", "models")), data, images, options)
    else:
        given = as_defenses(defenses)  # what else is loaded, such as a source of transfer, goes where they are
        return Subjects([(given, _images(data, images))], {"device": given[0].device, **stated}, False, Path(out))
    return Subjects(groups, options, searched and precision in (None, "auto"), Path(out))


def refuse_for_given(defenses: Any, **named: Any) -> None:
    """Refuse what says how defences are loaded where they are at hand."""
    if not isinstance(defenses, Target) and not patterns_of(defenses):
        _refuse(named, DEFENSES, "defenses are names of models; a defence at hand is as it was made")


def say_where(folder: Path | str, quiet: bool) -> None:
    """Where the records are, on stderr."""
    if not quiet:
        print(f"records are in {folder}", file=sys.stderr)


def stored(patterns: Sequence[str], store: Path, data: Any, images: Loader, options: dict[str, Any]) -> list[Group]:
    """Models of the store grouped by the images that they take: data set and size; or all on the `data` at hand."""
    wanted = [p.strip() for p in patterns if p.strip()]
    if not isinstance(data, str | Path | None):
        return [(load_defenses(wanted, store=store, **options), as_data(data))]
    name = find_source(str(data)).name if data else None  # a wrong name is reported as such, not as "no models for it"
    groups: dict[tuple[str, tuple[int, ...]], list[Defense]] = {}
    for defense in load_defenses(wanted, store=store, dataset=name, **options):
        groups.setdefault((str(defense.labels()["dataset"]), defense.shape[1:]), []).append(defense)
    for trained_for, _ in groups:
        if not data and trained_for not in datasets.entries:
            raise BadInput(
                f"some models were trained for {trained_for!r}, which is no registered data set; "
                f"give its file: --dataset path/to/{trained_for}.npz"
            )
    return [(group, images.load(str(data or key[0]), key[1])) for key, group in groups.items()]


def patterns_of(defenses: Any) -> list[str]:
    """Names of the store, where that is what was given: `rush@64,acl*` or a list of such."""
    if isinstance(defenses, str):
        return defenses.split(",")
    several = isinstance(defenses, list | tuple) and bool(defenses) and all(isinstance(pattern, str) for pattern in defenses)
    return list(defenses) if several else []


def _images(data: Any, images: Loader) -> Images:
    return images.load(str(data), None) if isinstance(data, str | Path) else as_data(data)


def _refuse(named: Mapping[str, Any], keys: Sequence[str], fix: str) -> None:
    given = [key for key in keys if named.get(key) is not None]
    if given:
        raise BadInput(f"{', '.join(given)} would have no effect: only where {fix}")
