"""Training: stages, the loop that can stop and resume anywhere, losses, fine-tuning modes.

`train("rush", dataset="digits")` runs a recipe and leaves a model in the store.
"""

from rush_bench.training.run import train

__all__ = ["train"]
