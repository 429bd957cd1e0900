"""The first stage's part: turns requests into micro-batches by the schedule, and collects the tokens that come back."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from llmpq.models.step import Step
from llmpq.runtime.message import Admission, Close, Finish, StepMessage
from llmpq.runtime.request import Generated, Request, Scores
from llmpq.runtime.stage import StageRunner
from llmpq.spec import Prediction, schedule
from llmpq.spec.schedule import Admit, Microbatch, Returned


class _Sequence:
    """A request with its continuation so far."""

    def __init__(self, request: Request, max_length: int, eos_token_ids: Sequence[int]) -> None:
        self.prompt, self.sampling = request.prompt, request.sampling
        self.slot = 0
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._limit = min(request.sampling.max_tokens, max_length - len(request.prompt))
        self._eos_token_ids = () if request.sampling.ignore_eos else tuple(eos_token_ids)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._limit:
            self.finish_reason = "length"

    def stop(self) -> None:
        self.finish_reason = self.finish_reason or "cancelled"

    def generated(self) -> Generated:
        return Generated(tuple(self.tokens), self.finish_reason or "length", self.sampling.seed)

    @property
    def next_position(self) -> int:
        """Of the last token, which has no place in the cache yet."""
        return len(self.prompt) + len(self.tokens) - 1


class Scheduler:
    """Runs requests through a pipeline whose first stage is this process's."""

    def __init__(self, runner: StageRunner, eos_token_ids: Sequence[int]) -> None:
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._plan = runner.plan

    def generate(
        self,
        requests: Sequence[Request],
        on_tokens: Callable[[Sequence[int], Sequence[int]], None],
        on_end: Callable[[int, Generated], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Prediction:
        """Continue prompts of 1 to max_length - 1 tokens; what was measured, as in RunResult.

        `on_tokens` is called after each step with its requests (their numbers from 0) and the new token of each,
        `on_end` with each request and its continuation as soon as that has ended. Once `stopped`, each ends with its
        next token.
        """
        sequences = [_Sequence(request, self._plan.max_length, self._eos_token_ids) for request in requests]
        waves = schedule.waves(self._plan, [len(request.prompt) for request in requests])
        state, actions = schedule.start(waves, self._plan.decode_microbatch)
        to_do, in_flight = deque(actions), deque[tuple[Microbatch, Step]]()
        prefill_s = decode_s = before = 0.0
        generated = 0
        while to_do or in_flight:
            if to_do:
                action = to_do.popleft()
                if isinstance(action, Admit):
                    self._admit([sequences[i] for i in action.requests])
                    before = time.perf_counter()
                else:
                    in_flight.append((action, self._start(action, sequences)))
                continue
            microbatch, step = in_flight.popleft()
            tokens = self._runner.receive_tokens(step).tolist()
            for i, token in zip(microbatch.requests, tokens, strict=True):
                sequences[i].append(token)
            if stopped():
                for i in microbatch.requests:
                    sequences[i].stop()
            ended = [i for i in microbatch.requests if sequences[i].finish_reason]
            now = time.perf_counter()
            if state.in_prefill:
                prefill_s += now - before
            else:
                decode_s += now - before
            before = now
            state, actions = schedule.advance(state, Returned(microbatch, frozenset(ended)))
            to_do.extend(actions)
            generated += len(tokens)
            on_tokens(microbatch.requests, tokens)
            for i in ended:
                on_end(i, sequences[i].generated())
        return Prediction(prefill_s, decode_s, generated / max(prefill_s + decode_s, 1e-9), self._finish())

    def _admit(self, sequences: Sequence[_Sequence]) -> None:
        """Give slots 0, 1, ... to these sequences."""
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
        sampling = json.dumps([[sequence.slot, sequence.sampling.to_dict()] for sequence in sequences])
        self._runner.handle(Admission(sampling))

    def _start(self, microbatch: Microbatch, sequences: Sequence[_Sequence]) -> Step:
        chosen = [sequences[i] for i in microbatch.requests]
        slots = [s.slot for s in chosen]
        if microbatch.phase == "prefill":
            step = _prefill_step(slots, [s.prompt for s in chosen])
        else:
            step = Step.of(slots, [1] * len(slots), [s.next_position for s in chosen], [s.tokens[-1] for s in chosen])
        self._launch(StepMessage(step))
        return step

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """The scores of sequences of at most max_length tokens."""
        in_flight = deque[Step]()
        scores: list[Scores] = []

        def collect() -> None:
            lengths = (in_flight.popleft().query_lens - 1).tolist()
            log_probs, likeliest = self._runner.receive_tokens().view(2, sum(lengths))
            split = log_probs.view(torch.float64).split(lengths), likeliest.split(lengths)
            scores.extend(Scores(p.tolist(), tokens.tolist()) for p, tokens in zip(*split, strict=True))

        for packed in self._plan.prefill_microbatches([len(ids) for ids in sequences]):
            # A slot may be written anew at once: messages keep their order, so it was read before.
            step = _prefill_step(range(len(packed)), [sequences[i] for i in packed])
            self._launch(StepMessage(step, scored=True))
            in_flight.append(step)
            if len(in_flight) > len(self._plan.stages):
                collect()
        while in_flight:
            collect()
        self._finish()
        return scores

    def close(self) -> None:
        """Let the other stages' processes end."""
        self._runner.handle(Close())
        self._runner.links.flush()

    def _launch(self, message: StepMessage) -> None:
        self._runner.links.expect(message.num_returned)
        self._runner.handle(message)

    def _finish(self) -> tuple[int, ...]:
        """End a command; each stage's peak memory above idle, in bytes."""
        self._runner.links.expect(len(self._plan.stages))
        self._runner.handle(Finish())
        peaks = tuple(self._runner.receive_tokens().tolist())
        self._runner.links.flush()
        return peaks


def _prefill_step(slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Step:
    lengths = [len(prompt) for prompt in prompts]
    return Step.of(slots, lengths, [0] * len(lengths), [token for prompt in prompts for token in prompt])
