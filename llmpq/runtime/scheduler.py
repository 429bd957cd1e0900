"""The first stage's part: turns requests into micro-batches by the schedule, and collects the tokens that come back.

What happens comes through one queue, in the order it happens: commands, and values that return from the last stage.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import Any

import torch

from llmpq.models.step import Step
from llmpq.runtime.log_probs import num_values, take
from llmpq.runtime.message import Admission, Close, Finish, Message, Received, StepMessage, Values
from llmpq.runtime.request import Generated, Request, Scores
from llmpq.runtime.run_ahead import Awaited, is_foreseen
from llmpq.runtime.running import Running
from llmpq.runtime.sampler import Admitted, read_ending
from llmpq.runtime.stage import StageRunner
from llmpq.runtime.unread import Unread
from llmpq.spec import ModelSpec, Prediction, RequestTimes, schedule
from llmpq.spec.layers import blocks_for
from llmpq.spec.phases import Phases
from llmpq.spec.schedule_state import Action, Admit, Arrived, Cancelled, End, Event, Limits, Microbatch, Returned, State


class Scheduler:
    """Runs requests through a pipeline whose first stage is this process's."""

    def __init__(
        self,
        runner: StageRunner,
        inbox: SimpleQueue[Any],
        spec: ModelSpec,
        on_tokens: Callable[[int, int, Sequence[tuple[int, int]]], None],
        on_end: Callable[[int, Generated, RequestTimes], None],
    ) -> None:
        """`inbox` is where commands come; worker.py lists them.

        `on_tokens` is called after each step with the number of tokens generated so far, those for which the blocks in
        use have room, and the new token of each request that is to be streamed; `on_end` with a request, its
        continuation and its times once it has ended.
        """
        self._runner, self._inbox, self._plan = runner, inbox, runner.plan
        self._eos_token_ids = spec.eos_token_ids
        self._on_tokens, self._on_end = on_tokens, on_end
        self._vocabulary: str | None = None  # that the last stage is still to be told
        self._sequences: dict[int, Running] = {}  # that have not ended
        self._state = schedule.start(Limits.of(runner.plan, spec))
        self._to_do = deque[Microbatch]()
        self._in_flight = deque[tuple[Microbatch, StepMessage]]()
        self._began_s = 0.0
        self._phases, self._generated = Phases(0.0), 0
        self._alone = len(runner.plan.stages) == 1
        self._collector = threading.Thread(target=self._collect, name="returned tokens", daemon=True)
        if not self._alone:
            self._collector.start()

    def run(self, command: dict[str, Any]) -> Prediction:
        """Continue requests, from this first command on until "finish" has come and all of them have ended.

        Returns what was measured, as in RunResult.
        """
        self._began_s = command.get("arrived_s", time.monotonic())
        self._phases, self._generated = Phases(time.monotonic()), 0
        self._state = schedule.start(self._state.limits)  # a run reuses nothing of another, so it can be predicted
        finishing = False
        item: Any = command
        while True:
            if isinstance(item, Received):
                self._take_back(item)
            elif item["command"] == "submit":
                self._vocabulary = item["vocabulary"] or self._vocabulary
                self._submit(item["requests"], item["arrived_s"], item["stream"])
            elif item["command"] == "cancel":
                self._happen(Cancelled(tuple(item["requests"])))
            else:
                finishing = True
            if finishing and self._state.done:
                break
            item = self._next()
        return self._phases.prediction(self._generated, self._finish())

    def _submit(self, requests: Sequence[tuple[int, dict[str, Any]]], arrived_s: float, stream: bool) -> None:
        """Take requests of 1 to max_length - 1 tokens, each with its number, which no other has had."""
        for number, fields in requests:
            request = Request.from_dict(fields)
            self._sequences[number] = Running(request, self._plan.max_length, self._eos_token_ids, arrived_s, stream)
        self._happen(Arrived(tuple(self._sequences[i].as_prompt(i) for i, _ in requests)))

    def _take_back(self, received: Received[Values]) -> None:
        """The tokens of the oldest step on its way are back, or are chosen soon."""
        microbatch, message = self._in_flight.popleft()
        sequences = [self._sequences[i] for i in microbatch.requests]
        foreseen = isinstance(received.content, Unread) and self._run_ahead(microbatch, sequences)
        values, count = self._runner.returned(received, message), message.num_returned
        take(values[count:], message.step, [sequence.log_probs for sequence in sequences], message.prefix)
        tokens = [read_ending(value) for value in values[:count].tolist()]
        answered = sequences[message.prefix :]
        now = time.monotonic()
        came = [
            (i, sequence, *token)
            for i, sequence, token in zip(microbatch.answered, answered, tokens, strict=True)
            if sequence.finish_reason is None
        ]
        for _, sequence, token, ending in came:
            sequence.append(token, ending, now)
        self._generated += len(came)
        streamed = [(i, token) for i, sequence, token, _ in came if sequence.streamed]
        self._on_tokens(self._generated, self._state.kv_tokens, streamed)
        ended = frozenset(i for i, sequence in zip(microbatch.answered, answered) if sequence.finish_reason)
        if not foreseen:
            self._happen(Returned(microbatch, ended))
        elif ended:
            self._happen(Cancelled(tuple(ended)))

    def _run_ahead(self, microbatch: Microbatch, sequences: Sequence[Running]) -> bool:
        """Start what can be started before the tokens of a step are read. Whether the step was taken for returned."""
        cancelled = self._state.cancelled
        # Who gave its blocks back would be computed anew from tokens of which the last has not been read.
        foreseen = (
            self._state.all_can_grow
            and not (self._to_do or self._in_flight)
            and is_foreseen(
                microbatch,
                (
                    Awaited(sequence.left, ended=sequence.finish_reason is not None, cancelled=i in cancelled)
                    for i, sequence in zip(microbatch.requests, sequences, strict=True)
                ),
            )
        )
        if foreseen:
            state, actions = schedule.advance(self._state, Returned(microbatch, frozenset()))
            # Who decodes beside prompts does so with a token that the host knows.
            foreseen = not any(isinstance(each, Microbatch) and each.prompts and each.decoding for each in actions)
        if foreseen:
            for sequence in sequences:
                sequence.unread = True
            self._pass_to(state, actions)
        while self._to_do:
            self._start_next()
        return foreseen

    def _happen(self, event: Event) -> None:
        self._pass_to(*schedule.advance(self._state, event))

    def _pass_to(self, state: State, actions: Sequence[Action]) -> None:
        """Carry out what the schedule says."""
        now = time.monotonic()
        self._phases.pass_to(now, self._state)
        self._state = state
        for action in actions:
            if isinstance(action, End):
                for i in action.requests:
                    self._end(i, now)
            elif isinstance(action, Admit):
                self._admit(action.slots)  # at once: no step to do is of one of these slots
            else:
                self._to_do.append(action)

    def _end(self, number: int, now: float) -> None:
        sequence = self._sequences.pop(number)
        self._on_end(number, sequence.generated(), sequence.times(self._began_s, now))

    def _next(self) -> Any:
        """What happens next. Until something does, work."""
        while self._to_do and self._inbox.empty():
            self._start_next()
        if self._inbox.empty():
            self._runner.note_waiting(for_tokens=bool(self._in_flight))
        item = self._inbox.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _start_next(self) -> None:
        microbatch = self._to_do.popleft()
        self._in_flight.append((microbatch, self._start(microbatch)))

    def _admit(self, slots: Sequence[tuple[int, int]]) -> None:
        for i, slot in slots:
            self._sequences[i].slot = slot
        chosen = [self._sequences[i] for i, _ in slots]
        admitted = [Admitted.of(s.slot, s.sampling, s.prompt, s.tokens) for s in chosen]
        told = {"requests": [request.to_dict() for request in admitted], "vocabulary": self._vocabulary}
        self._runner.handle(Admission(json.dumps(told)))
        self._vocabulary = None

    def _start(self, microbatch: Microbatch) -> StepMessage:
        chosen = [self._sequences[i] for i in microbatch.requests]
        tables = self._state.pool.tables
        slots, blocks = [s.slot for s in chosen], [s.blocks(tables[i]) for i, s in zip(microbatch.requests, chosen)]
        decoding = chosen[len(microbatch.prompts) :]
        starts, tokens = [s.next_position for s in decoding], [0 if s.unread else s.tokens[-1] for s in decoding]
        lens = [1] * len(decoding)
        if microbatch.prompts:
            prompts = self._new_of_prompts(microbatch)
            starts = [start for start, _ in prompts] + starts
            tokens = [token for _, new in prompts for token in new] + tokens
            lens = [len(new) for _, new in prompts] + lens
        step = Step.of(slots, lens, starts, tokens, blocks)
        latest = any(s.unread for s in decoding)
        message = StepMessage(step, prefix=microbatch.is_prefix, latest=latest, phase=microbatch.phase)
        more = num_values(step, [s.log_probs for s in chosen], message.prefix)
        self._launch(message, message.num_returned + more)
        return message

    def _new_of_prompts(self, microbatch: Microbatch) -> list[tuple[int, Sequence[int]]]:
        """What a step computes of its prompts: of each the position of the first token, and the tokens."""
        chosen, chunk = [self._sequences[i] for i in microbatch.prompts], microbatch.chunk
        for i, count in microbatch.begun:
            if not self._sequences[i].tokens:
                self._sequences[i].reused = count
        if chunk is not None:
            return [(chunk.start, chosen[0].all_tokens[chunk.start : chunk.end])]
        starts = microbatch.reused or [0] * len(chosen)
        return [(start, s.all_tokens[start:]) for start, s in zip(starts, chosen, strict=True)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """The scores of sequences of at most max_length tokens."""
        in_flight = deque[Step]()
        scores: list[Scores] = []

        def collect() -> None:
            lengths = (in_flight.popleft().query_lens - 1).tolist()
            log_probs, likeliest = self._values().view(2, sum(lengths))
            split = log_probs.view(torch.float64).split(lengths), likeliest.split(lengths)
            scores.extend(Scores(p.tolist(), tokens.tolist()) for p, tokens in zip(*split, strict=True))

        for packed in self._plan.prefill_microbatches([len(ids) for ids in sequences]):
            # A slot may be written anew at once: messages keep their order, so it was read before.
            chosen = [sequences[i] for i in packed]
            blocks = _one_after_the_other(map(len, chosen))
            tokens = [token for sequence in chosen for token in sequence]
            step = Step.of(range(len(packed)), list(map(len, chosen)), [0] * len(packed), tokens, blocks)
            message = StepMessage(step, scored=True)
            self._launch(message, message.num_returned)
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

    def stop(self) -> None:
        """End its thread, once the links are cut."""
        if not self._alone:
            self._runner.links.close()
            self._collector.join()

    def _launch(self, message: Message, returned: int) -> None:
        """Send a message on its way around, from which so many values come back."""
        self._runner.links.expect(returned)
        self._runner.handle(message)
        if self._alone:
            self._inbox.put(self._runner.links.receive_tokens())

    def _collect(self) -> None:
        """On a thread of its own: what returns is put beside commands, so that neither waits for the other."""
        try:
            while True:
                self._inbox.put(self._runner.links.receive_tokens())
        except BaseException as error:
            self._inbox.put(error)

    def _values(self) -> torch.Tensor:
        """Wait for values while no requests are on their way; commands that come late are for those that have ended."""
        while not isinstance(item := self._next(), Received):
            pass
        return self._runner.returned(item)

    def _finish(self) -> tuple[int, ...]:
        """End a command; each stage's peak memory above idle, in bytes."""
        self._launch(Finish(), len(self._plan.stages))
        peaks = tuple(self._values().tolist())
        self._runner.links.flush()
        return peaks


def _one_after_the_other(lengths: Iterable[int]) -> list[range]:
    """Blocks of the cache for sequences of such lengths, from the first block on."""
    ends = [0, *accumulate(map(blocks_for, lengths))]
    return [range(start, end) for start, end in pairwise(ends)]
