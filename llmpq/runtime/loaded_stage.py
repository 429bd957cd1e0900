"""A stage's weights at work: hidden states for the next stage; on the last one, tokens or log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.step import Step
from llmpq.runtime.message import StepMessage
from llmpq.runtime.sampling import SamplingParams, next_tokens
from llmpq.runtime.stage import Turn
from llmpq.spec import ModelSpec
from llmpq.temporary import writing_there

_SCORE_BYTES = 8 * 2**20  # of logits at once
_SCORE_ROWS = 64


class LoadedStage:
    """A StageModel: a DecoderStage with the sampling parameters of the requests in its slots."""

    def __init__(self, stage: DecoderStage, spec: ModelSpec, logits: Path | None = None) -> None:
        """The last stage adds the logits of tokens that it scores to the file `logits`: float32 [t, vocab_size]."""
        self._stage, self._spec, self._logits = stage, spec, logits
        self._sampling: dict[int, SamplingParams] = {}  # by slot

    def admit(self, sampling: str) -> None:
        for slot, params in json.loads(sampling):
            self._sampling[slot] = SamplingParams.from_dict(params)

    def compute(self, message: StepMessage, turn: Turn) -> torch.Tensor:
        step, received = message.step, message.hidden_states
        if self._stage.head is None:
            return self._stage(step, received)
        if message.scored:
            return self._scores(step, self._stage(step, received))
        if message.prefix:
            self._stage(step, received)
            return torch.empty(0, dtype=torch.int64)
        likeliest, logits = self._stage.next_tokens(step, received)
        sampling = [self._sampling[slot] for slot in step.slots.tolist()]
        return next_tokens(likeliest, logits, sampling, step.context_lens)

    def warm_up(self) -> None:
        """Compute a small step of both phases, so that the first real one takes no longer than the others."""
        for tokens in (max(1, min(16, self._stage.kv_cache.longest_step - 1)), 1):
            hidden_states = None
            if self._stage.embedding is None:
                hidden_states = torch.zeros(tokens, self._spec.hidden_size, dtype=self._stage.dtype)
            step = Step.of([0], [tokens], [0], [0] * tokens)
            if self._stage.head is None:
                self._stage(step, hidden_states)
            else:
                self._stage.next_tokens(step, hidden_states)

    def _scores(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 [2 * (t - s)], as StageModel.compute says."""
        rows = max(1, min(_SCORE_ROWS, _SCORE_BYTES // (4 * self._spec.vocab_size)))
        log_probs: list[float] = []
        likeliest: list[int] = []
        for end, length in zip((step.last_rows + 1).tolist(), step.query_lens.tolist(), strict=True):
            for start in range(end - length, end - 1, rows):
                stop = min(start + rows, end - 1)
                logits = self._stage.logits(hidden_states[start:stop])
                self._keep(logits)
                likeliest += logits.argmax(-1).tolist()
                for row, target in zip(logits, step.tokens[start + 1 : stop + 1].tolist(), strict=True):
                    row = row.double()
                    log_probs.append(float(row[target] - row.logsumexp(0)))
        bits = torch.tensor(log_probs, dtype=torch.float64).view(torch.int64)
        return torch.cat((bits, torch.tensor(likeliest, dtype=torch.int64)))

    def _keep(self, logits: torch.Tensor) -> None:
        if self._logits is not None:
            with writing_there(), self._logits.open("ab") as file:
                logits.cpu().numpy().tofile(file)
