"""The highest rate that a server keeps up with: steps of a ladder, searched from where it is likely to be."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 6  # of the ladder until the rate has doubled: 12 % each
FURTHEST = 32  # steps from the first one


def rate_of(step: int) -> float:
    """Requests a second."""
    return float(2.0 ** (step / STEPS))


def step_below(rate: float) -> int:
    """The highest step whose rate is at most this one."""
    return math.floor(math.log2(rate) * STEPS + 1e-9)


def highest(start: int, passes: Callable[[int], bool], furthest: int = FURTHEST) -> int | None:
    """The highest step that passes, where all below it do and none above it does; asks for few steps near `start`.

    It goes up or down from there, each time twice as far, until it has passed the limit, and then halves what is left
    between. None: no step that is at most `furthest` away passes.
    """
    up = passes(start)
    known, distance = start, 1
    while True:  # all that was asked for on one side of the limit is behind `known`
        at = start + distance if up else start - distance
        if distance > furthest:
            return known if up else None
        if passes(at) != up:
            break
        known, distance = at, 2 * distance
    low, high = (known, at) if up else (at, known)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low
