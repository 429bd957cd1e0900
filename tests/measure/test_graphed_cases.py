"""Operations of decode steps are timed in graphs: which, of how many rows, and that together they are the whole."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import Sequences
from llmpq.measure.cases import Cases, steps
from llmpq.measure.operation_clock import Clock, GraphTimer
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.measure.timing_worker import measure
from llmpq.spec import Precision
from tests.support.graphs import Rerun, read_on_device
from tests.support.planner_instances import model

CPU = torch.device("cpu")
RANGES = Ranges(batch=4, prompt=4, length=8, tokens=8)
PRECISIONS = (Precision(4, 32),)


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on_device(monkeypatch)


@pytest.mark.slow
def test_a_batch_of_rows_is_timed_in_graphs_and_more_are_not() -> None:
    spec, capture = model(), Rerun()
    cases = Cases(spec, RANGES, CPU, Clock(CPU), capture).all(PRECISIONS, "a16")
    rows = measure(cases, "float32", 0.0005, lambda done, total: None)
    assert {row.op for row in rows} == {*plain_ops(spec, RANGES, PRECISIONS, "a16"), *attention_ops(spec, RANGES)}
    assert all(row.seconds > 0 for row in rows)
    for row in rows:
        assert row.graphed == (row.op.m <= RANGES.batch)
    assert set(capture.replayed) == set(range(capture.captured))


def test_parts_are_shares_of_all_copies_without_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of two parts; a mark takes a second, a part 10 and 30, of the second copy 20 and 40."""
    now = [0.0]

    def perf_counter() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr("llmpq.measure.operation_clock.time.perf_counter", perf_counter)
    clock = Clock(CPU)
    found: list[int] = []

    def compute(tokens: torch.Tensor, sequences: Sequences, copy: int) -> None:
        found.append(sequences.tokens)
        now[0] += 10 + 10 * copy
        clock.mark()
        now[0] += 30 + 10 * copy

    timer = GraphTimer(compute, 2, 8, clock, Rerun())
    first, second = timer(steps([1] * 3, [1] * 3, 8))
    # Between marks there are 11, 31, 21 and 41; without those inside, 101 in all.
    assert first == pytest.approx((11 + 21) / 104 * 101 / 2)
    assert second == pytest.approx((31 + 41) / 104 * 101 / 2)
    assert set(found) == {4}  # the rows of the smallest graph for 3 sequences
