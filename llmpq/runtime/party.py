"""What is heard of another process, one JSON event a line: signs of life, its failure, and what it has to say."""

from __future__ import annotations

import json
import os
from typing import Any

from llmpq.progress import warn_once
from llmpq.spec import LlmpqError, errors

START_S = 120.0  # for a process to import what it needs: torch from a cold network disk takes a while


class Party:
    """A process at the other end of a descriptor, and what was last heard of it.

    Silence is counted by whoever listens, in `listened`: a listener that was stopped, or busy elsewhere, has heard
    nothing, which says nothing about the other. Until the party has said "started", all time counts, and up to START_S.
    """

    def __init__(self, rank: int, events: int, silence_limit_s: float) -> None:
        self.rank, self.events = rank, events
        self.doing = "starting"
        self.started = False
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
        elif kind == "error":
            self.error = getattr(errors, event["kind"])(event["message"])
        elif kind == "defect":
            self.defect = event["message"]
        elif kind == "started":
            self.started = True
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
            return 5
        if self.defect:
            return 1
        return self._end_certainty() if self.ended else 3 if self.silent else 0

    def _end_certainty(self) -> int:
        """`failure` of one that has ended without a word."""
        return 4

    def describe_loss(self) -> str:
        """One line on how it was lost."""
        raise NotImplementedError
