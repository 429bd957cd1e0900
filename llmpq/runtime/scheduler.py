"""The first stage's part: turns prompts into micro-batches by the schedule, and collects the tokens that come back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmpq.models.step import Step
from llmpq.runtime.communication import Kind, Message
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.stage import StageRunner, begin
from llmpq.spec import Prediction, Record, Span, schedule
from llmpq.spec.schedule import Microbatch, Returned


@dataclass(frozen=True, slots=True)
class Generated(Record):
    """The continuation of one prompt, an end-of-sequence token that ended it included."""

    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": an end-of-sequence token; "length": the token limit, or the slot is full


@dataclass(frozen=True, slots=True)
class RunResult(Record):
    """What `generate` gives back.

    measured: prefill_s is from the first micro-batch's start until every sequence's first token is back at the first
    stage, decode_s from then to the end, both summed over waves; memory_bytes is each stage's peak above idle so far.
    spans: the steps of all stages in the order they started, as one clock of this host saw them; under torchrun, which
    may have more hosts, those of the first stage alone. A step starts when its message is there and the stage turns to
    it, and ends when its result has been sent. A link's span lasts from when sending starts until the message is there;
    messages that were sent before their receiver waited for them have none, as nobody knows when they arrived, but on
    an emulated link all have one.
    """

    sequences: tuple[Generated, ...]
    measured: Prediction
    spans: tuple[Span, ...] = ()


def _step(slots: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> Step:
    return Step.of(slots, [len(ids) for ids in tokens], starts, [token for ids in tokens for token in ids])


class _Sequence:
    """A prompt and what was generated of its continuation."""

    def __init__(self, prompt: Sequence[int], limit: int) -> None:
        self.prompt, self.limit = prompt, limit
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def append(self, token: int, eos_token_ids: Sequence[int]) -> None:
        self.tokens.append(token)
        if token in eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"

    @property
    def next_position(self) -> int:
        """Of the last token, which has no place in the cache yet."""
        return len(self.prompt) + len(self.tokens) - 1


class BatchRunner:
    """Runs batches through a pipeline whose first stage is this process's."""

    def __init__(self, runner: StageRunner, eos_token_ids: Sequence[int]) -> None:
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._plan = runner.plan

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_progress: Callable[[int], None]
    ) -> RunResult:
        """Continue prompts of 1 to max_length - 1 tokens. `on_progress` hears how many tokens there are so far.

        More prompts than the plan has slots run in waves, one after the other.
        """
        sequences = [_Sequence(p, min(params.max_tokens, self._plan.max_length - len(p))) for p in prompts]
        eos_token_ids = () if params.ignore_eos else self._eos_token_ids
        prefill_s = decode_s = 0.0
        generated = 0

        def on_tokens(count: int) -> None:
            nonlocal generated
            generated += count
            on_progress(generated)

        for first in range(0, len(sequences), self._plan.slots):
            wave = sequences[first : first + self._plan.slots]
            self._runner.handle(begin(params, first))
            times = self._run_wave(wave, eos_token_ids, on_tokens)
            prefill_s, decode_s = prefill_s + times[0], decode_s + times[1]
        return RunResult(
            tuple(Generated(tuple(s.tokens), s.finish_reason or "length") for s in sequences),
            Prediction(prefill_s, decode_s, generated / max(prefill_s + decode_s, 1e-9), self._end()),
        )

    def _run_wave(
        self, sequences: Sequence[_Sequence], eos_token_ids: Sequence[int], on_tokens: Callable[[int], None]
    ) -> tuple[float, float]:
        """Generate for sequences in slots 0, 1, ...; seconds of prefill and decode."""
        lengths = [len(s.prompt) for s in sequences]
        state, actions = schedule.start(self._plan.prefill_microbatches(lengths), self._plan.decode_microbatch)
        to_start, in_flight = deque(actions), deque[tuple[Microbatch, Step]]()
        started = time.perf_counter()
        prefilled, decoded = started, False
        while not state.done:
            if to_start:
                microbatch = to_start.popleft()
                in_flight.append((microbatch, self._start(microbatch, sequences)))
                continue
            microbatch, step = in_flight.popleft()
            decoded = decoded or microbatch.phase == "decode"
            tokens = self._runner.receive_tokens(step).tolist()
            for i, token in zip(microbatch.sequences, tokens, strict=True):
                sequences[i].append(token, eos_token_ids)
            ended = frozenset(i for i in microbatch.sequences if sequences[i].finish_reason)
            if state.in_prefill:
                prefilled = time.perf_counter()
            state, actions = schedule.advance(state, Returned(microbatch, ended))
            to_start.extend(actions)
            on_tokens(len(tokens))
        return prefilled - started, (time.perf_counter() if decoded else prefilled) - prefilled

    def _start(self, microbatch: Microbatch, sequences: Sequence[_Sequence]) -> Step:
        chosen = [sequences[i] for i in microbatch.sequences]
        if microbatch.phase == "prefill":
            step = _step(microbatch.sequences, [0] * len(chosen), [s.prompt for s in chosen])
        else:
            step = _step(microbatch.sequences, [s.next_position for s in chosen], [s.tokens[-1:] for s in chosen])
        self._launch(Kind.GENERATE, step)
        return step

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Sum of the log-probabilities of each sequence's tokens but the first; at most max_length tokens each."""
        plan = self._plan
        sums: list[float] = []
        in_flight = 0
        for packed in plan.prefill_microbatches([len(ids) for ids in sequences]):
            # A slot may be written anew at once: messages keep their order, so it was read before.
            self._launch(Kind.SCORE, _step(range(len(packed)), [0] * len(packed), [sequences[i] for i in packed]))
            in_flight += 1
            if in_flight > len(plan.stages):
                sums += self._runner.receive_tokens().view(torch.float64).tolist()
                in_flight -= 1
        for _ in range(in_flight):
            sums += self._runner.receive_tokens().view(torch.float64).tolist()
        self._end()
        return sums

    def _launch(self, kind: Kind, step: Step) -> None:
        self._runner.links.expect(step.num_sequences)
        self._runner.handle(Message(kind, step))

    def _end(self) -> tuple[int, ...]:
        """End the batch; each stage's peak memory above idle, in bytes."""
        self._runner.links.expect(len(self._plan.stages))
        self._runner.handle(Message(Kind.END))
        peaks = tuple(self._runner.receive_tokens().tolist())
        self._runner.links.flush()
        return peaks
