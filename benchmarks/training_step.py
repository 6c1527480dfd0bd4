"""How much of a RUSH training step is views and noise: ResNet-18 at batch 128 on a CPU. Target: at most 15 %.

    python benchmarks/training_step.py [--batch 128] [--rounds 5]

Processor time on one thread: the views and noise of a batch, and a whole step, which makes them again, in turn.
"""

import argparse
from functools import partial

import torch
from clock import interleaved, spread

from rush_bench.datasets import as_images
from rush_bench.networks import build
from rush_bench.registry import recipes
from rush_bench.settings import override
from rush_bench.training.loop import train_step
from rush_bench.training.optimisers import make_optimiser
from rush_bench.training.stage import Batch, Context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.batch, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = as_images(pixels, torch.arange(args.batch) % 10)
    recipe = recipes.load("rush")
    settings = override(recipe.settings, {"pretrain.batch_size": args.batch})
    network = build({"name": "resnet18"}).to(memory_format=torch.channels_last)
    plan = recipe.plans(settings)[0]
    stage = plan.make(Context(network, settings, {"pretrain": data, "train": data, "val": data}, 0))
    optimiser = make_optimiser(settings.pretrain, stage.parameter_groups())
    stage.train()
    batch = Batch(data, torch.arange(args.batch), torch.Generator().manual_seed(0), 0, 0)

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


if __name__ == "__main__":
    main()
