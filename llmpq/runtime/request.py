"""Requests and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmpq.runtime.sampling import SamplingParams, each_sampling
from llmpq.spec import Latency, LogProb, Prediction, Record, RequestTimes, Span, UsageError
from llmpq.spec.ranges import shown


@dataclass(frozen=True, slots=True)
class Request(Record):
    """A prompt and how it is continued. Its result depends on nothing else: on no other request, and on no plan."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    answered: tuple[int, ...] = ()  # tokens of the answer that others have generated; it goes on behind them


@dataclass(frozen=True, slots=True)
class Generated(Record):
    """The continuation of one prompt, the token that ended it included."""

    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": a token that ends it; "length": the token limit or a full slot; or "cancelled"
    seed: int | None = None  # what it was sampled with; None if it is greedy
    log_probs: tuple[LogProb, ...] | None = None  # of each token, if that is asked for
    prompt_log_probs: tuple[LogProb, ...] | None = None  # of the prompt's tokens but the first


class Scores(NamedTuple):
    """What a model thinks of the tokens 1, 2, ... of a sequence, each after those before it."""

    log_probs: list[float]  # natural logarithms
    likeliest: list[int]  # the token with the largest logit in each place, the first of equals


@dataclass(frozen=True, slots=True)
class RunResult(Record):
    """What `Engine.generate` returns.

    measured: prefill_s is the time in which an admitted request was without its first token, as the first stage has it;
    decode_s is the rest of the time in which there was a request. If all have a slot from the start, the first token of
    the last one is what parts them. If some are admitted as others end, prefill_s has what was decoded beside their
    prefill. memory_bytes is each stage's peak above idle so far. After a loss (see Engine), it is of the workers that
    ended the run, and so are the spans.
    spans: the steps of all stages in the order they started, by the clock of this host; of each stage and of each link
    the first SPANS_KEPT. Under torchrun, which may have more hosts, those of the first stage alone. A step starts when
    its message is there and the stage turns to it, and ends when its result has been sent. A link's span lasts from
    when sending starts until the message is there. Messages that were sent before their receiver waited for them have
    none, as their arrival is unknown, but on an emulated link all have one.
    times: of each request, in the order of `sequences`.
    """

    sequences: tuple[Generated, ...]
    measured: Prediction
    spans: tuple[Span, ...] = ()
    times: tuple[RequestTimes, ...] = ()

    @property
    def latency(self) -> Latency:
        """Throughput of the requests as a queue, and percentiles of TTFT and TPOT."""
        return Latency.of(self.times)


class Ends:
    """Where the continuation of a request ends, whatever else may end it."""

    def __init__(self, request: Request, longest: int, eos_token_ids: Sequence[int]) -> None:
        """`longest`: the tokens that a slot has room for."""
        self.limit = min(request.sampling.max_tokens, longest - len(request.prompt))
        self._tokens = request.sampling.ending(eos_token_ids)

    def reason(self, token_ids: Sequence[int]) -> str | None:
        """Why a continuation has ended, if it has; see Generated."""
        if token_ids and token_ids[-1] in self._tokens:
            return "stop"
        return "length" if len(token_ids) >= self.limit else None


def make_requests(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """A request for each prompt, with the sampling parameters of all, or each with its own; see `each_sampling`."""
    each = each_sampling(sampling, len(prompts))
    return [Request(tuple(prompt), params) for prompt, params in zip(prompts, each, strict=True)]


def prompt_problem(
    prompt: Sequence[int], vocab_size: int, room: int, place: str, output_len: int = 1, longest: int | None = None
) -> str | None:
    """Why a prompt cannot be run, if it cannot: it is empty, or has ids beyond the model's table of `vocab_size`, or
    leaves no room for `output_len` more tokens in `room` tokens, or has more than the `longest` that there is room for.

    `place` is what has that room, for the message: "the plan's slots".
    """
    if not prompt:
        return "is empty"
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = max(prompt) if min(prompt) >= 0 else min(prompt)
        return (
            f"has the token {shown(wrong)}, and the model's table has {vocab_size}, from 0; the tokenizer is not this "
            "model's"
        )
    if len(prompt) + output_len > room:
        return (
            f"has {len(prompt)} tokens, which leaves no room for {output_len} more in {place} of {room} tokens; "
            "shorten it, or give it more room"
        )
    if longest is not None and len(prompt) > longest:
        return (
            f"has {len(prompt)} tokens, but layers that attend within a window have room for {longest} at once in this "
            "plan; make one for longer prompts"
        )
    return None


def check_prompts(
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    room: int,
    place: str,
    output_len: int = 1,
    longest: int | None = None,
) -> None:
    """Raise UsageError if one of the prompts has a `prompt_problem`, which it names by its number."""
    for i, prompt in enumerate(prompts, 1):
        problem = prompt_problem(prompt, vocab_size, room, place, output_len, longest)
        if problem is not None:
            raise UsageError(f"prompt {i} {problem}")
