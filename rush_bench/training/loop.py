"""The loop: runs one stage after the other, one step after the other, and can stop and go on at any step."""

import math
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.errors import RushBenchError, WorkLeft
from rush_bench.progress import Bar
from rush_bench.training.checkpoint import CheckpointFile
from rush_bench.training.log import Log
from rush_bench.training.optimisers import learning_rate, make_optimiser
from rush_bench.training.processes import Processes, tensors_of
from rush_bench.training.seeds import derive, permutation
from rush_bench.training.stage import Batch, Plan, Stage

READ_EVERY = 20  # steps between reads of the loss, each a host sync
READ_SECONDS = 1.0  # or this, where steps are slow
SAVE_SHARE = 0.05  # a checkpoint at each epoch's end, as long as writing them takes no more of the time than this
SAVE_INSIDE = 60.0  # and inside an epoch


@dataclass
class Where:
    """How far a run is; plain values, kept in the checkpoint."""

    stage: int = 0
    epoch: int = 0
    step: int = 0  # within the epoch
    loss_sum: float = 0.0  # over the losses read in this epoch
    loss_count: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)  # of this stage: score and epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry for each epoch done


class Loop:
    """State of a run while it trains: where it is, the checkpoint file, the clock; the same in all processes."""

    def __init__(
        self,
        file: CheckpointFile,
        seed: int,
        device: torch.device,
        progress: Bar,
        max_minutes: float | None,
        processes: Processes | None = None,
        log: str = "",
    ) -> None:
        self.file, self.seed, self.device, self.progress = file, seed, device, progress
        self.processes = processes or Processes()
        self.began = monotonic()
        self.deadline = None if max_minutes is None else self.began + 60 * max_minutes
        self.saved = self.read_at = self.began
        self.loaded = file.load(device)
        self.where = Where(**self.loaded["where"]) if self.loaded else Where()
        self.processes.same("checkpoints", asdict(self.where))
        self.log = Log(file.model_folder, log) if self.processes.first else None
        self.earlier = self.where.seconds
        self.carried: dict[str, Any] = self.loaded["carried"] if self.loaded else {}
        self.best_state: dict[str, Tensor] | None = None
        self.pending: list[Tensor] = []
        self.save_cost = 0.0
        self.numbers = ""  # the latest of validation, as the bar shows them

    def begin_at(self, where: Where) -> None:
        """Begin there: what comes before was done by another run, whose time counts."""
        self.where, self.earlier = where, where.seconds

    def run(self, number: int, plan: Plan, stage: Stage, data: Images) -> None:
        """Train stage `number` to its end, from wherever the checkpoint left it."""
        stage.to(self.device)
        optimiser = make_optimiser(plan.settings, stage.parameter_groups())
        learning = [weight for group in optimiser.param_groups for weight in group["params"]]
        with self.processes.share(stage, learning, stage.twice):
            self.run_shared(number, plan, stage, optimiser, data)

    def run_shared(self, number: int, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer, data: Images) -> None:
        """The same, where processes share the batches of the stage's networks."""
        settings = plan.settings
        if self.loaded:
            stage.load_state_dict(self.loaded["module"])
            optimiser.load_state_dict(self.loaded["optimiser"])
            self.best_state, self.loaded = self.loaded["best_state"], None
            stage.prepare(fresh=False)
        else:
            self.where = Where(stage=number, seconds=self.where.seconds, history=self.where.history)
            self.best_state = None
            stage.prepare(fresh=True)
        self.processes.agree(tensors_of({"stage": stage.state_dict(), "carried": self.carried}))
        where, batches = self.where, max(1, len(data) // settings.batch_size)
        steps = batches * stage.replays
        self.numbers = ""
        self.progress.begin(plan.name, settings.epochs * steps, where.epoch * steps + where.step)
        generator = torch.Generator(self.device)
        while where.epoch < settings.epochs:
            # An epoch is whole batches only: the last few images of its order wait for another epoch.
            order = permutation(len(data), self.seed, plan.name, "order", where.epoch).to(self.device)
            stage.begin_epoch(where.epoch)
            while where.step < steps:
                step = where.epoch * steps + where.step
                first = where.step // stage.replays * settings.batch_size
                batch = Batch(
                    data,
                    order[first : first + settings.batch_size],
                    generator.manual_seed(derive(self.seed, plan.name, "step", step)),
                    where.epoch,
                    step,
                    where.step % stage.replays,
                )
                rate = learning_rate(settings, step, steps)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                self.pending.append(train_step(stage, optimiser, batch))
                where.step += 1
                self.between_steps(plan, stage, optimiser, steps)
            self.end_epoch(plan, stage, optimiser)
        stage.best = self.best_state
        stage.finish()

    def between_steps(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer, steps: int) -> None:
        """Read the loss, save, stop: each only when it is time."""
        where, now = self.where, monotonic()
        stop = self.deadline is not None and self.processes.decide(now >= self.deadline)
        save = stop or now - self.saved >= SAVE_INSIDE
        if save or where.step == steps or len(self.pending) >= READ_EVERY or now - self.read_at >= READ_SECONDS:
            loss = self.read_losses(plan)
            text = f"epoch {where.epoch + 1}/{plan.settings.epochs}  loss {loss:.4f}{self.numbers}"
            self.progress.show(where.epoch * steps + where.step, text)
        if save:
            self.save(plan, stage, optimiser)
        if stop:
            raise WorkLeft(
                f"stopped in stage {plan.name!r}, epoch {where.epoch + 1} of {plan.settings.epochs}; "
                "run the same command again to go on"
            )

    def read_losses(self, plan: Plan) -> float:
        """Read the losses not read yet and return the last; one that is not finite ends the run."""
        where, values = self.where, torch.stack(self.pending).tolist()
        self.pending, self.read_at = [], monotonic()
        for step, value in enumerate(values, start=where.step - len(values) + 1):
            if not math.isfinite(value):
                raise self.diverged(plan, f"the loss is {value}", step)
        where.loss_sum, where.loss_count = where.loss_sum + sum(values), where.loss_count + len(values)
        return values[-1]

    def diverged(self, plan: Plan, what: str, step: int) -> RushBenchError:
        """The error for a run whose numbers are no longer finite."""
        kept = f"the last good checkpoint is kept in {self.file.folder}" if self.file.path.exists() else "nothing was saved"
        return RushBenchError(
            f"{what} in stage {plan.name!r}, epoch {self.where.epoch + 1}, step {step}; {kept}. "
            f"Try again with a smaller --set {plan.name}.lr and another --name"
        )

    def end_epoch(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Validate, note the epoch, keep the best, save."""
        where = self.where
        entry = {"stage": plan.name, "epoch": where.epoch + 1, "loss": where.loss_sum / max(1, where.loss_count)}
        if stage.due(where.epoch, plan.settings.epochs):
            numbers = stage.validate()
            self.numbers = "".join(f"  {key} {100 * value:.1f} %" for key, value in numbers.items())
            entry |= numbers
            if stage.score is not None and numbers[stage.score] > where.best.get("score", -1.0):
                where.best = {"score": numbers[stage.score], "epoch": where.epoch + 1}
                self.best_state = {key: value.clone() for key, value in stage.weights().items()}
        where.history.append(entry)
        if self.log is not None:
            self.log.epoch(where.history)
        where.epoch, where.step, where.loss_sum, where.loss_count = where.epoch + 1, 0, 0.0, 0
        if where.epoch == plan.settings.epochs or (monotonic() - self.saved) * SAVE_SHARE >= self.save_cost:
            self.save(plan, stage, optimiser)

    def save(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Write the checkpoint, unless the weights are no longer finite. Its seconds are those of all processes together."""
        tensors = [value for value in stage.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in tensors]).all()):
            raise self.diverged(plan, "weights are not finite", self.where.step)
        start = monotonic()
        self.where.seconds = self.earlier + (start - self.began) * self.processes.count
        if self.processes.first:
            self.file.save(
                {
                    "where": asdict(self.where),
                    "module": stage.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "best_state": self.best_state,
                    "carried": self.carried,
                }
            )
        self.saved = monotonic()
        self.save_cost = self.saved - start


def train_step(stage: Stage, optimiser: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step: gradients, update, the stage's own follow-up. Returns the loss as a tensor; no host sync."""
    optimiser.zero_grad(set_to_none=True)
    loss = stage.backward(batch)
    optimiser.step()
    stage.after_step(batch)
    return loss
