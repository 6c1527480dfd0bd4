"""The loop: runs one stage after the other, one step after the other, and can stop and resume at any step."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rush_bench.datasets import Images
from rush_bench.deadline import NEVER, Deadline
from rush_bench.errors import RushBenchError, WorkLeft
from rush_bench.progress import Bar
from rush_bench.training.checkpoint import CheckpointFile
from rush_bench.training.log import TrainingLog
from rush_bench.training.optimisers import learning_rate, make_optimiser
from rush_bench.training.processes import Processes, tensors_of
from rush_bench.training.seeds import derive, permutation
from rush_bench.training.stage import Batch, Plan, Stage

READ_EVERY = 20  # steps between reads of the loss, each a host sync
READ_SECONDS = 1.0  # or this, where steps are slow
SAVE_SHARE = 0.05  # a checkpoint at each epoch's end, as long as writing them takes no more of the time than this
SAVE_INSIDE = 60.0  # and inside an epoch


@dataclass
class Position:
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
        deadline: Deadline = NEVER,
        processes: Processes | None = None,
        log: str = "",
    ) -> None:
        self.file, self.seed, self.device, self.progress = file, seed, device, progress
        self.processes = processes or Processes()
        self.deadline = deadline
        self.began = self.saved = self.read_at = time.monotonic()
        self.loaded = file.load(device)
        self.position = Position(**self.loaded["where"]) if self.loaded else Position()
        self.processes.require_same("checkpoints", asdict(self.position))
        self.log = TrainingLog(file.model_folder, log) if self.processes.first else None
        self.earlier = self.position.seconds
        self.carried: dict[str, Any] = self.loaded["carried"] if self.loaded else {}
        self.best_state: dict[str, Tensor] | None = None
        self.pending: list[Tensor] = []
        self.save_cost = 0.0
        self.metrics_text = ""  # the latest of validation, as the bar shows them

    def continue_at(self, position: Position) -> None:
        """Begin there: what comes before was done by another run, whose time counts."""
        self.position, self.earlier = position, position.seconds

    def run(self, number: int, plan: Plan, stage: Stage, data: Images) -> None:
        """Train stage `number` to its end, from wherever the checkpoint left it."""
        stage.to(self.device)
        optimiser = make_optimiser(plan.settings, stage.parameter_groups())
        learning = [weight for group in optimiser.param_groups for weight in group["params"]]
        with self.processes.split_batches(stage, learning, stage.second_order):
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
            self.position = Position(stage=number, seconds=self.position.seconds, history=self.position.history)
            self.best_state = None
            stage.prepare(fresh=True)
        self.processes.broadcast(tensors_of({"stage": stage.state_dict(), "carried": self.carried}))
        position, batches = self.position, max(1, len(data) // settings.batch_size)
        steps = batches * stage.replays
        self.metrics_text = ""
        self.progress.begin(plan.name, settings.epochs * steps, position.epoch * steps + position.step)
        generator = torch.Generator(self.device)
        while position.epoch < settings.epochs:
            # An epoch is whole batches only: the last few images of its order wait for another epoch.
            order = permutation(len(data), self.seed, plan.name, "order", position.epoch).to(self.device)
            stage.begin_epoch(position.epoch)
            while position.step < steps:
                step = position.epoch * steps + position.step
                first = position.step // stage.replays * settings.batch_size
                batch = Batch(
                    data,
                    order[first : first + settings.batch_size],
                    generator.manual_seed(derive(self.seed, plan.name, "step", step)),
                    position.epoch,
                    step,
                    position.step % stage.replays,
                )
                rate = learning_rate(settings, step, steps)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                self.pending.append(train_step(stage, optimiser, batch))
                position.step += 1
                self.between_steps(plan, stage, optimiser, steps)
            self.end_epoch(plan, stage, optimiser)
        stage.best = self.best_state
        stage.finish()

    def between_steps(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer, steps: int) -> None:
        """Read the loss, save, stop: each only when it is time."""
        position, now = self.position, time.monotonic()
        stop = self.deadline != NEVER and self.processes.broadcast_flag(self.deadline.over)
        save = stop or now - self.saved >= SAVE_INSIDE
        if save or position.step == steps or len(self.pending) >= READ_EVERY or now - self.read_at >= READ_SECONDS:
            loss = self.read_losses(plan)
            text = f"epoch {position.epoch + 1}/{plan.settings.epochs}  loss {loss:.4f}{self.metrics_text}"
            self.progress.show(position.epoch * steps + position.step, text)
        if save:
            self.save(plan, stage, optimiser)
        if stop:
            raise WorkLeft(
                f"stopped in stage {plan.name!r}, epoch {position.epoch + 1} of {plan.settings.epochs}; "
                "run the same command again to resume"
            )

    def read_losses(self, plan: Plan) -> float:
        """Read the losses not read yet and return the last; one that is not finite ends the run."""
        position, values = self.position, torch.stack(self.pending).tolist()
        self.pending, self.read_at = [], time.monotonic()
        for step, value in enumerate(values, start=position.step - len(values) + 1):
            if not math.isfinite(value):
                raise self.diverged(plan, f"the loss is {value}", step)
        position.loss_sum, position.loss_count = position.loss_sum + sum(values), position.loss_count + len(values)
        return values[-1]

    def diverged(self, plan: Plan, what: str, step: int) -> RushBenchError:
        """The error for a run whose numbers are no longer finite."""
        kept = f"the last good checkpoint is kept in {self.file.folder}" if self.file.path.exists() else "nothing was saved"
        return RushBenchError(
            f"{what} in stage {plan.name!r}, epoch {self.position.epoch + 1}, step {step}; {kept}. "
            f"Try again with a smaller --set {plan.name}.lr and another --name"
        )

    def end_epoch(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Validate, note the epoch, keep the best, save."""
        position = self.position
        entry = {"stage": plan.name, "epoch": position.epoch + 1, "loss": position.loss_sum / max(1, position.loss_count)}
        if stage.validates_after(position.epoch, plan.settings.epochs):
            metrics = stage.validate()
            words = "".join(f"  {key} {100 * value:.1f} %" for key, value in metrics.items())
            self.metrics_text = words and f"{words} after epoch {position.epoch + 1}"
            entry |= metrics
            if stage.selection_metric is not None and metrics[stage.selection_metric] > position.best.get("score", -1.0):
                position.best = {"score": metrics[stage.selection_metric], "epoch": position.epoch + 1}
                self.best_state = {key: value.clone() for key, value in stage.weights().items()}
        position.history.append(entry)
        if self.log is not None:
            self.log.write(position.history)
        position.epoch, position.step, position.loss_sum, position.loss_count = position.epoch + 1, 0, 0.0, 0
        if position.epoch == plan.settings.epochs or (time.monotonic() - self.saved) * SAVE_SHARE >= self.save_cost:
            self.save(plan, stage, optimiser)

    def save(self, plan: Plan, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Write the checkpoint, unless the weights are no longer finite. Its seconds are those of all processes together."""
        module = stage.state_dict()
        tensors = [value for value in module.values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in tensors]).all()):
            raise self.diverged(plan, "weights are not finite", self.position.step)
        start = time.monotonic()
        self.position.seconds = self.earlier + (start - self.began) * self.processes.count
        if self.processes.first:
            self.file.save(
                {
                    "where": asdict(self.position),
                    "module": module,
                    "optimiser": optimiser.state_dict(),
                    "best_state": self.best_state,
                    "carried": self.carried,
                }
            )
        self.saved = time.monotonic()
        self.save_cost = self.saved - start


def train_step(stage: Stage, optimiser: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step: gradients, update, the stage's own follow-up. Returns the loss as a tensor; no host sync."""
    optimiser.zero_grad(set_to_none=True)
    loss = stage.backward(batch)
    optimiser.step()
    stage.after_step(batch)
    return loss
