"""What plans are compared by, its unit and its words: throughput, or cost where that is the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpq.spec import Plan

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
    of: Callable[[Plan], float | None]  # None: not known

    def value(self, plan: Plan) -> float:
        """Of a plan of which it is known."""
        value = self.of(plan)
        assert value is not None
        return value

    def text(self, plan: Plan) -> str:
        value = self.of(plan)
        return "-" if value is None else f"{value:{self.digits}}"

    def said(self, plan: Plan) -> str:
        """The number with its unit."""
        return self.phrase.format(self.text(plan))

    def rank(self, plan: Plan) -> float:
        """Less for a better plan."""
        return -self.value(plan) if self.more_is_better else self.value(plan)

    def percent(self, plan: Plan, other: Plan) -> float:
        """By how much the other plan's number is above this one's."""
        return 100 * (self.value(other) / self.value(plan) - 1)


def _tokens_per_s(plan: Plan) -> float | None:
    return None if plan.predicted is None else plan.predicted.tokens_per_s


THROUGHPUT = Metric(
    title="Throughput",
    unit="tokens/s",
    phrase="{} tokens/s",
    digits=".1f",
    better="faster",
    best="fastest",
    more_is_better=True,
    of=_tokens_per_s,
)
COST = Metric(  # in the currency of the devices' prices
    title="Cost",
    unit="1 M tokens cost",
    phrase="a million tokens cost {}",
    digits=".4g",
    better="cheaper",
    best="cheapest",
    more_is_better=False,
    of=lambda plan: plan.cost_per_million_tokens,
)


def metrics(plan: Plan, found: planner.Explanation) -> tuple[Metric, ...]:
    """The one that plans are best in, which they are compared by; then the other, if devices have prices."""
    known = (THROUGHPUT,) if plan.cost_per_million_tokens is None else (THROUGHPUT, COST)
    return known if found.objective == "time" else known[::-1]
