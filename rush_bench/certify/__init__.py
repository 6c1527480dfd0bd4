"""The mathematics of certificates: bounds, sampling, comparison with attacks, files in exchange. Loaded when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rush_bench.certify.bounds import Certificate as Certificate
    from rush_bench.certify.bounds import certificate as certificate
    from rush_bench.certify.check import Comparison as Comparison
    from rush_bench.certify.check import comparisons as comparisons
    from rush_bench.certify.check import contradictions as contradictions
    from rush_bench.certify.sampling import Sampling as Sampling

_HOME = {
    "Certificate": "bounds",
    "Comparison": "check",
    "Sampling": "sampling",
    "certificate": "bounds",
    "comparisons": "check",
    "contradictions": "check",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rush_bench.certify.{_HOME[name]}"), name)
