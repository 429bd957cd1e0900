"""A stage's weights at work: hidden states for the next stage; on the last one, tokens or log-probabilities."""

from __future__ import annotations

import json

import torch

from llmpq.models.decoder import DecoderStage
from llmpq.models.step import Step
from llmpq.runtime.message import StepMessage
from llmpq.runtime.sampling import SamplingParams, sample, uniform
from llmpq.runtime.stage import Turn
from llmpq.spec import ModelSpec

_SCORE_BYTES = 8 * 2**20  # of logits at once
_SCORE_ROWS = 64


class LoadedStage:
    """A StageModel: a DecoderStage with the sampling parameters of the requests in its slots."""

    def __init__(self, stage: DecoderStage, spec: ModelSpec) -> None:
        self._stage, self._spec = stage, spec
        self._sampling: dict[int, SamplingParams] = {}  # by slot

    def admit(self, sampling: str) -> None:
        for slot, params in json.loads(sampling):
            self._sampling[slot] = SamplingParams.from_dict(params)

    def compute(self, message: StepMessage, turn: Turn) -> torch.Tensor:
        step, received = message.step, message.hidden_states
        result = self._stage(step, received)
        if self._stage.head is not None:
            return self._log_probabilities(step, result) if message.scored else self._next_tokens(step, result)
        if received is not None and result.data_ptr() == received.data_ptr():
            # What a stage without layers received; NCCL would still be sending it while the next message arrives there.
            return result.clone()
        return result

    def warm_up(self, max_length: int) -> None:
        """Compute a small step of both phases, so that the first real one takes no longer than the others."""
        for tokens in (max(1, min(16, max_length - 1)), 1):
            hidden_states = None
            if self._stage.embedding is None:
                hidden_states = torch.zeros(tokens, self._spec.hidden_size, dtype=self._stage.dtype)
            hidden_states = self._stage(Step.of([0], [tokens], [0], [0] * tokens), hidden_states)
            if self._stage.head is not None:
                self._stage.logits(hidden_states[-1:])

    def _next_tokens(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 [s]: the next token of each sequence."""
        logits = self._stage.logits(hidden_states[step.last_rows.to(hidden_states.device)]).cpu()
        chosen = (self._sampling[slot] for slot in step.slots.tolist())
        positions = step.context_lens.tolist()
        tokens = [
            sample(row, params, 0.0 if params.seed is None else uniform(params.seed, position))
            for row, params, position in zip(logits, chosen, positions, strict=True)
        ]
        return torch.tensor(tokens, dtype=torch.int64)

    def _log_probabilities(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """float64 [s], seen as int64: sum of the log-probabilities of each sequence's tokens but its first."""
        sums = torch.zeros(step.num_sequences, dtype=torch.float64)
        first = 0
        for i, length in enumerate(step.query_lens.tolist()):
            sums[i] = self._log_probability(step.tokens[first : first + length], hidden_states[first : first + length])
            first += length
        return sums.view(torch.int64)

    def _log_probability(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> float:
        rows = max(1, min(_SCORE_ROWS, _SCORE_BYTES // (4 * self._spec.vocab_size)))
        total = 0.0
        for start in range(0, len(tokens) - 1, rows):
            targets = tokens[start + 1 : start + 1 + rows]
            logits = self._stage.logits(hidden_states[start : start + len(targets)])
            for row, target in zip(logits, targets.tolist(), strict=True):
                row = row.double()
                total += float(row[target] - row.logsumexp(0))
        return total
