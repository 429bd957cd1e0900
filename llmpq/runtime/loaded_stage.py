"""A stage's weights at work: hidden states for the next stage; on the last one, tokens or log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llmpq import kernels
from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.step import Step
from llmpq.runtime import log_probs
from llmpq.runtime.answer_grammar import GrammarHost
from llmpq.runtime.message import StepMessage, Values
from llmpq.runtime.sampler import Admitted, Sampler, draw, next_tokens, with_ending
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.stage import Turn
from llmpq.runtime.unread import LatestTokens, Unread
from llmpq.spec import ModelSpec
from llmpq.temporary import writing_there

_SCORE_BYTES = 8 * 2**20  # of logits at once
_SCORE_ROWS = 64


class LoadedStage:
    """A StageModel: a DecoderStage, and what chooses the tokens of the requests in its slots."""

    def __init__(
        self, stage: DecoderStage, spec: ModelSpec, logits: Path | None = None, latest: LatestTokens | None = None
    ) -> None:
        """The last stage adds the logits of tokens that it scores to the file `logits`: float32 [t, vocab_size].

        With `latest`, one that is alone returns the tokens that its device chooses unread.
        """
        self._stage, self._spec, self._logits, self._latest = stage, spec, logits, latest
        self._grammars: GrammarHost | None = None  # once the vocabulary has been told
        self._samplers: dict[int, Sampler | None] = {}  # by slot; None: the likeliest tokens are taken
        self._draws = kernels.draws(stage.device, stage.dtype)

    def admit(self, requests: str) -> None:
        told = json.loads(requests)
        if told["vocabulary"] is not None:
            self._grammars = GrammarHost(told["vocabulary"])
        for request in map(Admitted.from_dict, told["requests"]):
            sampler = Sampler(request, self._spec.eos_token_ids, self._grammars)
            self._samplers[request.slot] = sampler if sampler.is_needed else None

    def compute(self, message: StepMessage, turn: Turn) -> Values:
        step, received = message.step, message.hidden_states
        if self._stage.head is None:
            return self._stage(step, received)
        if message.scored:
            return self._scores(step, self._stage(step, received))
        samplers = [self._samplers[slot] for slot in step.slots.tolist()]
        told: list[torch.Tensor] = []
        if any(counts := self._prompt_rows(step, samplers)):
            hidden_states = self._stage(step, received)
            told = self._of_prompts(step, hidden_states, samplers, counts)
            if message.num_returned == 0:
                return torch.cat(told)
            logits = self._stage.logits(hidden_states[step.last_rows])
            likeliest = logits.argmax(-1)
        elif message.num_returned == 0:
            self._stage(step, received)
            return torch.empty(0, dtype=torch.int64)
        else:
            given = self._latest.of(step) if message.latest and self._latest is not None else None
            likeliest, logits = self._stage.next_tokens(step, received, tokens=given)
        if message.prefix:
            samplers[0] = None  # of the token that comes of it nobody is told
        left = draw(likeliest, logits, samplers, step.context_lens) if self._draws else samplers
        if self._latest is not None and not any(left):
            self._latest.keep(step, likeliest)
            return Unread(likeliest[message.prefix :])
        tokens = next_tokens(likeliest, logits, left, step.context_lens)
        if self._latest is not None:
            self._latest.keep(step, tokens)
        if not any(samplers):
            return tokens[message.prefix :]
        for row, (sampler, token) in enumerate(zip(samplers, tokens.tolist(), strict=True)):
            if sampler is None:
                continue
            if (count := sampler.params.logprobs) is not None:
                told.append(log_probs.told(logits[row : row + 1], [token], count))
            tokens[row] = with_ending(token, sampler.ended)
        return torch.cat((tokens[message.prefix :], *told))

    def _prompt_rows(self, step: Step, samplers: Sequence[Sampler | None]) -> list[int]:
        """After how many of each sequence's tokens in a step one of its prompt comes that is told of."""
        if not any(samplers):
            return []
        return [
            0 if sampler is None else log_probs.prompt_rows(sampler.params, len(sampler.prompt), start, length)
            for sampler, start, length in zip(samplers, step.starts.tolist(), step.query_lens.tolist(), strict=True)
        ]

    def _of_prompts(
        self, step: Step, hidden_states: torch.Tensor, samplers: Sequence[Sampler | None], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """What is told of the prompts of a step, given `_prompt_rows`."""
        told = []
        ends = (step.last_rows + 1).tolist()
        for sampler, start, end, length, count in zip(
            samplers, step.starts.tolist(), ends, step.query_lens.tolist(), counts, strict=True
        ):
            if sampler is None:
                continue
            targets, row = sampler.prompt[start + 1 :], end - length
            for i, logits in self._logits_of(hidden_states[row : row + count]):
                chosen = targets[i : i + len(logits)]
                told.append(log_probs.told(logits, chosen, sampler.params.prompt_logprobs or 0))
        return told

    def _logits_of(self, hidden_states: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The logits of rows of hidden states, some rows at a time, each with the number of its first row."""
        rows = max(1, min(_SCORE_ROWS, _SCORE_BYTES // (4 * self._spec.vocab_size)))
        for start in range(0, len(hidden_states), rows):
            yield start, self._stage.logits(hidden_states[start : start + rows])

    def warm_up(self) -> None:
        """Compute a small step of both phases, so that the first real one takes no longer than the others."""
        for tokens in (max(1, min(16, self._stage.kv_cache.longest_step - 1)), 1):
            hidden_states = None
            if self._stage.embedding is None:
                hidden_states = torch.zeros(tokens, self._spec.hidden_size, dtype=self._stage.dtype)
            step = Step.of([0], [tokens], [0], [0] * tokens)
            if self._stage.head is None:
                self._stage(step, hidden_states)
                continue
            likeliest, logits = self._stage.next_tokens(step, hidden_states)
            if self._draws:
                drawn = Sampler(Admitted(0, SamplingParams(temperature=1.0, seed=0)))
                draw(likeliest, logits, [drawn], step.context_lens)

    def _scores(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 [2 * (t - s)], as StageModel.compute says."""
        found: list[float] = []
        likeliest: list[int] = []
        for end, length in zip((step.last_rows + 1).tolist(), step.query_lens.tolist(), strict=True):
            targets = step.tokens[end - length + 1 : end].tolist()
            for i, logits in self._logits_of(hidden_states[end - length : end - 1]):
                self._keep(logits)
                likeliest += logits.argmax(-1).tolist()
                for row, target in zip(logits, targets[i : i + len(logits)], strict=True):
                    row = row.double()
                    found.append(float(row[target] - row.logsumexp(0)))
        bits = torch.tensor(found, dtype=torch.float64).view(torch.int64)
        return torch.cat((bits, torch.tensor(likeliest, dtype=torch.int64)))

    def _keep(self, logits: torch.Tensor) -> None:
        if self._logits is not None:
            with writing_there(), self._logits.open("ab") as file:
                logits.cpu().numpy().tofile(file)
