"""Attacks: one file each, found by `NAMES`. `rush_bench.registry.attacks.load("pgd")` is the class, its fields the settings."""
