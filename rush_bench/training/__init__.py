"""Training: stages, the loop that can stop anywhere and go on, losses, fine-tuning modes.

`train("rush", dataset="digits")` runs a recipe and leaves a model in the store.
"""

from rush_bench.training.run import train

__all__ = ["train"]
