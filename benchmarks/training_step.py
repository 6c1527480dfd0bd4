"""How much of a RUSH training step is views and noise: ResNet-18 at batch 128 on a CPU. Target: at most 15 %.

python benchmarks/training_step.py [--batch 128] [--steps 3]
"""

import argparse
import time

import torch

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
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
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
    whole = views = 0.0
    for step in range(args.steps + 1):
        batch = Batch(data, torch.arange(args.batch), torch.Generator().manual_seed(step), 0, step)
        begun = time.perf_counter()
        stage.views(batch.images, batch.generator)
        stage.smooth(stage.views(batch.images, batch.generator), batch)
        made = time.perf_counter()
        train_step(stage, optimiser, batch)
        if step:  # the first one warms up
            views += made - begun
            whole += time.perf_counter() - made
    print(f"threads {torch.get_num_threads()}, batch {args.batch}, {args.steps} steps")
    print(f"a step {whole / args.steps:.2f} s, of which two views and noise {views / args.steps * 1e3:.0f} ms")
    print(f"views and noise / step: {views / whole:.1%} (target at most 15 %)")


if __name__ == "__main__":
    main()
