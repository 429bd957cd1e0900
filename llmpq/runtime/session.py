"""A session: requests that are handed to running workers one by one, from any thread, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from llmpq.runtime.exchange import Exchange
from llmpq.runtime.grammar import packed
from llmpq.runtime.launch import WorkerGroup
from llmpq.runtime.request import Generated, Request
from llmpq.runtime.sampling import each_sampling
from llmpq.spec import RequestTimes


class Load(NamedTuple):
    """What a stage has done: seconds that it was busy in steps, and its peak memory above an idle worker."""

    busy_s: float
    memory_bytes: int


class Handle:
    """A request that was handed in.

    `future` has its result once it has ended, or the error that ended the session; its callbacks are called on the
    thread that listens. `times` are known then. No two requests of an engine have the same `number`.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        on_token: Callable[[int], None] | None,
        on_end: Callable[[Generated], None],
    ) -> None:
        self.number = number
        self.future: Future[Generated] = Future()
        self.future.set_running_or_notify_cancel()  # it is the request that can be cancelled
        self.times: RequestTimes | None = None
        self._session, self._on_token, self._on_end = session, on_token, on_end

    def cancel(self) -> None:
        """Have it end: at once, or with the token that is on its way. Its result is what it has then."""
        self._session.cancel([self])

    def result(self, timeout_s: float | None = None) -> Generated:
        """Wait for its continuation. Raises TimeoutError, or the error that ended the session.

        Raises ValueError if the thread that listens would wait, as no result would ever come: in a callback.
        """
        if self._session.is_listener and not self.future.done():
            raise ValueError("a callback cannot wait for a result; have on_end told of it, or wait on another thread")
        return self.future.result(timeout_s)

    def receive(self, token: int) -> None:
        """Its next token is here."""
        if self._on_token is not None:
            self._on_token(token)

    def end(self, generated: Generated, times: RequestTimes) -> None:
        """It has ended."""
        self.times = times
        self.future.set_result(generated)
        self._on_end(generated)


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
    ) -> None:
        """`check` raises UsageError for requests that cannot be run. `on_progress`: see Engine.generate."""
        super().__init__(group)
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
        handles = [
            Handle(self, next(self._numbers), on_token and partial(on_token, index), partial(on_end, index))
            for index in range(len(requests))
        ]
        fields = [
            (handle.number, replace(request, sampling=params).to_dict())
            for handle, request, params in zip(handles, requests, sampling, strict=True)
        ]
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ValueError("this session is closed; nothing can be handed in any more")
            self._vocabulary = vocabulary or self._vocabulary
            told = self._to_tell(requests)
            self._open.update((handle.number, handle) for handle in handles)
            arrived_s = time.monotonic()
            self.say("submit", requests=fields, stream=on_token is not None, arrived_s=arrived_s, vocabulary=told)
        return handles

    def _to_tell(self, requests: Sequence[Request]) -> str | None:
        """The vocabulary as the workers are told of it, if requests are the first to take it. Raises ValueError."""
        if self._group.knows_vocabulary or not any(request.sampling.grammar for request in requests):
            return None
        if self._vocabulary is None:
            raise ValueError("json_schema, regex and choices are for Completions, which has a tokenizer")
        self._group.knows_vocabulary = True
        return packed(self._vocabulary)

    def cancel(self, handles: Sequence[Handle] | None = None) -> None:
        """Cancel some requests, or all that have not ended: see Handle."""
        with self._lock:
            numbers = [handle.number for handle in handles] if handles is not None else list(self._open)
            open_ones = [number for number in numbers if number in self._open]
            if open_ones:
                self.say("cancel", requests=open_ones)

    def close(self) -> None:
        """Nothing more is handed in: `listen` returns once all that was has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.say("finish")

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
        return [Load(worker.busy_s, worker.memory_bytes) for worker in self._group.workers]

    @property
    def failure(self) -> BaseException | None:
        """The error that ended it, if one did."""
        return self._failure

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._kv_tokens = event["kv_tokens"]
            self._on_progress(event["generated"])
        elif event["event"] == "tokens":
            for number, token in event["tokens"]:
                self._open[number].receive(token)
        elif event["event"] == "ended":
            with self._lock:
                handle = self._open.pop(event["request"])
            handle.end(Generated.from_dict(event["generated"]), RequestTimes.from_dict(event["times"]))
