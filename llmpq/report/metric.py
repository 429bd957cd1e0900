"""What plans are compared by, its unit and its words: throughput, or cost where that is the objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpq.spec import Solved

if TYPE_CHECKING:
    import planner


@dataclass(frozen=True)
class Metric:
    """A number of a plan, and how it is spoken of."""

    title: str
    unit: str  # of a column or an axis
    phrase: str  # for one number, which is written in place of {}
    digits: str  # how it is formatted
    better: str
    best: str
    more_is_better: bool
    value: Callable[[Solved], float]  # NaN: not known

    def text(self, solved: Solved) -> str:
        value = self.value(solved)
        return "-" if math.isnan(value) else f"{value:{self.digits}}"

    def said(self, solved: Solved) -> str:
        """The number with its unit."""
        return self.phrase.format(self.text(solved))

    def rank(self, solved: Solved) -> float:
        """Less for a better plan."""
        return -self.value(solved) if self.more_is_better else self.value(solved)

    def percent(self, solved: Solved, other: Solved) -> float:
        """By how much the other plan's number is above this one's."""
        return 100 * (self.value(other) / self.value(solved) - 1)


THROUGHPUT = Metric(
    title="Throughput",
    unit="tokens/s",
    phrase="{} tokens/s",
    digits=".1f",
    better="faster",
    best="fastest",
    more_is_better=True,
    value=lambda solved: solved.prediction.tokens_per_s,
)
COST = Metric(  # in the currency of the devices' prices
    title="Cost",
    unit="1 M tokens cost",
    phrase="a million tokens cost {}",
    digits=".4g",
    better="cheaper",
    best="cheapest",
    more_is_better=False,
    value=lambda solved: math.nan if (cost := solved.cost_per_million_tokens) is None else cost,
)


def metrics(solved: Solved, found: planner.Explanation) -> tuple[Metric, ...]:
    """The one that plans are best in, which they are compared by; then the other, if devices have prices."""
    known = (THROUGHPUT,) if solved.cost_per_million_tokens is None else (THROUGHPUT, COST)
    return known if found.objective == "time" else known[::-1]
