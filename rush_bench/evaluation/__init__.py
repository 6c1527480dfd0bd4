"""Evaluation: the one measuring loop, its kinds (attacks, corruptions, certificates), and scoring."""

from rush_bench.evaluation.certificates import certify as certify
from rush_bench.evaluation.runner import attack as attack
from rush_bench.evaluation.work import Run as Run
