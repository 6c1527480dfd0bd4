"""When work stops with some of it left: one value, from `--max-minutes` down to the loop over chunks."""

import math
import time
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.monotonic()`; infinity: there is none."""

    at: float = math.inf

    @classmethod
    def after(cls, minutes: "float | Deadline | None") -> Self:
        """So many minutes from now; None: never. A deadline stays what it is, so that callers can hand theirs on."""
        if isinstance(minutes, Deadline):
            return cls(minutes.at)
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
