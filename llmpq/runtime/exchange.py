"""An exchange: commands to running workers, and what they say until it is done.

One thread listens to the workers; it alone talks to them. What others say lies in an outbox until it is woken.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import DeviceMemoryError, LlmpqError, Span, WorkerLostError


class Exchange:
    """Commands to the workers of an engine, until all of them have a result. All but `listen` from any thread."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._outbox: deque[tuple[str, dict[str, Any]]] = deque()
        self._listener: threading.Thread | None = None
        self._over = threading.Event()  # nobody listens any more
        self._aborted: BaseException | None = None

    def say(self, command: str, **fields: Any) -> None:
        """Send a command to the first stage, after those before it; see worker.py."""
        self._outbox.append((command, fields))
        self._group.wake()

    @property
    def is_listener(self) -> bool:
        """Whether the calling thread is the one that listens."""
        return self._listener is threading.current_thread()

    def listen(self) -> tuple[Any, list[Span]]:
        """Talk to the workers until all are done: the value of the first stage's result, and the spans of all stages.

        Called once. Raises what WorkerGroup.receive does, the error of `abort`, and what `on_event` does.
        """
        with self._lock:
            self._listener = threading.current_thread()
        try:
            while True:
                loss: LlmpqError | None = None
                try:
                    if (done := self._listen()) is not None:
                        return done
                except (DeviceMemoryError, WorkerLostError) as error:
                    loss = error
                self._group = self.recover(loss)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._over.set()

    def _listen(self) -> tuple[Any, list[Span]] | None:
        """As `listen`, or None to go on with others."""
        value = None
        spans: list[Span] = []
        waiting = set(self._group.workers)
        while waiting:
            if self._aborted is not None:
                raise self._aborted
            if self.moves():
                return None
            while self._outbox:
                command, fields = self._outbox.popleft()
                self._group.workers[0].send(command, **fields)
            heard = self._group.receive_unless(lambda: self._outbox or self._aborted or self.moves())
            if heard is None:
                continue
            worker, event = heard
            if event["event"] == "result":
                waiting.remove(worker)
                spans += map(Span.from_dict, event["spans"])
                value = event["value"] if worker.rank == 0 else value
            else:
                self.on_event(event)
        return value, sorted(spans, key=lambda span: span.start_s)

    def moves(self) -> bool:
        """Whether to go on with other workers, though none of these is lost."""
        return False

    def recover(self, error: LlmpqError | None) -> WorkerGroup:
        """Other workers, after the loss of one or as `moves` says, once all is said again that they need to hear.

        Raises the error if there are none.
        """
        assert error is not None
        raise error

    def on_event(self, event: dict[str, Any]) -> None:
        """An event other than a result, on the thread that listens."""

    def abort(self, error: BaseException) -> None:
        """Have `listen` raise an error, and return when it has; on the listening thread, at once."""
        with self._lock:
            self._aborted = error
            begun = self._listener is not None
        if begun and not self.is_listener:
            self._group.wake()
            self._over.wait()

    def fail(self, error: BaseException) -> None:
        """`listen` is about to raise this."""
