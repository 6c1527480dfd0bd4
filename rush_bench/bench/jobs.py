"""From a benchmark file to jobs: command lines, what each makes and what it needs of the others."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

from rush_bench.bench.equal import Budget, budget_of, stretched
from rush_bench.bench.file import KINDS, Benchmark, Entry, command, context, parameters, setting, words
from rush_bench.datasets import Images, load_dataset
from rush_bench.datasets.loading import find_source
from rush_bench.errors import BadInput, unknown_name
from rush_bench.registry import match, recipes
from rush_bench.store import ENCODERS, model_names, read_cards
from rush_bench.training.prepare import default_name, resolve_settings

LAST = ("table", "figure", "report")
MEASURES = ("attack", "certify", "corruptions", "settle", "audit")


class Loaded:
    """`load_dataset`, once per set of images; a failure is remembered."""

    def __init__(self) -> None:
        self.known: dict[str, Images | BadInput] = {}

    def __call__(self, *args: Any, **options: Any) -> Images:
        key = repr((args, sorted(options.items())))
        if key not in self.known:
            try:
                self.known[key] = load_dataset(*args, **options)
            except BadInput as error:
                self.known[key] = error
        if isinstance(found := self.known[key], BadInput):
            raise found
        return found


@dataclass(frozen=True)
class Place:
    """Where jobs read and write, as given to `rush-bench run`."""

    out: Path
    store: Path
    data_dir: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Model:
    """What is known of a model before it exists: its recipe, and whether it draws (None: not known, as of an import)."""

    recipe: str
    random: bool | None = None


def _model(card: Mapping[str, Any]) -> Model:
    return Model(str(card["recipe"]), any(card["votes"]) or bool(card.get("transform")))


@dataclass(frozen=True)
class Job:
    """One command line. `makes`: a model; `needs`: models of the same file; `trouble`: why it cannot run here."""

    kind: str
    about: str
    words: tuple[str, ...]
    place: str
    makes: str = ""
    needs: tuple[str, ...] = ()
    trouble: BadInput | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Its name for people: `attack rush-digits linf8`."""
        return f"{self.kind} {self.about}".strip()

    def waits_for(self, other: "Job") -> bool:
        """Whether it comes after another job, whether or not that succeeds: tables after what is measured, audits after what
        is trained, for every other model is a source of transfer to them."""
        if self.kind in LAST:
            return other.kind not in LAST
        return self.kind in ("settle", "audit") and other.makes != ""

    @property
    def line(self) -> str:
        """As typed in a shell."""
        return shlex.join(["rush-bench", self.kind, *self.words])

    def context(self) -> click.Context:
        """The command's own reading of it."""
        return context(self.kind, list(self.words), self.place)


def expand(bench: Benchmark, place: Place, load: Callable[..., Images]) -> list[Job]:
    """Every job of a file, in order of dependence; BadInput for a wrong name, value or setting."""
    budget = None if bench.equal_cost is None else _budget(bench.equal_cost, load)
    jobs: dict[str, Job] = {}
    in_file: dict[str, Model] = {}  # models of this file

    def add(job: Job, model: Model | None = None) -> None:
        line = job.line
        if line in jobs:
            raise BadInput(f"{job.place}: {job.name} is there twice")
        if model is not None:
            if job.makes in in_file:
                raise BadInput(f"{job.place}: another job makes {job.makes!r} too; give this one a name")
            in_file[job.makes] = model
        same = sum(job.name in (other.name, other.name.partition(" #")[0]) for other in jobs.values())
        jobs[line] = replace(job, about=f"{job.about} #{same + 1}") if same else job

    for entry in bench.entries:
        if entry.kind == "train":
            for job, model in _trainings(entry, place, budget, load):
                add(job, model)
        elif entry.kind == "import":
            name = str(entry.options.get("name", ""))
            job = Job("import", name, tuple(_line(entry, entry.options, place)), entry.place, makes=name)
            add(job, Model(str(entry.options.get("recipe", ""))))
    known = in_file | {name: _model(card) for name, card in read_cards(place.store).items() if name not in in_file}
    for entry in bench.entries:
        if entry.kind in MEASURES:
            for job in _measurements(entry, place, in_file, known):
                add(job)
        elif entry.kind not in ("train", "import"):
            add(Job(entry.kind, "", tuple(_line(entry, entry.options, place)), entry.place))
    first = [_with_start(job, in_file, known) for job in jobs.values()]
    return sorted(first, key=lambda job: list(KINDS).index(job.kind))


def _with_start(job: Job, in_file: Mapping[str, Model], known: Mapping[str, Model]) -> Job:
    """A training that also needs what it starts from."""
    start = job.context().params.get("from_") if job.kind == "train" else None
    if start is None:
        return job
    name = str(start).partition(":")[0]
    if name not in known and not Path(str(start)).is_file():
        raise unknown_name(f"model or file to start {job.place} from", str(start), known)
    return Job(job.kind, job.about, job.words, job.place, job.makes, (name,) if name in in_file else ())


def _line(entry: Entry, options: Mapping[str, Any], place: Place, sets: Mapping[str, Any] | None = None) -> list[str]:
    """The words of a job: its options, settings, and where it reads and writes."""
    line = words(entry.kind, options, {**entry.sets, **(sets or {})}, entry.place)
    taken = parameters(entry.kind)
    arguments = [parameter.name for parameter in command(entry.kind).params if isinstance(parameter, click.Argument)]
    if "results" in arguments:
        line.insert(arguments.index("results"), str(place.out))
    elif "results" in taken:
        line += ["--results", str(place.out)]
    elif "out" in taken:
        line += ["--out", str(place.out)]
    line += ["--store", str(place.store)] if "store" in taken else []
    line += ["--data-dir", str(place.data_dir)] if "data-dir" in taken and place.data_dir else []
    line += ["--device", place.device] if "device" in taken and place.device != "auto" else []
    return line


def _trainings(entry: Entry, place: Place, budget: Budget | None, load: Callable[..., Images]) -> Iterable[tuple[Job, Model]]:
    asked = entry.options["recipe"]
    patterns = [str(part) for part in (asked if isinstance(asked, list) else [asked])]
    # `finetune` puts a head on what `from` names, so that no pattern means it
    plain = [name for name in recipes.entries if name != "finetune" or name in patterns]
    try:
        names = [name for pattern in patterns for name in match("recipe", [pattern], plain)]
    except BadInput as error:
        raise BadInput(f"{entry.place}, recipe: {error}") from error
    for options in Entry(entry.kind, entry.place, {**entry.options, "recipe": list(dict.fromkeys(names))}).each():
        yield _training(entry, dict(options), place, budget, load)


def _training(
    entry: Entry, options: dict[str, Any], place: Place, budget: Budget | None, load: Callable[..., Images]
) -> tuple[Job, Model]:
    recipe, seed, share = str(options["recipe"]), options.get("seed", 0), options.pop("cost", None)
    number = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < math.inf
    if share is not None and not number:
        raise BadInput(f"{entry.place}: cost = {share!r} is to be a share of the budget, such as 1 or 0.25")
    if "dataset" not in options:
        raise BadInput(f"{entry.place}: dataset is missing: what is the classifier trained for?")
    if "from" in options and "name" not in options:
        raise BadInput(f"{entry.place}: a training that starts from another needs a name; write name = ...")
    try:
        dataset, before = (find_source(str(options.get(key, options["dataset"]))).name for key in ("dataset", "pretrain-on"))
    except BadInput as error:
        raise BadInput(f"{entry.place}: {error}") from error
    base = str(options["name"]).replace("{recipe}", recipe) if "name" in options else default_name(recipe, dataset, before)
    name = base + ("" if share in (None, 1) else f"-x{share:g}") + (f"-s{seed}" if seed else "")
    sets, trouble = dict[str, Any](), None
    if share is not None:
        try:
            sets = _stretched(entry, recipe, options, budget, share, load)
        except _Unavailable as error:
            trouble = error.why
    if name != base or "name" in options:
        options["name"] = name
    line = _line(entry, options, place, sets)
    card = {"recipe": recipe, **about(entry, recipe, options, sets)}
    return Job("train", name, tuple(line), entry.place, makes=name, trouble=trouble), _model(card)


class _Unavailable(Exception):
    def __init__(self, why: BadInput) -> None:
        self.why = why


def about(entry: Entry, recipe: str, options: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's card says (protocol, votes), whatever the data; BadInput, with the table, for a wrong setting."""
    short = {"noise": options.get("noise"), "finetune.protocol": options.get("protocol")}
    given = {**entry.sets, **sets, **{key: value for key, value in short.items() if value is not None}}
    system = recipes.load(recipe)
    try:
        layer = {key: setting(value) for key, value in given.items()}  # as words, which is how they will be read
        return system.card(resolve_settings(system, str(options.get("preset", "short")), None, [layer]))
    except BadInput as error:
        raise BadInput(f"{entry.place}: {error}") from error


def _shape(dataset: str, load: Callable[..., Images]) -> tuple[int, int, int]:
    try:
        return load(dataset, "train").shape
    except BadInput as error:
        raise _Unavailable(error) from error


def _budget(entry: Entry, load: Callable[..., Images]) -> Budget | None:
    """The budget of `[equal_cost]`; None where its data are not here, as those of every training that would use it."""
    try:
        system, settings = _settings(entry, str(entry.options["recipe"]), entry.options, load)
    except _Unavailable:
        return None
    return budget_of(system, settings)


def _settings(entry: Entry, recipe: str, options: Mapping[str, Any], load: Callable[..., Images]) -> tuple[Any, Any]:
    dataset = str(options.get("dataset", ""))
    about(entry, recipe, options, {})
    system, shape = recipes.load(recipe), _shape(dataset, load)
    return system, resolve_settings(system, str(options.get("preset", "short")), shape, [entry.sets], dataset)


def _stretched(
    entry: Entry, recipe: str, options: Mapping[str, Any], budget: Budget | None, share: float, load: Callable[..., Images]
) -> dict[str, Any]:
    system, settings = _settings(entry, recipe, options, load)
    if budget is None:
        raise _Unavailable(BadInput("the images of [equal_cost] are not here"))
    try:
        sets = stretched(system, settings, budget, share).sets
    except BadInput as error:
        raise BadInput(f"{entry.place}: {error}") from error
    if both := [key for key in sets if key in entry.sets]:
        raise BadInput(
            f"{entry.place}: cost decides {', '.join(both)}, so that set would have no effect; leave one of them out"
        )
    return sets


def _measurements(entry: Entry, place: Place, in_file: Mapping[str, Model], known: Mapping[str, Model]) -> Iterable[Job]:
    """A job per model (but for corruptions, whose mCE is relative to one of them), suite and seed."""
    if "model" in entry.options:  # a network of the user's own
        for options in entry.each():
            yield Job(
                entry.kind,
                _about(str(options.get("name", options["model"])), options),
                tuple(_line(entry, options, place)),
                entry.place,
            )
        return
    patterns = entry.options.get("models", "all")
    chosen = choose([str(part) for part in (patterns if isinstance(patterns, list) else [patterns])], in_file, known, entry)
    together = "models" not in KINDS[entry.kind].each
    found: dict[str, Any] = {"models": ",".join(chosen) if together else [*chosen], **_reference(entry, in_file, known)}
    for options in Entry(entry.kind, entry.place, {**entry.options, **found}).each():
        which = str(options["models"])
        names = [*which.split(","), str(options.get("reference", ""))]
        needs = [name for name in dict.fromkeys(_model_of(part) for part in names) if name in in_file]
        yield Job(entry.kind, _about(which, options), tuple(_line(entry, options, place)), entry.place, needs=tuple(needs))


def _reference(entry: Entry, in_file: Mapping[str, Model], known: Mapping[str, Model]) -> dict[str, str]:
    """The option `reference`, what mCE is relative to, by the full name of a model that this file makes; {} for any other."""
    wanted = str(entry.options.get("reference", ""))
    if not wanted or not _matching_models(_model_of(wanted), in_file):
        return {}
    found = choose([wanted], in_file, known, entry)
    if len(found) > 1:
        raise BadInput(f"{entry.place}: reference {wanted} is more than one model: {', '.join(found)}; name one of them")
    return {"reference": found[0]}


def _model_of(name: str) -> str:
    """The model of a defence's name, without votes and epoch."""
    return name.split("@")[0].split(":")[0]


def _about(which: str, options: Mapping[str, Any]) -> str:
    parts = [which, options.get("suite"), options.get("eps"), f"seed {options['seed']}" if options.get("seed") else None]
    return " ".join(str(part) for part in parts if part)


def choose(patterns: list[str], in_file: Mapping[str, Model], known: Mapping[str, Model], entry: Entry) -> list[str]:
    """Names, with `@votes` where given, of models of the file that patterns choose (a model or recipe), else of the store.

    What a pattern chooses besides deterministic models leaves them out where it asks for votes, or for a certificate.
    """
    if not known:
        raise BadInput(f"{entry.place}: there is no model to {entry.kind}; train one in this file")
    chosen: list[str] = []
    for pattern in patterns:
        wanted, at, votes = pattern.partition("@")
        wanted, colon, which = wanted.partition(":")
        pools = (pool for pool in (in_file, known) if pool)
        hits = next((found for pool in pools if (found := _matching_models(wanted, pool))), {})
        if not hits:
            raise unknown_name(f"model of {entry.place}", wanted, {*known, *(model.recipe for model in known.values())})
        if at or entry.kind == "certify":
            hits = {name: model for name, model in hits.items() if model.random is not False}
            if not hits:
                raise BadInput(
                    f"{entry.place}: {pattern!r} chooses deterministic models alone; they have neither votes nor noise"
                )
        chosen += [f"{name}{colon}{which}{at}{votes}" for name in hits]
    return list(dict.fromkeys(chosen))


def _matching_models(wanted: str, pool: Mapping[str, Model]) -> dict[str, Model]:
    return {
        name: model for name, model in pool.items() if wanted == "all" or fnmatch(name, wanted) or fnmatch(model.recipe, wanted)
    }


def finished_models(store: Path) -> set[str]:
    """Models and encoders that the store has."""
    return {*model_names(store), *model_names(store / ENCODERS)}


def unfinished(job: Job, store: Path) -> list[str]:
    """The models that a job needs and the store does not have yet."""
    finished = finished_models(store)
    return [name for name in job.needs if name not in finished]
