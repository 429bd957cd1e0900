"""What happened when, or is expected to: the steps of a pipeline's stages and links, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llmpq.spec.record import Record, check

Phase = Literal["prefill", "decode"]
SPANS_KEPT = 10_000  # of each stage and of each link: a run may have millions of steps


@dataclass(frozen=True, slots=True)
class Span(Record):
    """One micro-batch on one stage or link. Seconds count from the start of the first prefill."""

    kind: Literal["stage", "link"]
    index: int  # of the stage, or of the stage that the link leads from; the last one's leads back to the first
    phase: Phase
    sequences: int
    tokens: int
    start_s: float
    end_s: float

    def validate(self) -> None:
        check(self.end_s >= self.start_s, "end_s", f"is {self.end_s}, before start_s = {self.start_s}")

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class SpanLog:
    """Spans in the order they are added; of each stage and of each link the first SPANS_KEPT alone."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._counts: Counter[tuple[str, int]] = Counter()

    def add(self, span: Span) -> None:
        self._counts[span.kind, span.index] += 1
        if self._counts[span.kind, span.index] <= SPANS_KEPT:
            self._spans.append(span)

    def take(self) -> list[Span]:
        """What is kept; the log is empty then."""
        spans, self._spans = self._spans, []
        self._counts.clear()
        return spans


@dataclass(frozen=True, slots=True)
class Busy:
    """What a stage did in one phase: its steps, the seconds it was at them, and those from its first to its last."""

    steps: int
    seconds: float
    wall_s: float

    @property
    def share(self) -> float:
        return self.seconds / self.wall_s if self.wall_s > 0 else 0.0


def busy(spans: Iterable[Span], stage: int, phase: Phase) -> Busy:
    """What stage `stage` did in `phase`."""
    own = [span for span in spans if (span.kind, span.index, span.phase) == ("stage", stage, phase)]
    if not own:
        return Busy(0, 0.0, 0.0)
    wall_s = max(span.end_s for span in own) - min(span.start_s for span in own)
    return Busy(len(own), sum(span.seconds for span in own), wall_s)
