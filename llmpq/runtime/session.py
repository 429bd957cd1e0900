"""A session: requests that are handed to running workers one by one, from any thread, and what becomes of them.

Workers may be lost, or better ones offered, and others take their place: requests that have not ended are handed to
these again, and go on from their prompt and the tokens that have come so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from llmpq.runtime.exchange import Exchange
from llmpq.runtime.grammar import packed
from llmpq.runtime.handle import Handle
from llmpq.runtime.request import Ends, Generated, Request
from llmpq.runtime.sampling import each_sampling
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import GrammarLostError, LlmpqError, RequestTimes


class Replacement(Protocol):
    def __call__(self, error: LlmpqError | None, in_flight: Sequence[Handle], /) -> WorkerGroup:
        """Other workers, after the loss of one, or, without an error, those that were offered.

        Raises the error, or what keeps others from being started.
        """


class Load(NamedTuple):
    """What a stage has done: seconds that it was busy in steps, and its peak memory above an idle worker."""

    busy_s: float
    memory_bytes: int


class Session(Exchange):
    """Requests of an engine, from the first that is handed in until all have ended after `close`.

    What hands in, cancels or closes may be called from any thread, also from what this session calls. Whatever that
    raises ends the session, and the workers.
    """

    def __init__(
        self,
        group: WorkerGroup,
        numbers: Iterator[int],
        check: Callable[[Sequence[Request]], None],
        on_progress: Callable[[int], None] = lambda generated: None,
        replacement: Replacement | None = None,
        ends: Callable[[Request], Ends] | None = None,
        offered: Callable[[], Sequence[str] | None] = lambda: None,
    ) -> None:
        """`check` raises UsageError for requests that cannot be run. `on_progress`: see Engine.generate.

        With a `replacement`, the loss of a worker does not end it; `ends` says where a request ends, and `offered`
        whether the replacement has something better now: the units that this computes otherwise, or None.
        """
        super().__init__(group)
        self._replacement, self._ends, self._offered = replacement, ends, offered
        self.stays = False  # with the workers that it has, whatever is offered
        self._first_s: float | None = None  # when the first request came
        self._clock_s: float | None = None  # when the clock of the workers of now began
        self._told = self._told_before = 0  # tokens, by the workers of now, and of those before
        self._cancelled = set[int]()
        self.batch: Sequence[Handle] = ()  # of the prompts that Engine.generate continues
        self._numbers, self._check, self._on_progress = numbers, check, on_progress
        self._open: dict[int, Handle] = {}  # by their numbers
        self._closed = False
        self._kv_tokens = 0
        self._vocabulary: Sequence[bytes] | None = None  # that requests with a grammar take
        self._failure: BaseException | None = None

    def submit(
        self,
        request: Request,
        on_token: Callable[[int], None] | None = None,
        on_end: Callable[[Generated], None] = lambda generated: None,
    ) -> Handle:
        """Hand in a request. `on_token` is called with each of its tokens as it comes, `on_end` with all of them.

        Requests are served in the order they are handed in. Raises UsageError for a prompt that cannot be run,
        ValueError once the session is closed, and the error that ended it if one did.
        """
        on_each = None if on_token is None else lambda _, token: on_token(token)
        return self.submit_all([request], on_each, lambda _, generated: on_end(generated))[0]

    def submit_all(
        self,
        requests: Sequence[Request],
        on_token: Callable[[int, int], None] | None = None,
        on_end: Callable[[int, Generated], None] = lambda index, generated: None,
        vocabulary: Sequence[bytes] | None = None,
    ) -> list[Handle]:
        """Hand in requests that come together. What is called is given their index among them first; see `submit`.

        `vocabulary` is that of the tokenizer, which those with a grammar take.
        """
        self._check(requests)
        sampling = each_sampling([request.sampling for request in requests], len(requests))
        arrived_s = time.monotonic()
        handles = [
            Handle(
                self,
                next(self._numbers),
                replace(request, sampling=params),
                arrived_s,
                on_token and partial(on_token, index),
                partial(on_end, index),
            )
            for index, (request, params) in enumerate(zip(requests, sampling, strict=True))
        ]
        fields = [(handle.number, handle.request.to_dict()) for handle in handles]
        stream = on_token is not None or self._replacement is not None
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ValueError("this session is closed; nothing can be handed in any more")
            self._vocabulary = vocabulary or self._vocabulary
            told = self._to_tell(requests, self._group)
            self._open.update((handle.number, handle) for handle in handles)
            self._hand_in(fields, stream, arrived_s, told)
        return handles

    def _to_tell(self, requests: Sequence[Request], group: WorkerGroup) -> str | None:
        """The vocabulary as workers are told of it, if requests are the first to take it. Raises ValueError."""
        if group.knows_vocabulary or not any(request.sampling.grammar for request in requests):
            return None
        if self._vocabulary is None:
            raise ValueError("json_schema, regex and choices are for Completions, which has a tokenizer")
        group.knows_vocabulary = True
        return packed(self._vocabulary)

    def _hand_in(
        self, fields: Sequence[tuple[int, dict[str, Any]]], stream: bool, arrived_s: float, vocabulary: str | None
    ) -> None:
        if self._first_s is None:
            self._first_s = arrived_s
        if self._clock_s is None:
            self._clock_s = arrived_s
        self.say("submit", requests=fields, stream=stream, arrived_s=arrived_s, vocabulary=vocabulary)

    def cancel(self, handles: Sequence[Handle] | None = None) -> None:
        """Cancel some requests, or all that have not ended: see Handle."""
        with self._lock:
            numbers = [handle.number for handle in handles] if handles is not None else list(self._open)
            open_ones = [number for number in numbers if number in self._open]
            self._cancelled.update(open_ones)
            if now := [number for number in open_ones if not self._open[number].again]:
                self.say("cancel", requests=now)

    def cancel_late(self, handle: Handle, always: bool) -> None:
        """Cancel a request whose tokens have come once more, if that was asked for before, or `always`."""
        with self._lock:
            if always or handle.number in self._cancelled:
                self.say("cancel", requests=[handle.number])

    def close(self) -> None:
        """Nothing more is handed in: `listen` returns once all that was has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.say("finish")

    def moves(self) -> bool:
        """See Exchange: to what is offered, unless all has ended, or a request that begins again might end there."""
        if self.stays or (changed := self._offered()) is None:
            return False
        in_flight = self._in_flight
        begins_again = any(handle.tokens and not handle.goes_on for handle in in_flight)
        return not (changed and begins_again) and bool(in_flight or not self._closed)

    def recover(self, error: LlmpqError | None) -> WorkerGroup:
        """See Exchange: what has not ended is handed in again, to a replacement if there is one."""
        if self._replacement is None or isinstance(error, GrammarLostError):
            return super().recover(error)
        for handle in self._in_flight:
            ends = self._ends(handle.request) if handle.goes_on and self._ends is not None else None
            if ends is not None and (reason := ends.reason(handle.tokens)) is not None:
                self._open.pop(handle.number)  # its last token came, and its end did not
                handle.close(reason, self._first_s or 0.0)
        group = self._replacement(error, self._in_flight)
        with self._lock:
            self._outbox.clear()
            group.knows_vocabulary = False  # who asked meanwhile may have counted on what is not said now
            self._told_before, self._told, self._clock_s = self._told_before + self._told, 0, None
            self._group, self._kv_tokens = group, 0
            for number, handle in self._open.items():
                rest = handle.rest()
                told = self._to_tell([rest], group)
                self._hand_in([(number, rest.to_dict())], True, handle.arrived_s, told)
                self._told_before -= handle.again
            cancelled = [i for i, handle in self._open.items() if i in self._cancelled and not handle.again]
            if cancelled:
                self.say("cancel", requests=cancelled)
            if self._closed:
                self.say("finish")
        return group

    @property
    def _in_flight(self) -> list[Handle]:
        """What has not ended."""
        with self._lock:
            return list(self._open.values())

    def fail(self, error: BaseException) -> None:
        """Nothing comes of the requests that have not ended: whoever waits for one gets the error."""
        with self._lock:
            self._failure = error
            left = list(self._open.values())
            self._open.clear()
        for handle in left:
            handle.future.set_exception(error)

    @property
    def kv_tokens(self) -> int:
        """For how many tokens the blocks of the KV cache that are in use have room, as told last."""
        return self._kv_tokens if self._open else 0

    @property
    def loads(self) -> list[Load]:
        """What each stage that runs on this host has done, as told last."""
        return [Load(worker.busy_s, worker.memory_bytes) for worker in [*self._group.workers]]  # some may go meanwhile

    @property
    def failure(self) -> BaseException | None:
        """The error that ended it, if one did."""
        return self._failure

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._kv_tokens = event["kv_tokens"]
            self._told = event["generated"]
            self._on_progress(self._told_before + self._told)
        elif event["event"] == "tokens":
            for number, token in event["tokens"]:
                self._open[number].receive(token)
        elif event["event"] == "ended":
            with self._lock:
                handle = self._open.pop(event["request"])
            self._cancelled.discard(handle.number)
            generated, times = Generated.from_dict(event["generated"]), RequestTimes.from_dict(event["times"])
            handle.end(generated, times, (self._clock_s or 0.0) - (self._first_s or 0.0))
