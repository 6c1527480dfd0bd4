"""What a training step of each recipe costs beside SimCLR's, against the passes that the recipe implies. Target: 1.3 times.

    python benchmarks/training_cost.py [--recipes 'ssp*,acl'] [--network resnet18] [--batch 16] [--rounds 5]

One row for each stage of a recipe that comes before its fine-tuning, over one mini-batch with all its replays. `passes`
counts an image through the encoder: 1 forward, 1 more back to the image, 1 more for the weights' gradients, so that an image
that trains costs 3; all over SimCLR's 6. `FLOPs` are those of the convolutions and matrix products in such a step, over
SimCLR's. `time` is the median over rounds of seconds (on a CPU the process's own, since others may share it) over those of
SimCLR's step just before. What counts is time over passes. All at the recipe's settings for 32x32 colour images (preset
`paper`), with the exceptions of SMALLER, on random images.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rush_bench.datasets import as_images
from rush_bench.networks import build, resolve
from rush_bench.registry import match, recipes
from rush_bench.settings import override
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.stage import Batch, Context, Plan, Stage

TARGET = 1.3
SMALLER = {  # Selfie's transformer has ten times the weights of a ResNet-18; clusters need images
    **{f"{stage}.{key}": value for stage in ("selfie", "joint") for key, value in (("dim", 128), ("layers", 2), ("heads", 4))},
    **{f"{stage}.feedforward": 256 for stage in ("selfie", "joint")},
    "pretrain.clusters": (2, 5),
    "probe.clusters": 5,
}


class Flops(TorchDispatchMode):
    """Counts the FLOPs of convolutions and matrix products. (torch's FlopCounterMode fails around autograd.grad of a leaf.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Job:
    """A stage ready to step, on a mini-batch that is all its data."""

    name: str
    stage: Stage
    optimiser: torch.optim.Optimizer
    plan: Plan
    count: int = 0

    def step(self) -> None:
        """All replays of one mini-batch."""
        data = self.stage.splits["train"]
        for replay in range(self.stage.replays):
            generator = torch.Generator(data.pixels.device).manual_seed(self.count)
            rows = torch.arange(len(data), device=data.pixels.device)
            train_step(self.stage, self.optimiser, Batch(data, rows, generator, 0, self.count, replay))
            self.count += 1

    def passes(self) -> float:
        """Implied by the settings, an image: rows of the encoder."""
        return self.plan.passes * row_weight(self.stage)

    def flops(self) -> int:
        """Counted in a step."""
        with Flops() as counter:
            self.step()
        return counter.total

    def seconds(self) -> float:
        """A step's: this process's own on a CPU, which others share."""
        begun = clock()
        self.step()
        return clock() - begun


def clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def row_weight(stage: Stage) -> float:
    """Rows of the encoder that one image stands for: another number for Selfie and a U-Net, three tasks at once."""
    tasks = getattr(stage, "tasks", [stage])
    return sum(OTHER_ROWS[one.name](one) if one.name in OTHER_ROWS else 1.0 for one in tasks)


def selfie_row(stage: Any) -> float:
    """Selfie's scores of an image: sixteen patches without the last stage, and the transformer."""
    images = stage.splits["train"].floats(slice(2))
    _, scores, _ = stage.problem(images, torch.Generator(images.device).manual_seed(0))
    return over(stage.encoder, scores, images)


def unet_row(stage: Any) -> float:
    """The noise that a diffusion's U-Net predicts in an image; its encoder takes no part."""
    images = stage.splits["train"].floats(slice(2))
    times = torch.zeros(2, dtype=torch.long, device=images.device)
    return over(stage.network.encoder, lambda x: stage.unet(x, times), images)


OTHER_ROWS = {"selfie": selfie_row, "diffusion": unet_row}


@torch.no_grad()
def over(encoder: Any, function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    """FLOPs of a function of images over the encoder's."""
    counts = []
    for each in (function, encoder):
        with Flops() as counter:
            each(images)
        counts.append(counter.total)
    return counts[0] / counts[1]


def jobs(
    names: list[str], network: dict[str, Any], batch: int, smaller: dict[str, Any], shape: tuple[int, int, int] = (3, 32, 32)
) -> Iterator[Job]:
    """Every stage before fine-tuning of these recipes; the only one where there is no other."""
    pixels = torch.randint(0, 256, (batch, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = as_images(pixels, torch.arange(batch) % 10, classes=[str(label) for label in range(10)]).to(device())
    for name in names:
        recipe = recipes.load(name)
        settings = override(recipe.settings, recipe.adapt("paper", shape))
        known = {key: value for key, value in smaller.items() if has(settings, key)}
        wanted = [plan.name for plan in recipe.plans(settings)]
        settings = override(settings, known, {f"{plan}.batch_size": batch for plan in wanted})
        for number in range(max(1, len(wanted) - 1)):
            yield make_job(name, recipe.plans(settings), number, settings, network, data)


def make_job(name: str, plans: list[Plan], number: int, settings: Any, network: dict[str, Any], data: Any) -> Job:
    """Stage `number` on a network of its own, after what the stages before leave behind (they take no step)."""
    # One network for all: without DeACL's wider padding, which makes its maps larger.
    own = {"members": settings.network.members or 1, "mean": settings.network.mean, "std": settings.network.std}
    spec = {**network, **own, "channels": data.shape[0], "size": data.shape[1]}
    model = build(resolve(spec)).to(data.pixels.device, memory_format=torch.channels_last)
    context = Context(model, settings, dict.fromkeys(("pretrain", "train", "val"), data), 0)
    for plan in plans[: number + 1]:
        stage = plan.make(context).to(data.pixels.device)
        optimiser = make_optimiser(plan.settings, stage.parameter_groups())
        stage.prepare(fresh=True)
        stage.begin_epoch(0)
        if plan is not plans[number]:
            stage.finish()
    return Job(f"{name} {plan.name}", stage, optimiser, plans[number])


def has(settings: Any, key: str) -> bool:
    """Whether settings have a value of this dotted name."""
    for part in key.split("."):
        if not hasattr(settings, part):
            return False
        settings = getattr(settings, part)
    return True


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="all")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    own = [name for name, entry in recipes.entries.items() if entry.entry_point is None and name != "finetune"]
    network = {"name": args.network}
    (reference,) = jobs(["simclr"], network, args.batch, SMALLER)
    units, flops, times = reference.passes(), reference.flops(), []
    print(f"{device()}, threads {torch.get_num_threads()}, {args.network}, batch {args.batch}, {args.rounds} rounds")
    print(f"{'recipe and stage':24} passes  FLOPs   time  time/passes")
    worst = 0.0
    for job in jobs(match("recipe", args.recipes.split(","), own), network, args.batch, SMALLER):
        counted, pairs = job.flops() / flops, []  # the first step warms up
        for _ in range(args.rounds):
            times.append(reference.seconds())
            pairs.append(job.seconds() / times[-1])
        implied, taken = job.passes() / units, statistics.median(pairs)
        worst = max(worst, taken / implied)
        print(f"{job.name:24} {implied:6.2f} {counted:6.2f} {taken:6.2f}  {taken / implied:11.2f}", flush=True)
    print(f"a step of SimCLR {statistics.median(times):.2f} s; worst time/passes {worst:.2f} (target at most {TARGET})")


if __name__ == "__main__":
    main()
