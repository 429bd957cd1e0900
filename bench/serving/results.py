"""From trials of servers to rows: the rate that each keeps up with, ours beside llama.cpp's. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serving.client import Outcome
from bench.serving.ladder import rate_of
from bench.serving.servers import CONTENDERS, JUDGED, OURS
from llmpq.spec.latency import PERCENTS

TTFT_S = 2.0  # at PERCENT, at most
PERCENT = 95
GOAL, THREADS = 1.5, 2  # requests/s of JUDGED over the best of llama.cpp's with the same weights, with so many threads
_AT = PERCENTS.index(PERCENT)

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What a contender did with a load of one step of the ladder; `step` None: all of it at once."""

    contender: str
    round: int
    step: int | None
    outcome: Outcome

    @property
    def passes(self) -> bool:
        """Whether all was answered, and soon enough."""
        latency = self.outcome.latency
        if latency is None or latency.ttft_s is None or self.outcome.lost:
            return False
        return latency.ttft_s[_AT] <= TTFT_S

    def to_dict(self) -> Row:
        latency = self.outcome.latency
        return {
            "contender": self.contender,
            "round": self.round,
            "rate": None if self.step is None else rate_of(self.step),
            "answered": len(self.outcome.times),
            "lost": len(self.outcome.lost),
            "requests_per_s": None if latency is None else latency.requests_per_s,
            "tokens_per_s": None if latency is None else latency.tokens_per_s,
            "ttft_s": None if latency is None else latency.ttft_s,
            "tpot_s": None if latency is None else latency.tpot_s,
        }


def rows_of(reached: Mapping[str, Sequence[int | None]], trials: Sequence[Trial], threads: int) -> list[Row]:
    """One for each contender with the steps it reached, by round; 0 requests/s where it kept up with none."""
    rates = {name: [0.0 if step is None else rate_of(step) for step in steps] for name, steps in reached.items()}
    rows = []
    for name, found in rates.items():
        rate = statistics.median_low(found)
        rows.append(
            {
                "contender": name,
                "rate": rate,
                "rates": found,
                "spread": (max(found) - min(found)) / rate if rate else 0.0,
                **_percentiles([trial for trial in trials if trial.contender == name], rate),
                **(_compared(name, rates, threads) if name.startswith(OURS) else {}),
            }
        )
    return rows


def _percentiles(trials: Sequence[Trial], rate: float) -> Row:
    """Of TTFT and TPOT at this rate, each the median over the trials; and what became of all requests."""
    latencies = [
        trial.outcome.latency
        for trial in trials
        if trial.step is not None and rate_of(trial.step) == rate and trial.outcome.latency is not None
    ]
    found: Row = {
        "answered": sum(len(trial.outcome.times) for trial in trials),
        "lost": sum(len(trial.outcome.lost) for trial in trials),
    }
    for what in ("ttft_s", "tpot_s"):
        each = [values for latency in latencies if (values := getattr(latency, what)) is not None]
        found[what] = [statistics.median(column) for column in zip(*each, strict=True)] or None
    return found


def _compared(name: str, rates: Mapping[str, Sequence[float]], threads: int) -> Row:
    """Ours beside the best of the others with the same weights; the ratio is the median over the rounds."""
    others = [
        other
        for other in rates
        if not other.startswith(OURS) and CONTENDERS[other].weights == CONTENDERS[name].weights and any(rates[other])
    ]
    rival = max(others, key=lambda other: statistics.median(rates[other]), default=None)
    if rival is None:
        return {"rival": None, "ratio": None, "goal": None}
    ratios = [mine / theirs for mine, theirs in zip(rates[name], rates[rival], strict=True) if theirs]
    goal = GOAL if name == JUDGED and threads == THREADS else None
    return {"rival": rival, "ratio": statistics.median(ratios), "goal": goal}
