"""Demand: requests that come at random, how many of them, and how long they may wait."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random

from llmpq.spec.latency import PERCENTS, Latency
from llmpq.spec.ranges import Count, Factor, Rate, Seed
from llmpq.spec.record import Record, check

PERCENT = 95  # of the requests wait no longer than the limits


def at_percent(percentiles: tuple[float, ...]) -> float:
    """Of the percentiles of a Latency the one at PERCENT."""
    return percentiles[PERCENTS.index(PERCENT)]


@dataclass(frozen=True, slots=True)
class Demand(Record):
    """Requests come one by one at random times (a Poisson process), `rate` a second on average.

    A Workload beside it says how long they are, in the order they come and again from the start, and how many may be
    computed at once. Limits hold for PERCENT % of the requests.
    """

    max_ttft_s: Factor  # from a request's arrival to its first token
    rate: Factor | None = None  # that has to be answered; None: as many as possible
    max_tpot_s: Factor | None = None  # of a request, its mean; None: no limit
    requests: Count = 200  # that are simulated
    seed: Seed = 0

    def arrivals_s(self, rate: float) -> list[float]:
        """When they come, the first at 0. At twice the rate the same ones come twice as fast."""
        random = Random(self.seed)
        gaps = (random.expovariate(1.0) for _ in range(self.requests - 1))
        return [at / rate for at in accumulate(gaps, initial=0.0)]

    def kept_by(self, latency: Latency) -> bool:
        """Whether requests that took so long kept to the limits."""
        limits = ((latency.ttft_s, self.max_ttft_s), (latency.tpot_s, self.max_tpot_s))
        return all(found is None or most is None or at_percent(found) <= most for found, most in limits)


@dataclass(frozen=True, slots=True)
class Attained(Record):
    """What a plan is expected to do with a demand."""

    demand: Demand
    requests_per_s: Rate  # the most within the limits
    latency: Latency  # at the demand's own rate, or at that one

    def validate(self) -> None:
        check(self.demand.kept_by(self.latency), "latency", "breaks the limits of the demand")
