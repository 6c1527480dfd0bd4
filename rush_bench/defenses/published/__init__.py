"""Weights that other repositories published: recognised by their keys, mapped whole or refused (sources S4.1)."""

from rush_bench.defenses.published.families import Family, recognise
from rush_bench.defenses.published.importing import Imported, import_checkpoint

__all__ = ["Family", "Imported", "import_checkpoint", "recognise"]
