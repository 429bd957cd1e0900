"""Perplexity of whatever a score function runs: the same pipeline that generates, so the served weights are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmpq.measure.text import evenly
from llmpq.runtime.request import Scores
from llmpq.spec import Record, UsageError

WINDOW = 512  # tokens of a text that are read at a time

ScoreFn = Callable[[list[list[int]]], list[Scores]]


@dataclass(frozen=True, slots=True)
class Perplexity(Record):
    """exp of the mean negative log-probability (nats) of `tokens` predicted tokens, in windows of `window` tokens.

    The standard error is by how much windows differ.
    """

    perplexity: float
    perplexity_error: float
    tokens: int
    window: int

    @classmethod
    def of(cls, windows: Sequence[Sequence[float]], window: int) -> Perplexity:
        """That of tokens with these log-probabilities, by window."""
        loss, error = mean_and_error(windows)
        return cls(math.exp(-loss), math.exp(-loss) * error, sum(map(len, windows)), window)


def mean_and_error(windows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over all numbers of all windows, and its standard error.

    What stands near in a text is alike, and an error that takes tokens for independent is less than half of the true
    one. So windows are; of a single one, tokens have to be. A single number has no error.
    """
    if len(windows) == 1:
        windows = [[value] for value in windows[0]]
    count, blocks = sum(map(len, windows)), len(windows)
    mean = math.fsum(map(math.fsum, windows)) / count
    squares = math.fsum((math.fsum(window) - mean * len(window)) ** 2 for window in windows)
    return mean, math.sqrt(squares * blocks / max(1, blocks - 1)) / count


def windows_of(token_ids: Sequence[int], window: int, max_tokens: int | None = None) -> list[list[int]]:
    """Disjoint windows of a text's tokens; with `max_tokens` at most so many, from all over the text.

    A last one of a single token is left out, as there is none to predict. Raises UsageError if no window is left.
    """
    window = min(window, max_tokens or window)
    if window < 2:
        raise UsageError(f"the window is {window} tokens; it takes at least 2 to predict one")
    windows = [list(token_ids[i : i + window]) for i in range(0, len(token_ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise UsageError("the text is a single token or none; perplexity needs at least two")
    return windows if max_tokens is None else evenly(windows, max_tokens // window)


def measure_perplexity(score: ScoreFn, windows: list[list[int]]) -> Perplexity:
    """The perplexity of windows of a text, whose first tokens are not predicted. `score` is `Engine.score`."""
    scores = score(windows)
    return Perplexity.of([scored.log_probs for scored in scores], max(map(len, windows)))
