"""How much of a RUSH training step is views and noise: ResNet-18 at batch 128 on a CPU. Target: at most 15 %.

    python benchmarks/training_step.py [--batch 128] [--rounds 5]

Processor time on one thread: the views and noise of a batch, and a whole step, which makes them again, in turn.
"""

import argparse
from functools import partial

import torch
from clock import interleaved, spread
from torch import nn

from rush_bench.datasets import Images, as_images
from rush_bench.networks import build
from rush_bench.registry import recipes
from rush_bench.settings import override
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.stage import Batch, Context, Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.batch, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = as_images(pixels, torch.arange(args.batch) % 10)
    stage, optimiser, batch = step_of("rush", build({"name": "resnet18"}), data)

    def views() -> None:
        stage.views(batch.images, batch.generator)
        stage.smooth(stage.views(batch.images, batch.generator), batch)

    ways = {"views": views, "step": partial(train_step, stage, optimiser, batch)}
    for way in ways.values():
        way()  # to warm up
    times = interleaved(ways, args.rounds)
    share = [part / whole for part, whole in zip(times["views"], times["step"], strict=True)]
    print(f"batch {args.batch}, {args.rounds} rounds, one thread, torch {torch.__version__}: seconds, median (least to most)")
    print(f"a step {spread(times['step'])}, two views and noise {spread(times['views'])}")
    print(f"views and noise / step: {spread([100 * each for each in share])} % (target at most 15 %)")


def step_of(recipe: str, network: nn.Module, data: Images) -> tuple[Stage, torch.optim.Optimizer, Batch]:
    """What `train_step` takes for a step of a recipe's pre-training on these images, all of them one batch."""
    loaded = recipes.load(recipe)
    settings = override(loaded.settings, {"pretrain.batch_size": len(data)})
    network.to(memory_format=torch.channels_last)
    stage = loaded.plans(settings)[0].make(Context(network, settings, {"pretrain": data, "train": data, "val": data}, 0))
    optimiser = make_optimiser(settings.pretrain, stage.parameter_groups())
    return stage.train(), optimiser, Batch(data, torch.arange(len(data)), torch.Generator().manual_seed(0), 0, 0)


if __name__ == "__main__":
    main()
