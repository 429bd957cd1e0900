"""Perplexity of whatever a score function runs: the same pipeline that generates, so the served weights are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmpq.spec import Record, UsageError

ScoreFn = Callable[[list[list[int]]], list[float]]


@dataclass(frozen=True, slots=True)
class Perplexity(Record):
    """exp of the mean negative log-probability (nats) of `tokens` predicted tokens, in windows of `window` tokens."""

    perplexity: float
    tokens: int
    window: int


def measure_perplexity(score: ScoreFn, token_ids: Sequence[int], window: int = 512) -> Perplexity:
    """The perplexity of a text of `token_ids`, cut into disjoint windows.

    `score` takes sequences and returns for each the sum of the log-probabilities of its tokens 1, 2, ... given those
    before them (`Engine.score`). The first token of a window is not predicted; a last window of one token is left
    out. Raises UsageError if nothing is left to predict.
    """
    if window < 2:
        raise UsageError(f"the window is {window} tokens; it takes at least 2 to predict one")
    windows = [list(token_ids[i : i + window]) for i in range(0, len(token_ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise UsageError("the text is a single token or none; perplexity needs at least two")
    tokens = sum(len(w) - 1 for w in windows)
    return Perplexity(math.exp(-math.fsum(score(windows)) / tokens), tokens, window)
