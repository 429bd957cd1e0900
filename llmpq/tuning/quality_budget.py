"""Plans within a budget that users understand: how much perplexity may rise, or how far predictions may diverge.

Sensitivities are additive, and what they are measured in is not what is asked for; at 3 bits units disturb each other,
too. So the loss of some plans is measured on validation text, and what others lose is interpolated. Small disturbances
do add up: below the least that was measured, a loss is in proportion to the summed sensitivity. That gives the planner
its budget. The plan it finds is measured. If it may lose too much it becomes a point, too, and the planner is asked
again. What counts is the measured loss with its standard error, and KL: texts differ in what they lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmpq.spec import InfeasibleError, ModelSpec, Solved, UsageError

ASKED = 1.0, 0.8, 0.5  # of what is allowed, in each round: one that fails says that the map errs here
ROUNDS = len(ASKED)
MARGIN = 0.95  # of the limit, asked for at first, as the map does not go through every plan
SURE = 2.0  # standard errors that a measured loss stays below the limit: other text has an error of its own
_FAR = 100.0  # in logarithms


@dataclass(frozen=True)
class QualityBudget:
    """The most that a plan may lose, measured on text."""

    metric: Literal["perplexity", "kl"]
    limit: float  # of perplexity the relative increase, 0.01 for 1 %; of KL the mean, in nats

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise UsageError(f"the most that {self.metric} may rise is {self.limit}; give a number above 0")

    def check(self, spec: ModelSpec) -> None:
        """Raise UsageError for a model that is quantized itself: its loss cannot be measured against it."""
        if spec.source_hash:
            raise UsageError(
                f"{spec.name} is quantized, so what it loses cannot be measured against it; plan for the model that it "
                "was made from, or give --max-sensitivity"
            )

    @property
    def nats(self) -> float:
        """The limit of the loss: of the log of the ratio of perplexities, or of KL itself."""
        return math.log1p(self.limit) if self.metric == "perplexity" else self.limit

    def of(self, nats: float) -> float:
        """A loss in the metric's own unit."""
        return math.expm1(nats) if self.metric == "perplexity" else nats


@dataclass(frozen=True)
class Loss:
    """What a plan loses on a text, in nats: the mean over its tokens, with its standard error, and the mean KL.

    KL is what it would lose on text of the model's own, and hardly depends on which text is read. A plan that loses
    less than its KL on one text may lose it all on another.
    """

    mean: float
    error: float
    kl: float

    @property
    def at_most(self) -> float:
        return max(self.mean + SURE * self.error, self.kl)


class LossMap:
    """What a plan of some omega loses, by measured points (omega, loss); both in nats.

    Between points, logarithms are interpolated; a loss is no less than that of a point with less omega. Beyond them, it
    is in proportion to omega. Points without a loss say nothing; of none, sensitivities are losses.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        known = sorted((omega, loss) for omega, loss in points if omega > 0 and loss > 0) or [(1.0, 1.0)]
        x, y = np.log(np.array(known)).T
        y = np.maximum.accumulate(y)
        self._omegas = np.concatenate([[x[0] - _FAR], x, [x[-1] + _FAR]])
        self._losses = np.concatenate([[y[0] - _FAR], y, [y[-1] + _FAR]])

    def loss(self, omega: float) -> float:
        return math.exp(np.interp(math.log(omega), self._omegas, self._losses)) if omega > 0 else 0.0

    def omega(self, loss: float) -> float:
        return math.exp(np.interp(math.log(loss), self._losses, self._omegas))


@dataclass(frozen=True)
class Found:
    """A plan within the budget, and its loss in nats: as predicted, and as measured on validation text."""

    solved: Solved
    predicted: float
    measured: float
    rounds: int


def plan_within(
    budget: QualityBudget,
    points: Sequence[tuple[float, Loss]],
    solve: Callable[[float], Solved],
    measure: Callable[[Solved], Loss],
    least: Callable[[], float | None],
) -> Found:
    """The best plan that keeps to a budget as measured, with SURE, found in at most ROUNDS rounds.

    `points` are (omega, loss) of plans measured before, in order of omega. `solve` finds the best plan of at most some
    omega; it may raise InfeasibleError. `measure` returns the loss of a plan, `least` the least omega of a plan that
    fits, if one does. Raises InfeasibleError, saying what can be reached.
    """
    known, reached = list(points), math.inf
    for round_, share in enumerate(ASKED, 1):
        means = LossMap((omega, loss.mean) for omega, loss in known)
        kls = LossMap((omega, loss.kl) for omega, loss in known)
        wanted = MARGIN * budget.nats
        surely = min(wanted, _surely_within(budget.nats, [loss for _, loss in known]))
        allowed = min(means.omega(share * surely), kls.omega(share * wanted))
        try:
            solved = solve(allowed)
        except InfeasibleError as error:
            omega = least()
            if omega is None or omega <= allowed:
                raise  # quality is not why
            least_and_most = (means.loss(omega), share * surely), (kls.loss(omega), share * wanted)
            best, most = max(least_and_most, key=lambda pair: pair[0] / pair[1])
            raise InfeasibleError(
                f"no plan that fits keeps to {_in_words(budget, budget.nats)}: errors of measuring included, it may "
                f"have about {_in_words(budget, most)}, and the best has {_in_words(budget, best)}, as sensitivities "
                "say; allow more, or more memory",
                error.relaxations,
            ) from None
        loss = measure(solved)
        if loss.at_most <= budget.nats:
            return Found(solved, means.loss(solved.solution.omega), loss.mean, round_)
        known.append((solved.solution.omega, loss))
        reached = min(reached, loss.at_most)
    raise InfeasibleError(
        f"{ROUNDS} plans were measured, and none keeps to {_in_words(budget, budget.nats)}: the nearest has "
        f"{_in_words(budget, reached)}, errors of measuring included; allow more"
    )


def _surely_within(limit: float, losses: Iterable[Loss]) -> float:
    """The mean loss that is below a limit by SURE standard errors; these rise with the root of the mean."""
    known = [loss.error / math.sqrt(loss.mean) for loss in losses if loss.mean > 0]
    half = SURE * max(known, default=0.0) / 2
    return (math.sqrt(half * half + limit) - half) ** 2


def _in_words(budget: QualityBudget, nats: float) -> str:
    if budget.metric == "kl":
        return f"a mean KL of {nats:.3g}"
    return f"{100 * budget.of(nats):+.3g} % of perplexity"
