"""A session: requests that are handed to running workers one by one, from any thread, and what becomes of them.

One thread listens to the workers; it alone talks to them. What others hand in lies in an outbox until it is woken.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from llmpq.runtime.launch import WorkerGroup
from llmpq.runtime.request import Generated, Request
from llmpq.runtime.sampling import each_sampling
from llmpq.spec import Prediction, RequestTimes, Span


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
        """Wait for its continuation. Raises TimeoutError, or the error that ended the session."""
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


class Session:
    """Requests of an engine, from the first that is handed in until all have ended after `close`.

    All methods but `listen` may be called from any thread, also from what this session calls. Whatever that raises ends
    the session, and the workers.
    """

    def __init__(
        self,
        group: WorkerGroup,
        numbers: Iterator[int],
        check: Callable[[Sequence[Request]], None],
        on_progress: Callable[[int], None] = lambda generated: None,
    ) -> None:
        """`check` raises UsageError for requests that cannot be run. `on_progress`: see Engine.generate."""
        self._group, self._numbers, self._check, self._on_progress = group, numbers, check, on_progress
        self._lock = threading.Lock()
        self._outbox: deque[tuple[str, dict[str, Any]]] = deque()
        self._open: dict[int, Handle] = {}  # by their numbers
        self._closed = False
        self._listener: threading.Thread | None = None
        self._over = threading.Event()  # nobody listens any more
        self._failure: BaseException | None = None
        self._aborted: BaseException | None = None

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
    ) -> list[Handle]:
        """Hand in requests that come together. What is called is given their index among them first; see `submit`."""
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
            self._open.update((handle.number, handle) for handle in handles)
            stream = on_token is not None
            self._outbox.append(("submit", {"requests": fields, "stream": stream, "arrived_s": time.monotonic()}))
        self._group.wake()
        return handles

    def cancel(self, handles: Sequence[Handle] | None = None) -> None:
        """Cancel some requests, or all that have not ended: see Handle."""
        with self._lock:
            numbers = [handle.number for handle in handles] if handles is not None else list(self._open)
            open_ones = [number for number in numbers if number in self._open]
            if open_ones:
                self._outbox.append(("cancel", {"requests": open_ones}))
        self._group.wake()

    def close(self) -> None:
        """Nothing more is handed in: `listen` returns once all that was has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._outbox.append(("finish", {}))
        self._group.wake()

    def abort(self, error: BaseException) -> None:
        """Have `listen` raise an error, and return when it has; on the listening thread, at once."""
        with self._lock:
            self._aborted = error
            listener = self._listener
        if listener not in (None, threading.current_thread()):
            self._group.wake()
            self._over.wait()

    def fail(self, error: BaseException) -> None:
        """Nothing comes of the requests that have not ended: whoever waits for one gets the error."""
        with self._lock:
            self._failure = error
            left = list(self._open.values())
            self._open.clear()
        for handle in left:
            handle.future.set_exception(error)

    @property
    def failure(self) -> BaseException | None:
        """The error that ended it, if one did."""
        return self._failure

    def listen(self) -> tuple[Prediction, list[Span]]:
        """Talk to the workers until all is done: what was measured, as in RunResult, and the spans of their stages.

        Called once. Raises what WorkerGroup.receive does, and what callbacks do.
        """
        with self._lock:
            self._listener = threading.current_thread()
        try:
            return self._listen()
        finally:
            self._over.set()

    def _listen(self) -> tuple[Prediction, list[Span]]:
        measured = None
        spans: list[Span] = []
        waiting = set(self._group.workers)
        while waiting:
            if self._aborted is not None:
                raise self._aborted
            while self._outbox:
                command, fields = self._outbox.popleft()
                self._group.workers[0].send(command, **fields)
            heard = self._group.receive_unless(lambda: self._outbox or self._aborted)
            if heard is None:
                continue
            worker, event = heard
            if event["event"] == "result":
                waiting.remove(worker)
                spans += map(Span.from_dict, event["spans"])
                measured = event["value"] or measured
            else:
                self._on_event(event)
        assert measured is not None
        return Prediction.from_dict(measured), sorted(spans, key=lambda span: span.start_s)

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._on_progress(event["generated"])
        elif event["event"] == "tokens":
            for number, token in event["tokens"]:
                self._open[number].receive(token)
        elif event["event"] == "ended":
            with self._lock:
                handle = self._open.pop(event["request"])
            handle.end(Generated.from_dict(event["generated"]), RequestTimes.from_dict(event["times"]))
