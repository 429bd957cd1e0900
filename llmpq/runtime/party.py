"""What is heard of other processes, one JSON event a line: signs of life, failures, and what they have to say.

The others are workers of this process, and processes on other hosts. If one is lost, so are the rest; which of them is
the cause is decided here.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from llmpq.progress import warn_once
from llmpq.spec import LlmpqError, WorkerLostError, errors

_SILENT, _REPORTED = 3, 5  # values of Party.failure
LISTEN_S = 0.5  # at once
START_S = 120.0  # for a process to import what it needs, from a cold network disk perhaps, and to meet its neighbours


class Party:
    """A process at the other end of a descriptor, and what was last heard of it.

    Silence is counted by whoever listens, in `listened`: a listener that was stopped, or busy elsewhere, has heard
    nothing, which says nothing about the other. Until the party has said "started", all time counts, and up to START_S.
    """

    def __init__(self, rank: int, events: int, silence_limit_s: float) -> None:
        self.rank, self.events = rank, events
        self.doing = "starting"
        self.busy_s, self.memory_bytes = 0.0, 0  # see Status
        self.started = False
        self.left = False  # its pipeline, as it was told to
        self.error: LlmpqError | None = None  # what it reported, before it ended
        self.defect: str | None = None
        self.ended = False
        self._unheard_s = 0.0
        self._silence_limit_s = silence_limit_s
        self._unfinished = b""

    @property
    def limit_s(self) -> float:
        """The seconds after which it counts as lost: without "started" at first, without any sign of life later."""
        return self._silence_limit_s if self.started else START_S

    def listened(self, seconds: float) -> None:
        """Somebody has listened for so long, and heard nothing unless `read` is called next."""
        self._unheard_s += seconds

    def read(self) -> list[dict[str, Any]]:
        """Events that have arrived, but those that tell of the party itself. Call when there is something to read."""
        try:
            data = os.read(self.events, 2**16)
        except BlockingIOError:
            return []
        except OSError:  # a connection that was reset
            data = b""
        self.ended = not data
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        events = [event for event in map(json.loads, lines) if not self._note(event)]
        if self.started:
            self._unheard_s = 0.0
        return events

    def _note(self, event: dict[str, Any]) -> bool:
        """Whether an event tells of the party itself and nothing else."""
        kind = event["event"]
        if kind == "heartbeat":
            self.doing = event["doing"]
            self.busy_s, self.memory_bytes = event.get("busy_s", 0.0), event.get("memory_bytes", 0)
        elif kind == "error":
            self.error = getattr(errors, event["kind"])(event["message"])
        elif kind == "defect":
            self.defect = event["message"]
        elif kind == "started":
            self.started = True
        elif kind == "left":
            self.left, self.defect = True, None
        elif kind == "warning":
            warn_once(event["message"])
        else:
            return False
        return True

    @property
    def silent(self) -> bool:
        return self._unheard_s > self.limit_s

    def failure(self) -> int:
        """0 if all is well; else the higher, the more surely it is a cause and not the effect of another's failure."""
        if self.error:
            return _REPORTED
        if self.defect:
            return 2 if self.ended else 1  # who has not ended has but lost a link
        return self._end_certainty() if self.ended else _SILENT if self.silent else 0

    def _end_certainty(self) -> int:
        """`failure` of one that has ended without a word."""
        return 4

    def loss(self) -> LlmpqError:
        """What to raise when it is lost."""
        loss = self.error or WorkerLostError(self.describe_loss())
        loss.rank = self.rank
        return loss

    def describe_loss(self) -> str:
        """One line on how it was lost."""
        raise NotImplementedError

    def show_log(self) -> None:
        """Show on stderr what else it has left to say."""


P = TypeVar("P", bound=Party)


class Listener(Generic[P]):
    """Listens to parties, and raises if one of them is lost."""

    def __init__(
        self, grace_s: float, on_loss: Callable[[int, LlmpqError], None] = lambda certainty, loss: None
    ) -> None:
        """After a first failure, `grace_s` is left for its cause to show: one that dies fails its neighbours, too.

        `on_loss` is called with the `failure` of a party and its `loss`, at once, and again if a surer one shows.
        """
        self._grace_s, self._on_loss = grace_s, on_loss
        self._parties: list[Party] = []
        self._selector = selectors.DefaultSelector()
        self._listened_at = time.monotonic()
        self._arrived: deque[tuple[P, dict[str, Any]]] = deque()

    def listen_to(self, party: Party) -> None:
        self._parties.append(party)
        if not party.ended:
            self._selector.register(party.events, selectors.EVENT_READ, party)

    def drop(self, party: Party) -> None:
        """It is not listened to any more."""
        self._parties.remove(party)
        if not party.ended:
            self._selector.unregister(party.events)

    def listen_until(self, condition: Callable[[], object]) -> None:
        """Until a condition holds, which is looked at after whatever is heard.

        Raises the error that a party reported, or WorkerLostError if one ended or fell silent.
        """
        while not condition():
            self._listen(LISTEN_S)
            self._check()

    def _listen(self, seconds: float) -> None:
        ready = self._selector.select(seconds)
        now = time.monotonic()
        for party in self._parties:
            # The rest was not listened for: this process was stopped, or with its caller.
            party.listened(min(now - self._listened_at, LISTEN_S))
        self._listened_at = now
        for key, _ in ready:
            self._heard(key)

    def _heard(self, key: selectors.SelectorKey) -> None:
        party: P = key.data
        self._arrived.extend((party, event) for event in party.read())
        if party.ended:
            self._selector.unregister(party.events)

    def _check(self) -> None:
        """If a party has failed, raise for the one whose failure looks most like the cause of the others'."""
        if not any(party.failure() for party in self._parties):
            return
        until = time.monotonic() + self._grace_s
        told = 0
        while True:
            culprit = max(self._parties, key=lambda party: party.failure())
            certainty = culprit.failure()
            over = certainty == _REPORTED or time.monotonic() > until
            if certainty > told and (over or certainty != _SILENT):  # who is silent may speak yet
                told = certainty
                self._on_loss(certainty, culprit.loss())
            if over:
                break
            self._listen(LISTEN_S / 5)
        if certainty:
            culprit.show_log()
            raise culprit.loss()
