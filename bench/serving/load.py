"""What is asked of a server, and when: passages of real text of many lengths, each continued by a length of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmpq.checkpoint.tokenizer import Tokenizer

PROMPT_TOKENS = (32, 384)  # from, to; as many lengths between n and 2n as between 2n and 4n
OUTPUT_TOKENS = (16, 96)
LEAST = 20  # requests of a trial: of fewer, nobody is the slowest in twenty


@dataclass(frozen=True)
class Asked:
    """One request: a text of `prompt_len` tokens, and how many are to follow it, past any end of text."""

    prompt: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Load:
    """Requests and the seconds at which they come, the first at 0."""

    requests: Sequence[Asked]
    arrivals_s: Sequence[float]

    @property
    def prompt_lens(self) -> list[int]:
        return [one.prompt_len for one in self.requests]

    @property
    def output_lens(self) -> list[int]:
        return [one.output_len for one in self.requests]


class Loads:
    """Makes loads of a text, of at least so many requests that come at random.

    A seed stands for the same requests in the same order, however fast they come.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, least: int = LEAST) -> None:
        self._tokenizer, self._tokens, self._least = tokenizer, tokenizer.encode(text), least

    def poisson(self, rate: float, seconds: float, seed: Sequence[int]) -> Load:
        """As many requests as come in these seconds on average, with exponential times between them."""
        requests = self._requests(max(self._least, round(rate * seconds)), seed)
        gaps = np.random.default_rng([*seed, 1]).exponential(1.0, len(requests))
        gaps[0] = 0.0
        return Load(requests, (gaps.cumsum() / rate).tolist())

    def at_once(self, count: int, seed: Sequence[int]) -> Load:
        return Load(self._requests(count, seed), [0.0] * count)

    def _requests(self, count: int, seed: Sequence[int]) -> list[Asked]:
        generator = np.random.default_rng([*seed, 0])
        lengths = generator.random((count, 3))
        return [self._asked(*row) for row in lengths.tolist()]

    def _asked(self, place: float, prompt: float, output: float) -> Asked:
        """Of three numbers from 0 to 1."""
        length = _between(PROMPT_TOKENS, prompt)
        start = int(place * (len(self._tokens) - length))
        text = self._tokenizer.decode(self._tokens[start : start + length])
        return Asked(text, len(self._tokenizer.encode(text)), _between(OUTPUT_TOKENS, output))


def _between(ends: tuple[int, int], share: float) -> int:
    first, last = ends
    return round(first * float((last / first) ** share))
