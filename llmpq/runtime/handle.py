"""A request that was handed to a session, as whoever handed it in has it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from llmpq.runtime.request import Generated, Request
from llmpq.spec import RequestTimes

if TYPE_CHECKING:
    from llmpq.runtime.session import Session


class Handle:
    """A request that was handed in.

    `future` has its result once it has ended, or the error that ended the session; its callbacks are called on the
    thread that listens. `times` are known then. No two requests of an engine have the same `number`. `tokens` are those
    that have come so far, if they are told.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        request: Request,
        arrived_s: float,
        on_token: Callable[[int], None] | None,
        on_end: Callable[[Generated], None],
    ) -> None:
        self.number = number
        self.future: Future[Generated] = Future()
        self.future.set_running_or_notify_cancel()  # it is the request that can be cancelled
        self.times: RequestTimes | None = None
        self.request, self.arrived_s = request, arrived_s
        self.tokens: list[int] = []
        self._first_token_s = math.nan
        self._waited_s: float | None = None  # for its first token, if that came from others than those who run it now
        self.again = 0  # of its tokens, the last ones, that come once more
        self._differs = False  # whether they came otherwise
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
        if self.again:
            self._differs |= token != self.tokens[-self.again]
            self.again -= 1
            if self._differs or not self.again:
                self._session.cancel_late(self, always=self._differs)
            return
        if self._differs:
            return
        if not self.tokens:
            self._first_token_s = time.monotonic()
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)

    @property
    def goes_on(self) -> bool:
        """Whether other workers go on from its tokens; else they begin again, and it ends where these differ."""
        return self.request.sampling.goes_on

    def close(self, reason: str, first_s: float) -> None:
        """It has ended with the tokens that have come, in a session whose first request came then."""
        arrived_s, began_s, now_s = (t - first_s for t in (self.arrived_s, self._first_token_s, time.monotonic()))
        self._waited_s = None
        generated = Generated(tuple(self.tokens), reason, self.request.sampling.seed)
        self.end(generated, RequestTimes(arrived_s, began_s, now_s, len(self.tokens)))

    def rest(self) -> Request:
        """What workers are told that know nothing of it."""
        self.again = 0 if self.goes_on else len(self.tokens)
        self._waited_s = self._first_token_s - self.arrived_s if self.tokens else None
        return replace(self.request, answered=tuple(self.tokens)) if self.goes_on else self.request

    def end(self, generated: Generated, times: RequestTimes, later_s: float = 0.0) -> None:
        """It has ended, with what those who ran it last have generated; `later_s`: their clock began so much later."""
        if later_s or self._waited_s is not None:
            first_s = None if times.first_token_s is None else times.first_token_s + later_s
            arrived_s = times.arrived_s + later_s
            if self._waited_s is not None:
                first_s = arrived_s + self._waited_s
            times = RequestTimes(arrived_s, first_s, times.ended_s + later_s, times.tokens, times.reused)
        if self._differs:
            generated = Generated(tuple(self.tokens), "cancelled", self.request.sampling.seed)
        self.times = times
        self.future.set_result(generated)
        self._on_end(generated)
