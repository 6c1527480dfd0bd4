"""When work stops with some of it left: one value, from `--max-minutes` down to the loop over chunks."""

import math
import time
from dataclasses import dataclass
from numbers import Real
from typing import Self

from rush_bench.errors import BadInput


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.monotonic()`; infinity: there is none."""

    at: float = math.inf

    @classmethod
    def after(cls, minutes: "float | Deadline | None") -> Self:
        """So many minutes from now; None: never. A deadline stays what it is, so that callers can hand theirs on.

        BadInput for less than 0 minutes, for NaN, which would never be over, and for what is no number.
        """
        if isinstance(minutes, Deadline):
            return cls(minutes.at)
        if minutes is not None and not (isinstance(minutes, Real) and minutes >= 0):
            raise BadInput(f"max_minutes = {minutes!r} must be a number of minutes, at least 0")
        return cls() if minutes is None else cls(time.monotonic() + 60 * minutes)

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self.at

    @property
    def minutes_left(self) -> float | None:
        """None where there is no deadline, 0 where it has passed."""
        return None if math.isinf(self.at) else max(0.0, (self.at - time.monotonic()) / 60)


NEVER = Deadline()
