"""Between the event loop, where requests of HTTP come, and the thread that listens to the workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from llmpq.runtime.completion import Completion
from llmpq.runtime.handle import Handle
from llmpq.runtime.request import Generated
from llmpq.runtime.session import Session
from llmpq.serve.ask import Ask
from llmpq.serve.metrics import Metrics
from llmpq.serve.refusal import Refusal

_MOST_RETRY_S = 60
_SHUTTING_DOWN = "the server is shutting down"


class Piece(NamedTuple):
    """What an answer's text goes on with; `choice` counts all answers of a request."""

    choice: int
    text: str


class Ended(NamedTuple):
    """All answers to a prompt, by its number in its request."""

    prompt: int
    completions: Sequence[Completion]


class Answers:
    """The answers to one request, as they come: an iterator for one task of the event loop that makes it."""

    def __init__(self, session: Session, prompts: int) -> None:
        self._session, self._left = session, prompts
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[Piece | Ended | BaseException]()
        self.handles: list[Handle] = []

    def put(self, event: Piece | Ended | BaseException) -> None:
        """From any thread."""
        self.call(lambda: self._events.put_nowait(event))

    def call(self, work: Callable[[], None]) -> None:
        """Do it on the event loop, from any thread, after what was put before."""
        with suppress(RuntimeError):  # the loop may end before the session does
            self._loop.call_soon_threadsafe(work)

    async def __aiter__(self) -> AsyncIterator[Piece | Ended]:
        """Raises Refusal if the session, or the server, ends before them."""
        while self._left:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(event))
            if isinstance(event, Ended):
                self._left -= 1
                if any(each.generated.finish_reason == "cancelled" for each in event.completions):
                    raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, _SHUTTING_DOWN)
            yield event

    async def all(self) -> list[Completion]:
        """In the order of the prompts. Raises as the iterator does."""
        found = [event async for event in self if isinstance(event, Ended)]
        return [each for ended in sorted(found, key=lambda ended: ended.prompt) for each in ended.completions]

    def cancel(self) -> None:
        """Have what is left of them end: nobody waits for it."""
        if self._left:
            self._session.cancel(self.handles)


class Service:
    """Hands requests to a session, no more than `capacity` sequences at a time, and counts them in `metrics`.

    Its methods are for the event loop.
    """

    def __init__(self, session: Session, metrics: Metrics, capacity: int) -> None:
        self.session, self.metrics, self.capacity = session, metrics, capacity
        self._reading = 0
        self.draining = False

    @property
    def problem(self) -> str | None:
        """Why nothing is taken in, if nothing is."""
        if self.session.failure is not None:
            return str(self.session.failure)
        return _SHUTTING_DOWN if self.draining else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In the block, a body is received and read, which takes memory and time. Raises Refusal, as `submit` does."""
        self._check_room(self._reading, "requests are being read", 1)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def check_open(self, count: int = 1) -> None:
        """Raise Refusal if nothing is taken in, or there is no room for so many more sequences now."""
        if self.problem is not None:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, self.problem)
        self._check_room(self.metrics.open, "sequences are running or waiting", count)

    def _check_room(self, taken: int, what: str, count: int) -> None:
        if taken + count > self.capacity:
            self.metrics.refused += 1
            raise Refusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{taken} {what}, and at most {self.capacity} may; try again",
                code="rate_limit_exceeded",
                retry_after_s=min(_MOST_RETRY_S, max(1, math.ceil(self.metrics.seconds_per_sequence * count))),
            )

    def submit(self, ask: Ask) -> Answers:
        """Hand in what is asked for. Raises Refusal, as `check_open`, and UsageError."""
        self.check_open(len(ask.completions.sampling))
        answers = Answers(self.session, len(ask.prompts))

        def on_text(request: int, text: str) -> None:
            if text:
                answers.put(Piece(request, text))

        def on_sequence(request: int, reason: str) -> None:
            answers.call(lambda: self.metrics.end(reason, answers.handles[request].times))

        answers.handles = ask.completions.submit(
            self.session,
            lambda prompt, completions: answers.put(Ended(prompt, completions)),
            on_text if ask.stream else None,
            on_sequence,
        )
        for handle, token_ids in zip(answers.handles, ask.completions.token_ids, strict=True):
            self.metrics.begin(len(token_ids))
            handle.future.add_done_callback(partial(self._note_error, answers))
        return answers

    def _note_error(self, answers: Answers, future: Future[Generated]) -> None:
        """Of a sequence that has ended; on the thread that listens."""
        if (error := future.exception()) is not None:
            answers.call(lambda: self.metrics.end("error"))
            answers.put(error)
