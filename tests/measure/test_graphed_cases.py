"""Operations of decode steps are timed in graphs: which, of how many rows, and that together they are the whole."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import Sequences
from llmpq.measure.cases import Cases, steps
from llmpq.measure.operation_clock import Clock, GraphTimer
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.measure.timing_worker import measure
from llmpq.models.decoder_stage import DecoderStage
from llmpq.spec import Experts, LayerKind, Precision
from tests.support.graphs import Rerun, read_on_device
from tests.support.planner_instances import model
from tests.support.specs import tiny_model

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


@pytest.mark.slow
def test_steps_of_a_mixture_are_timed_in_graphs_while_its_pairs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here up to 6, of 2 experts for each token: batches of 1 and 2, since one of 3 takes the graph of 4."""
    monkeypatch.setattr("llmpq.kernels.grouped_pairs", lambda device, precision: 6)
    monkeypatch.delattr(DecoderStage, "capture")  # of a step of the largest batch
    spec, capture = tiny_model(layer_kinds=(LayerKind(experts=Experts(3, 2, 32, False)),)), Rerun()
    cases = Cases(spec, RANGES, CPU, Clock(CPU), capture).all(PRECISIONS, "a16")
    rows = measure(cases, "float32", 0.0005, lambda done, total: None)
    for row in rows:
        if row.op.kind != "step":
            assert row.graphed == (row.op.m <= (4 if row.op.kind == "experts" else 2)), row
    assert not any(row.graphed for row in rows if row.op.kind == "step")
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
