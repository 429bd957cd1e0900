"""How long requests take all together, in a run or a simulation of one: by phase."""

from __future__ import annotations

from collections.abc import Sequence

from llmpq.spec.costs import LEAST_S
from llmpq.spec.result import Prediction
from llmpq.spec.schedule_state import State


class Phases:
    """Adds up the seconds of both phases; RunResult says what they are."""

    def __init__(self, now: float) -> None:
        self.prefill_s = self.decode_s = 0.0
        self._until = now

    def pass_to(self, now: float, state: State) -> None:
        """Until now the schedule was in this state."""
        if state.in_prefill:
            self.prefill_s += now - self._until
        elif not state.done:
            self.decode_s += now - self._until
        self._until = now

    def prediction(self, tokens: int, memory_bytes: Sequence[int]) -> Prediction:
        """With the tokens generated, and the memory of each stage."""
        rate = tokens / max(self.prefill_s + self.decode_s, LEAST_S)
        return Prediction(self.prefill_s, self.decode_s, rate, tuple(memory_bytes))
