"""How long requests take, in a run or a simulation of one: one by one, and in percentiles over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.spec.costs import LEAST_S
from llmpq.spec.ranges import Duration, Index, Rate
from llmpq.spec.record import Record, check

PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class RequestTimes(Record):
    """Seconds since the first request of a run came, as the first stage has them."""

    arrived_s: Duration
    first_token_s: Duration | None  # None: it was cancelled before
    ended_s: Duration
    tokens: Index  # generated
    reused: Index = 0  # tokens of the prompt that were computed for others, which begin alike

    def validate(self) -> None:
        order = [t for t in (self.arrived_s, self.first_token_s, self.ended_s) if t is not None]
        check(order == sorted(order), "ended_s", f"is {self.ended_s}; the times of a request are not in order")

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, on average; None if there is none."""
        if self.first_token_s is None or self.tokens < 2:
            return None
        return (self.ended_s - self.first_token_s) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Latency(Record):
    """What a queue of requests took. TTFT and TPOT are percentiles over requests, of PERCENTS, None if none has one."""

    requests: Index
    requests_per_s: Rate  # from the first one's arrival to the last one's end
    tokens_per_s: Rate
    ttft_s: tuple[Duration, ...] | None
    tpot_s: tuple[Duration, ...] | None

    @classmethod
    def of(cls, times: Sequence[RequestTimes]) -> Latency:
        """Raises ValueError without a request."""
        took = max(LEAST_S, max(t.ended_s for t in times) - min(t.arrived_s for t in times))
        first = [t.ttft_s for t in times if t.ttft_s is not None]
        later = [t.tpot_s for t in times if t.tpot_s is not None]
        return cls(
            len(times),
            len(times) / took,
            sum(t.tokens for t in times) / took,
            tuple(percentile(first, p) for p in PERCENTS) if first else None,
            tuple(percentile(later, p) for p in PERCENTS) if later else None,
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent lie, linearly between two values. Raises ValueError for no values."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
