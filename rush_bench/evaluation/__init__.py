"""Evaluation: scoring, statistics, records and the loop that resumes. Loaded when used: records need no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rush_bench.evaluation.runner import attack
    from rush_bench.evaluation.work import Run

__all__ = ["Run", "attack"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rush_bench.evaluation import runner  # which has Run too

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
