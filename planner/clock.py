"""Clock: when a planning call must have answered. One is made where the call comes in and handed down."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class OutOfTime(Exception):
    """The clock has run out in the middle of something that is of no use unfinished."""


@dataclass(frozen=True)
class Clock:
    """The end of the time that something may take; the time that passes is that of the wall."""

    end: float  # by time.perf_counter()

    @classmethod
    def of(cls, limit_s: float) -> Clock:
        """One that runs out that many seconds from now."""
        return cls(time.perf_counter() + limit_s)

    @property
    def left_s(self) -> float:
        return max(0.0, self.end - time.perf_counter())

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.end

    def check(self) -> None:
        """Raise OutOfTime if the time is over."""
        if self.over:
            raise OutOfTime

    def part(self, share: float = 1.0, *, most_s: float = math.inf) -> Clock:
        """One for a share of the time left, all of it at most, and for `most_s` seconds at most."""
        return Clock(time.perf_counter() + min(self.left_s * min(share, 1.0), most_s))


NEVER = Clock(math.inf)
