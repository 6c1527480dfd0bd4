"""What a benchmark file asks for against what is there: every job's state, and the cost of what it lacks."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rush_bench.api.attack import MOST as ATTACKED
from rush_bench.api.audit import published_claim, stated_claim
from rush_bench.api.certify import MOST as CERTIFIED
from rush_bench.api.corruptions import Which
from rush_bench.api.corruptions import asked_for as corrupted_images
from rush_bench.api.named import Loader, check_count, stored
from rush_bench.api.settle import settle
from rush_bench.attacks.cost import prediction_rows
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.forecast import images_left, rates
from rush_bench.audits.run import Audit, replayed
from rush_bench.audits.settle import FOLDER as SETTLED
from rush_bench.audits.settle import budget_named
from rush_bench.bench.jobs import MEASURES, Job, Loaded, Place, finished_models, unfinished
from rush_bench.certificates.sampling import Sampling
from rush_bench.cli.attack import asked_suite
from rush_bench.cli.certify import sampling
from rush_bench.cli.common import target_of
from rush_bench.cli.settle import arguments
from rush_bench.datasets import Images
from rush_bench.defenses import Defense
from rush_bench.defenses.load import front_of, of_network
from rush_bench.defenses.published.expected import BANK, VOTES
from rush_bench.defenses.published.expected import IMAGES as TRIED
from rush_bench.defenses.published.importing import import_checkpoint
from rush_bench.devices import choose_device
from rush_bench.errors import BadInput, Failure, RushBenchError
from rush_bench.evaluation import certificates, corruptions, runner
from rush_bench.evaluation.precision import choose_precision
from rush_bench.evaluation.work import Job as CellJob
from rush_bench.files import read_json
from rush_bench.networks import build
from rush_bench.networks.routes import CARRIED as ROUTES
from rush_bench.networks.specs import image_shape
from rush_bench.noise import noise_from
from rush_bench.places import data_folder, on_disk
from rush_bench.records import CellStore
from rush_bench.report.settle import as_csv, frame, stem
from rush_bench.settings import parse_number
from rush_bench.store import ENCODERS, model_names, read_card
from rush_bench.training.checkpoint import CheckpointFile, identity
from rush_bench.training.cost import stage_costs
from rush_bench.training.encoders import shared_pretraining
from rush_bench.training.initial_weights import NOT_STATED, InitialWeights, imported_before
from rush_bench.training.log import check_kind
from rush_bench.training.prepare import PreparedTraining, prepare
from rush_bench.training.run import channels_last_unsafe

# anew: tables and figures, each time; measurements whose cells are there, but whose answer or labels must be written again
State = Literal["done", "in progress", "missing", "anew", "impossible"]
BATCH = 64  # images of the step whose time predicts a training's
ROWS = 256  # rows whose time predicts an attack's, as far as a defence has draws


@dataclass(frozen=True)
class Planned:
    """A job, how far it is, and what its rest is expected to cost: forward equivalents (see `training.cost`) and seconds here.

    NaN where nobody can say. `why` an impossible job is impossible.
    """

    job: Job
    state: State
    why: str = ""
    passes: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        numbers = {key: None if math.isnan(value) else value for key, value in self._cost().items()}
        return (
            {"name": self.job.name, "kind": self.job.kind, "command": self.job.line, "state": self.state}
            | ({"why": self.why} if self.why else {})
            | numbers
        )

    def _cost(self) -> dict[str, float]:
        return {"passes": self.passes, "seconds": self.seconds}


def check(jobs: Iterable[Job]) -> None:
    """BadInput, with the table of the file, for what no command would take on any machine: suites, settings, numbers."""
    for job in jobs:
        asked = job.context().params
        try:
            if "count" in asked:
                check_count(asked["count"])
            if job.kind == "train":
                check_kind(asked["log"])
            elif job.kind == "attack":
                asked_suite(asked["suite"], asked["attacks"], asked["sets"])
            elif job.kind == "certify":
                _sampling(asked)
            elif job.kind in ("settle", "audit"):
                budget_named(asked["budget"])
                parse_number(asked["eps"])
        except BadInput as error:
            raise BadInput(f"{job.place}: {error}") from error


def plan(jobs: Sequence[Job], place: Place, load: Loaded, priced: bool = True) -> list[Planned]:
    """Each job's state; with `priced` also what its rest costs, seconds by rates measured a moment ago."""
    return Planner(place, load, priced).plan(jobs)


class Planner:
    """What is learned from job to job: cards of models that are not there yet, rates of networks, cells already counted."""

    def __init__(self, place: Place, load: Loaded, priced: bool) -> None:
        self.place, self.load, self.priced = place, load, priced
        self.cards: dict[str, dict[str, Any]] = {}
        self.impossible: dict[str, str] = {}
        self.others: set[str] = set()  # models of the store that are not, or not known to be, those of the file of that name
        self.models_missing = False  # whether there are models still to be made
        self.speed: dict[str, tuple[float, float]] = {}
        self.counted: set[tuple[tuple[str, ...], str]] = set()
        self.loaders: dict[Any, Loader] = {}
        self.stand_ins: dict[str, Defense] = {}
        self.device = choose_device(place.device)

    def plan(self, jobs: Sequence[Job]) -> list[Planned]:
        """In the order of the jobs."""
        found = []
        for job in jobs:
            unusable = {*unfinished(job, self.place.store), *self.others}
            lacking = next((name for name in job.needs if name in self.impossible and name in unusable), None)
            if job.trouble is not None:
                planned = Planned(job, "impossible", Failure(str(job.trouble), job.trouble))
            elif lacking is not None:
                planned = Planned(job, "impossible", Failure(f"needs {lacking}, which cannot be had", self.impossible[lacking]))
            else:
                try:
                    planned = self.plan_job(job)
                except RushBenchError as error:  # data or a package that is not here: the others go on
                    planned = Planned(job, "impossible", Failure(str(error), error))
            if planned.state == "impossible" and job.makes:
                self.impossible[job.makes] = planned.why
                self.others |= {job.makes} if job.kind == "import" else set()
            self.models_missing |= bool(job.makes) and planned.state in ("missing", "in progress")
            found.append(planned)
        return found

    def plan_job(self, job: Job) -> Planned:
        """The state of one job."""
        if job.kind == "train":
            return self.training(job)
        if job.kind == "import":
            return self.importing(job)
        if job.kind in MEASURES:
            return self.measurement(job)
        return Planned(job, "anew")

    def importing(self, job: Job) -> Planned:
        """An import: it predicts some images, to see that the file was read right. Done if the store's model is the file's."""
        asked = dict(job.context().params)
        asked.pop("as_json")
        if not asked["file"].is_file():
            unknown = f", so that nobody can say whether {job.makes} of {self.place.store} is of it"
            raise BadInput(
                f"there is no file {asked['file']}{unknown if job.makes in finished_models(self.place.store) else ''}"
            )
        imported = import_checkpoint(**asked, keep=False)  # BadInput where the store has another model of that name
        card = imported.card
        self.cards[job.makes] = card
        home = imported.folder.parent
        if job.makes in model_names(home) and _says_all_of(read_card(home, job.makes), card):
            return Planned(job, "done")
        if not on_disk(asked["dataset"], data_folder(self.place.data_dir)):
            return Planned(job, "missing")
        passes = (BANK + TRIED) if asked["as_"] == "encoder" else TRIED * (VOTES if card["noise"] else 1)
        return Planned(job, "missing", passes=passes, seconds=passes * self.pass_rate(card["network"]) if self.priced else 0.0)

    def start(self, wanted: Any, dataset: str) -> Any:
        """What a training starts from, as it asks for it; where the store lacks it, its card without weights."""
        name, store = str(wanted).partition(":")[0], self.place.store
        if wanted is None or name in finished_models(store):
            return wanted
        card = self.cards.get(name)
        if card is None and Path(wanted).is_file():
            name = Path(wanted).stem
            if imported_before(Path(wanted), store):
                return name
            asked: dict[str, Any] = {"dataset": dataset, "pretrain_dataset": NOT_STATED, "as_": "encoder", "store": store}
            card = import_checkpoint(wanted, name, **asked, keep=False).card
        if card is None:
            return wanted
        return InitialWeights(card, "", {}, {ROUTES: {}}, name, "model" if card["protocol"] else "encoder")

    def training(self, job: Job) -> Planned:
        """A training: its stages that are left."""
        options = dict(job.context().params)
        recipe, options["name"] = options.pop("name"), options.pop("model")
        for key in ("device", "max_minutes", "log", "as_json"):
            options.pop(key)
        options["from_"] = self.start(options["from_"], options["dataset"])
        prepared = prepare(recipe, fetch=self.load, **options)
        self.cards[job.makes] = prepared.card
        try:
            if prepared.finished(self.place.store):
                return Planned(job, "done")
        except BadInput:  # the folder holds another run
            self.others.add(job.makes)
            raise
        file = CheckpointFile(self.place.store / prepared.card["name"], identity(prepared.card))
        state: State = "in progress" if file.path.exists() and not isinstance(options["from_"], InitialWeights) else "missing"
        if not self.priced:
            return Planned(job, state)
        checkpoint = file.load(torch.device("cpu")) if state == "in progress" else None
        passes_left = self.stages_left(prepared, None if checkpoint is None else checkpoint["where"])
        rate = self.pass_rate(prepared.card["network"], prepared.settings.precision, prepared.settings.channels_last)
        return Planned(job, state, passes=passes_left, seconds=passes_left * rate)

    def stages_left(self, prepared: PreparedTraining, position: dict[str, Any] | None) -> float:
        """Passes through the encoder that a training still takes."""
        costs = list(stage_costs(prepared.system, prepared.settings, prepared.card["data"]).values())
        plans = prepared.system.plans(prepared.settings)
        first, done = 0, 0.0
        if position is not None:
            first, epochs = position["stage"], plans[position["stage"]].settings.epochs
            done = position["epoch"] / epochs
        elif (
            pretraining := shared_pretraining(prepared.system, plans, prepared.settings, prepared.card, self.place.store)
        ) is not None:
            first = pretraining.stages if pretraining.name in model_names(self.place.store / ENCODERS) else 0
        return sum(cost.passes * (1 - done if number == first else 1) for number, cost in enumerate(costs) if number >= first)

    def pass_rate(self, spec: dict[str, Any], precision: str = "float32", channels_last: bool = True) -> float:
        """Seconds of a pass of an image: forward and back through the network, in training, by the count of 3."""
        key = f"train {_shape(spec)} {precision} {channels_last}"
        if key not in self.speed:
            network = build(spec)
            if channels_last and not channels_last_unsafe(network):
                network = network.to(memory_format=torch.channels_last)
            network = network.to(self.device).train()
            images = torch.zeros(BATCH, *image_shape(spec), device=self.device)
            taken = []
            for _ in range(2):  # the first pays for warming up
                begun = time.perf_counter()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    loss = network(images).float().square().mean()
                loss.backward()
                loss.item()
                taken.append(time.perf_counter() - begun)
            self.speed[key] = (min(taken) / (3 * BATCH), 0.0)
        return self.speed[key][0]

    def measurement(self, job: Job) -> Planned:
        """Attacks, certificates, corruptions, audits: the chunks of their cells that are left."""
        asked, waits = job.context().params, bool(unfinished(job, self.place.store))
        if waits and job.kind == "corruptions":
            return Planned(job, "missing", passes=math.nan, seconds=math.nan)
        if job.kind in ("settle", "audit"):
            return self.audit(job, asked)
        if job.kind == "corruptions":
            planned = self.cells(job, CellStore(self.place.out / corruptions.FOLDER), self.corrupted(asked))
            # its table also depends on the reference and on what others have measured since
            return replace(planned, state="anew") if planned.state == "done" else planned
        pairs = self.pairs(job, asked, CERTIFIED if job.kind == "certify" else ATTACKED)
        if job.kind == "certify":
            settings, norm, seed = _sampling(asked), asked["norm"], asked["seed"]
            cells: list[CellJob] = [
                cell for group, data in pairs for cell in certificates.plan(group, data, settings, norm, seed)
            ]
            return self.cells(job, CellStore(self.place.out / certificates.FOLDER), cells)
        suite = asked_suite(asked["suite"], asked["attacks"], asked["sets"])
        shared = (asked["seed"], asked["repeats"], asked["chunk"])
        cells = [cell for group, data in pairs for defense in group for cell in runner.plan(defense, suite, data, *shared)]
        return self.cells(job, CellStore(self.place.out), cells)

    def pairs(self, job: Job, asked: dict[str, Any], most: int) -> list[tuple[list[Defense], Images]]:
        """Defences and their images; untrained networks stand for those of models that are not there yet."""
        wanted = (asked["data_dir"], asked["count"], asked["size"], most)
        images = self.loaders.setdefault(wanted, Loader(*wanted))
        options = {"device": self.device, "memory": int(asked["memory"] * 2**30)}
        if asked.get("precision"):
            options["precision"] = choose_precision(asked["precision"], self.device, self.place.out)
        if asked.get("target"):
            data = images.load(asked["dataset"], None)
            return [(target_of(asked).load(data, options, {}), data)]
        patterns = (asked.get("models") or asked["patterns"]).split(",")
        if not unfinished(job, self.place.store):
            return stored(patterns, self.place.store, asked["dataset"], images, options)
        return [pair for name in patterns for pair in self.untrained(name, asked["dataset"], images, options)]

    def untrained(
        self, name: str, dataset: str | None, images: Loader, options: dict[str, Any]
    ) -> list[tuple[list[Defense], Images]]:
        """Stand-ins for the defences that a training will leave: what differs in its weights alone costs the same."""
        model, _, votes = name.partition("@")
        card = self.cards.get(model.partition(":")[0])
        if card is None:
            return []
        untrained_defenses: list[Defense] = []
        for m in [int(votes)] if votes else card["votes"]:
            law = noise_from(card["noise"]) if m else None
            front = card.get("transform") if m and not law else None
            like = f"{card['network']} {law} {front} {options}"  # a plan asks of a defence nothing else but its votes
            if like not in self.stand_ins:
                before = front_of(card, None, self.device) if front else None
                self.stand_ins[like] = of_network(build(card["network"]), law, m, before, name=name, **options)
            untrained_defenses.append(self.stand_ins[like].of_votes(m) if m else self.stand_ins[like])
        return [(untrained_defenses, images.load(dataset or card["dataset"], untrained_defenses[0].shape[1:]))]

    def corrupted(self, asked: dict[str, Any]) -> list[CellJob]:
        """The cells of common corruptions."""
        which: Which = "set15" if asked["usual"] else "all19"
        given = {key: asked[key] for key in ("seed", "store", "data_dir", "device")} | {"n": asked["count"]}
        given["memory"] = int(asked["memory"] * 2**30)
        defenses, data, _ = corrupted_images(asked["patterns"], asked["dataset"], which, asked["reference"], **given)
        return [*corruptions.plan(defenses, data, seed=asked["seed"], repeats=asked["repeats"], chunk=asked["chunk"])]

    def cells(self, job: Job, store: CellStore, cells: Sequence[CellJob]) -> Planned:
        """From the cells of a job to its state and cost; a cell that an earlier job of the file makes is not paid twice."""
        if not cells:
            return Planned(job, "missing", passes=math.nan, seconds=math.nan)
        forwards = backwards = seconds = 0.0
        cells_left, cells_begun, renamed = 0, 0, False
        owner = job.needs if unfinished(job, self.place.store) else ()  # several models may have one stand-in
        for cell_job in cells:
            images = images_left(store, cell_job.cell)
            cells_left, cells_begun = cells_left + (images > 0), cells_begun + (images < cell_job.cell.labels["n"])
            renamed |= not images and not store.labelled(cell_job.cell)
            if not images or not self.priced or (owner, cell_job.cell.key) in self.counted:
                continue
            self.counted.add((owner, cell_job.cell.key))
            ahead, back = passes_of(cell_job)
            speed = self.rate(cell_job.defense, cell_job.data)
            forwards, backwards = forwards + images * ahead, backwards + images * back
            seconds += images * (ahead * speed[0] + back * speed[1])
        state: State = "in progress" if cells_begun else "missing"
        if not cells_left:
            state = "anew" if renamed else "done"
        return Planned(job, state, passes=forwards + backwards, seconds=seconds)

    def audit(self, job: Job, asked: dict[str, Any]) -> Planned:
        """The experiments of an audit, whose probes are counted as nothing."""
        defense_plans: list[Any] = []

        def note_plans(planned: list[Any]) -> bool:
            defense_plans.extend(planned)
            return False

        if self.models_missing:  # every model of the store is a source of transfer
            return Planned(job, "missing", passes=math.nan, seconds=math.nan)
        with job.context():  # its options are read as if it were run
            given = arguments(asked, job.kind)
        run = settle(**given | {"before": note_plans, "quiet": True})
        complete = all(evidence.complete for evidence in run.evidence)
        cells = [trial_job.cell for defense_plan in defense_plans for trial_job in defense_plan.jobs]
        settled = CellStore(self.place.out / SETTLED)
        tables = [_has_table(self.place.out / SETTLED, evidence) for evidence in run.evidence]
        anew = complete and not (all(tables) and all(map(settled.labelled, cells)))
        if job.kind == "audit":
            verdicts = {evidence.subject: _verdict(self.place.out / "audit", evidence) for evidence in run.evidence}
            complete = complete and all(verdicts.values())
            anew |= complete and not all(self.says_this(verdicts[each.subject], each, asked) for each in run.evidence)
        started = any((self.place.out / SETTLED / "runs").glob("*/chunk-*.npz"))
        costs = [cost for defense_plan in defense_plans for cost in defense_plan.costs.values()]
        passes = sum(cost.forwards + cost.backwards for cost in costs)
        if not complete:
            for defense_plan in defense_plans:
                passes += sum((s.selection + s.draws) * len(run.pairs[0][1]) for _, s in defense_plan.certificates)
        state: State = "in progress" if started else "missing"
        if complete:
            state = "anew" if anew else "done"
        return Planned(job, state, passes=passes, seconds=sum(cost.seconds for cost in costs))

    def says_this(self, found: dict[str, Any], evidence: Evidence, asked: dict[str, Any]) -> bool:
        """Whether a verdict on disk has these labels, this worst case, and is about the claim that is asked about now."""
        about = asked["norm"], parse_number(asked["eps"]), str(evidence.labels["dataset"])
        claim = stated_claim(asked["claim"], *about) if asked["claim"] else None
        claim = claim or published_claim(evidence, self.place.store) or replayed(evidence)
        worst = evidence.worst.estimate._asdict() if evidence.worst else None
        now = {"labels": Audit(evidence, (), None).to_dict()["labels"], "claim": dataclasses.asdict(claim), "worst": worst}
        there = {"labels": found["labels"], "claim": found["verdict"]["claim"], "worst": found["verdict"]["worst"]}
        return bool(there == json.loads(json.dumps(now, default=str)))

    def rate(self, defense: Defense, data: Images) -> tuple[float, float]:
        """Seconds of a row forward and of its way back, once per network."""
        body = getattr(defense, "body", None)
        spec = getattr(getattr(body, "network", None), "spec", None)
        key = f"{_shape(spec)} {defense.precision}" if spec else str(id(body or defense))
        if key not in self.speed:
            few = defense.of_votes(min(defense.draws, ROWS // 32))  # more would only take longer
            self.speed[key] = rates(few, data, rows=ROWS)
        return self.speed[key]


def _says_all_of(stored: dict[str, Any], card: dict[str, Any]) -> bool:
    """Whether a card of the store says what an import would write, but for what it would find out by trying the model."""
    return all(stored.get(key) == value for key, value in json.loads(json.dumps(card)).items() if key != "notes")


def _has_table(folder: Path, evidence: Evidence) -> bool:
    """Whether the table that lies there is of this evidence: one of other images, experiments or draws has the same file."""
    file = folder / f"{stem(evidence)}.csv"
    return file.is_file() and file.read_text(encoding="utf-8") == as_csv(frame(evidence))


def _verdict(folder: Path, evidence: Evidence) -> dict[str, Any]:
    """The audit that lies there, if it has a verdict and is of this evidence: one of another n, or other weights, has the
    same file. Empty otherwise."""
    file = folder / f"{stem(evidence)}.json"
    found: dict[str, Any] = read_json(file) if file.is_file() else {"verdict": None, "labels": {}}
    same = all(found["labels"].get(key) == evidence.labels.get(key) for key in ("n", "sha256"))
    return found if found["verdict"] and same else {}


def _shape(spec: dict[str, Any]) -> str:
    """What the time of a pass depends on."""
    return json.dumps({key: value for key, value in spec.items() if key not in ("mean", "std", "classes")}, sort_keys=True)


def passes_of(job: CellJob) -> tuple[float, float]:
    """Rows forward and back of one image of a cell, its scoring included: an estimate from above."""
    cell = job.cell.identity
    if cell["attack"]["name"] == "certify":
        return cell["attack"]["selection"] + cell["repeats"], 0.0
    attack = getattr(job, "attack", None)
    ahead, back = attack.passes(job.defense) if attack is not None else (0.0, 0.0)
    return ahead + cell["repeats"] * prediction_rows(job.defense), back


def _sampling(asked: dict[str, Any]) -> Sampling:
    given = sampling(asked)
    return Sampling(given["mode"], given["selection"], given["draws"], given["alpha"], given["radii"], given["give_up_level"])
