"""Requests and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmpq.runtime.sampling import SEEDS, SamplingParams
from llmpq.spec import Prediction, Record, Span, UsageError


@dataclass(frozen=True, slots=True)
class Request(Record):
    """A prompt and how it is continued. Its result depends on nothing else: on no other request, and on no plan."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Generated(Record):
    """The continuation of one prompt, an end-of-sequence token that ended it included."""

    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": an end-of-sequence token; "length": the token limit, or the slot is full


@dataclass(frozen=True, slots=True)
class RunResult(Record):
    """What `Engine.generate` returns.

    measured: prefill_s is from the first micro-batch's start until every request's first token is back at the first
    stage, decode_s from then to the end, both summed over waves; memory_bytes is each stage's peak above idle so far.
    spans: the steps of all stages in the order they started, by the clock of this host; under torchrun, which may have
    more hosts, those of the first stage alone. A step starts when its message is there and the stage turns to it, and
    ends when its result has been sent. A link's span lasts from when sending starts until the message is there.
    Messages that were sent before their receiver waited for them have none, as their arrival is unknown, but on an
    emulated link all have one.
    """

    sequences: tuple[Generated, ...]
    measured: Prediction
    spans: tuple[Span, ...] = ()


def make_requests(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """A request for each prompt, with the sampling parameters of all, or each with its own.

    Where all share them, prompt i (from 0) has the seed `sampling.seed` + i, so that equal prompts differ.
    """
    if isinstance(sampling, SamplingParams):
        sampling = [replace(sampling, seed=(sampling.seed + i) % SEEDS) for i in range(len(prompts))]
    elif len(sampling) != len(prompts):
        raise UsageError(f"there are {len(prompts)} prompts, but sampling parameters for {len(sampling)}")
    return [Request(tuple(prompt), params) for prompt, params in zip(prompts, sampling, strict=True)]


def check_prompts(prompts: Sequence[Sequence[int]], room: int, place: str, output_len: int = 1) -> None:
    """Raise UsageError for an empty prompt, or one that leaves no room for `output_len` more tokens in `room` tokens.

    `place` is what has that room, for the message: "the plan's slots".
    """
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UsageError(f"prompt {i} is empty")
        if len(prompt) + output_len > room:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for {output_len} more in {place} of {room} "
                "tokens; shorten it, or give it more room"
            )
