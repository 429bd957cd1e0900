"""What the benchmark of queues makes of a run."""

from __future__ import annotations

import pytest

from bench.plans.queues import OUTPUTS, PROMPTS, busiest, queue
from llmpq.spec import RequestTimes, Span


def test_lengths_of_the_queue() -> None:
    lengths = queue(200)
    for column, (least, most) in zip(zip(*lengths, strict=True), (PROMPTS, OUTPUTS), strict=True):
        assert min(column) >= least and max(column) < most and max(column) > 4 * min(column)


def test_the_busiest_stage_of_the_steady_state() -> None:
    """From 2 s, when the first answer ends, to 6 s, when the last request has its first token."""
    times = [RequestTimes(0.0, 1.0, 2.0, 3), RequestTimes(0.0, 6.0, 9.0, 3)]

    def at_work(stage: int, *spans: tuple[float, float]) -> list[Span]:
        return [Span("stage", stage, "decode", 1, 1, start, end) for start, end in spans]

    spans = [*at_work(0, (0, 3), (5, 7)), *at_work(1, (2.5, 3.5), (4, 5.5)), Span("link", 0, "decode", 1, 1, 0, 9)]
    assert busiest(spans, times, 2) == pytest.approx(2.5 / 4)
