"""Perplexity of whatever a score function runs: the same pipeline that generates, so the served weights are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmpq.runtime.request import Scores
from llmpq.spec import Record, UsageError

ScoreFn = Callable[[list[list[int]]], list[Scores]]


@dataclass(frozen=True, slots=True)
class Perplexity(Record):
    """exp of the mean negative log-probability (nats) of `tokens` predicted tokens, in windows of `window` tokens.

    The standard error takes the tokens for independent of each other.
    """

    perplexity: float
    perplexity_error: float
    tokens: int
    window: int

    @classmethod
    def of(cls, log_probs: Sequence[float], window: int) -> Perplexity:
        """That of tokens with these log-probabilities."""
        loss, error = mean_and_error([-value for value in log_probs])
        return cls(math.exp(loss), math.exp(loss) * error, len(log_probs), window)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least one number, and its standard error: 0 for a single number."""
    mean = math.fsum(values) / len(values)
    return mean, float(np.std(values, ddof=min(1, len(values) - 1)) / math.sqrt(len(values)))


def cut(token_ids: Sequence[int], window: int) -> list[list[int]]:
    """Disjoint windows of a text's tokens; a last one of a single token is left out, as there is none to predict.

    Raises UsageError if no window is left.
    """
    if window < 2:
        raise UsageError(f"the window is {window} tokens; it takes at least 2 to predict one")
    windows = [list(token_ids[i : i + window]) for i in range(0, len(token_ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise UsageError("the text is a single token or none; perplexity needs at least two")
    return windows


def measure_perplexity(score: ScoreFn, token_ids: Sequence[int], window: int = 512) -> Perplexity:
    """The perplexity of a text of `token_ids`, cut into disjoint windows, whose first tokens are not predicted.

    `score` is `Engine.score`. Raises UsageError if nothing is left to predict.
    """
    scores = score(cut(token_ids, window))
    return Perplexity.of([value for scored in scores for value in scored.log_probs], window)
