"""A request at the first stage: what it has so far, and what of it goes into the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llmpq.runtime.grammar import Ending
from llmpq.runtime.log_probs import Asked
from llmpq.runtime.request import Ends, Generated, Request
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import RequestTimes
from llmpq.spec.block_pool import block_names
from llmpq.spec.schedule_state import Prompt


def reused_names(prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
    """Names of a prompt's blocks. None where its log-probabilities are asked for: all of such a prompt is computed."""
    return block_names(prompt) if sampling.prompt_logprobs is None else ()


class Running:
    """A request with its continuation so far. Times are those of `time.monotonic`.

    If it is `streamed`, each of its tokens is told as it comes.
    """

    def __init__(
        self, request: Request, max_length: int, eos_token_ids: Sequence[int], arrived_s: float, streamed: bool
    ) -> None:
        self.prompt, self.sampling = request.prompt, request.sampling
        self.arrived_s, self.streamed = arrived_s, streamed
        self.first_token_s: float | None = None
        self.slot = 0
        self.reused = 0  # tokens of the prompt that others computed
        self.tokens = [*request.answered]
        self.unread = False  # whether there is one more, on the device
        self.finish_reason: str | None = None  # of one that has ended by itself
        sampling = request.sampling
        self.log_probs = Asked(sampling, len(request.prompt)) if sampling.asks_log_probs else None
        self._ends = Ends(request, max_length, eos_token_ids)
        self._table: tuple[int, ...] = ()
        self._blocks = np.empty(0, dtype=np.int32)

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self._ends.limit - len(self.tokens)

    def append(self, token: int, ended: Ending | None, now: float) -> None:
        self.unread = False
        if self.first_token_s is None:
            self.first_token_s = now
        self.tokens.append(token)
        self.finish_reason = ended or self._ends.reason(self.tokens)

    def blocks(self, table: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """Its table of the schedule as an array, int32 [blocks]. Few steps bring another one, so it is kept."""
        if table is not self._table:
            self._table, self._blocks = table, np.array(table, dtype=np.int32)
        return self._blocks

    def generated(self) -> Generated:
        """Its result, now that it has ended."""
        generated = Generated(tuple(self.tokens), self.finish_reason or "cancelled", self.sampling.seed)
        asked = self.log_probs
        return generated if asked is None else replace(generated, log_probs=asked.tokens, prompt_log_probs=asked.prompt)

    def times(self, began_s: float, now: float) -> RequestTimes:
        """Its times in a run that began then, now that it has ended."""
        first_s = None if self.first_token_s is None else self.first_token_s - began_s
        return RequestTimes(self.arrived_s - began_s, first_s, now - began_s, len(self.tokens), self.reused)

    def as_prompt(self, number: int) -> Prompt:
        """What the schedule is told."""
        return Prompt(number, len(self.all_tokens), names=reused_names(self.prompt, self.sampling))

    @property
    def all_tokens(self) -> Sequence[int]:
        """The prompt, and the answer so far: what is computed when it gets blocks, also once more."""
        return (*self.prompt, *self.tokens)

    @property
    def next_position(self) -> int:
        """Of the last token, which has no place in the cache yet."""
        return len(self.prompt) + len(self.tokens) + self.unread - 1
