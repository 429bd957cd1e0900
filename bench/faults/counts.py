"""How injected faults of one kind ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["ended_well", "hung", "lost", "doubled", "tracebacks"]


@dataclass
class Counts:
    """Each fault is injected once, and ends in one of the five ways."""

    fault: str  # kind
    injected: int = 0
    ended_well: int = 0  # went on, or ended with one line of at most 500 characters and a documented exit code
    hung: int = 0  # took longer than its limit
    lost: int = 0  # of what was to be written or answered
    doubled: int = 0  # the same, written or answered twice
    tracebacks: int = 0  # ended in another way than by a line of its own
    failures: list[str] = field(default_factory=list)  # all but those that ended well: which, and what was seen

    def add(self, ending: Ending, what: str = "") -> None:
        """Count one fault; `what` says how to inject it again and what was seen."""
        self.injected += 1
        setattr(self, ending, getattr(self, ending) + 1)
        if ending != "ended_well":
            self.failures.append(f"{ending}: {what}")
