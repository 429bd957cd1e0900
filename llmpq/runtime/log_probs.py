"""Log-probabilities of tokens: worked out on the last stage, sent back beside the tokens, read at the first.

They are those of the model, in float64, before any rule or temperature. A step's values are its tokens, then what is
told of prompts, sequence by sequence, then what is told of the tokens. Each token that is told of has 1 + 2k values:
the bits of its log-probability, the ids of the k likeliest tokens, and the bits of theirs. So both ends know from the
parameters and the step how many values there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.models.step import Step
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import LogProb

LEAST = -9999.0  # stands for the logarithm of 0, for which JSON has no number


def told(logits: torch.Tensor, tokens: Sequence[int], count: int) -> torch.Tensor:
    """int64 [rows * (1 + 2 * count)]: what is told of `tokens` [rows], given the logits [rows, vocab_size] of each.

    `count` is how many of the likeliest tokens are told beside each.
    """
    values = []
    for row, token in zip(logits, tokens, strict=True):
        row = row.cpu().double()
        log_probs = (row - row.logsumexp(0)).clamp(min=LEAST)
        best, ids = log_probs.topk(count)
        values += [log_probs[token].view(1).view(torch.int64), ids, best.view(torch.int64)]
    return torch.cat(values) if values else torch.empty(0, dtype=torch.int64)


def read(values: torch.Tensor, count: int) -> list[LogProb]:
    """What `told` tells."""
    rows = values.view(-1, 1 + 2 * count)
    numbers = rows.view(torch.float64)
    return [
        LogProb(log_prob, tuple(ids), tuple(best))
        for log_prob, ids, best in zip(
            numbers[:, 0].tolist(), rows[:, 1 : 1 + count].tolist(), numbers[:, 1 + count :].tolist(), strict=True
        )
    ]


def prompt_rows(params: SamplingParams, prompt_len: int, start: int, length: int) -> int:
    """After how many of a step's `length` tokens from position `start` a token of the prompt comes that is told of."""
    return 0 if params.prompt_logprobs is None else max(0, min(start + length, prompt_len - 1) - start)


class Asked:
    """The log-probabilities that a request asks for, as they come back to the first stage."""

    def __init__(self, params: SamplingParams, prompt_len: int) -> None:
        self._params, self._prompt_len = params, prompt_len
        self._prompt: dict[int, LogProb] = {}  # by position
        self._tokens: list[LogProb] = []

    @property
    def prompt(self) -> tuple[LogProb, ...] | None:
        """Of the prompt's tokens but the first; None if that is not asked for."""
        return None if self._params.prompt_logprobs is None else tuple(self._prompt.values())

    @property
    def tokens(self) -> tuple[LogProb, ...] | None:
        """Of the answer's tokens; None if that is not asked for."""
        return None if self._params.logprobs is None else tuple(self._tokens)

    def num_prompt(self, start: int, length: int) -> int:
        """Values of its prompt in a step."""
        rows = prompt_rows(self._params, self._prompt_len, start, length)
        return rows * (1 + 2 * (self._params.prompt_logprobs or 0))

    @property
    def num_token(self) -> int:
        """Values of its token in a step."""
        return 0 if self._params.logprobs is None else 1 + 2 * self._params.logprobs

    def take_prompt(self, values: torch.Tensor, start: int) -> None:
        """Those of a step whose first token is at `start`."""
        self._prompt |= enumerate(read(values, self._params.prompt_logprobs or 0), start)

    def take_token(self, values: torch.Tensor) -> None:
        """Those of a step's token."""
        self._tokens += read(values, self._params.logprobs or 0)


def num_values(step: Step, asked: Sequence[Asked | None], prefix: bool = False) -> int:
    """How many values come back of a step beside its tokens, given what each of its sequences asks for.

    Of a `prefix`, the first sequence, no token comes.
    """
    if not any(asked):
        return 0
    spans = zip(asked, step.starts.tolist(), step.query_lens.tolist(), strict=True)
    of_prompts = sum(each.num_prompt(start, length) for each, start, length in spans if each is not None)
    return of_prompts + sum(each.num_token for each in asked[prefix:] if each is not None)


def take(values: torch.Tensor, step: Step, asked: Sequence[Asked | None], prefix: bool = False) -> None:
    """Hand the `num_values` values that came back beside a step's tokens to those that asked for them."""
    if not any(asked):
        return
    spans = zip(asked, step.starts.tolist(), step.query_lens.tolist(), strict=True)
    for each, start, length in spans:
        if each is not None and (count := each.num_prompt(start, length)):
            each.take_prompt(values[:count], start)
            values = values[count:]
    for each in asked[prefix:]:
        if each is not None and each.num_token:
            each.take_token(values[: each.num_token])
            values = values[each.num_token :]
