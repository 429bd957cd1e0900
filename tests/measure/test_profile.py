"""Profiles: that they cover what a planner asks, come from real workers, and are measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.kernels.rivals.measure_gpu import rotated_bytes
from llmpq import kernels
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.kernels import gemm_path
from llmpq.measure import profiling as module
from llmpq.measure.cases import CPU_COLD_BYTES, Cases, cold_bytes
from llmpq.measure.operation_clock import Clock
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.measure.profiling import connection, fit_line, profile
from llmpq.progress import Notify, silent
from llmpq.spec import (
    W16,
    Cluster,
    Context,
    CostRow,
    CostTable,
    Device,
    Experts,
    KvBits,
    LayerKind,
    Link,
    ModelSpec,
    NotMeasuredError,
    Op,
    Precision,
    Profile,
    UsageError,
    Workload,
    unit_ops,
)
from tests.support.planner_instances import model
from tests.support.tiny_models import save_model

SPEC, CPU = model(), torch.device("cpu")
PRECISIONS = (Precision(4, 32), W16)
EITHER: tuple[KvBits, ...] = (16, 8)  # KV caches
CLUSTER = Cluster((Device("slow", "cpu", isa="portable"), Device("fast", "cpu")))
WORKLOAD = Workload(batch_size=3, prompt_len=5, output_len=4, max_prompt_len=7)


def asked(spec: ModelSpec, workload: Workload) -> list[Op]:
    """Every operation that a planner may ask the cost of, at every micro-batch size."""
    ops = [Op("step")]
    for unit in spec.distinct_units:
        for precision in PRECISIONS:
            for size in range(1, workload.batch_size + 1):
                for length in {workload.prompt_len, workload.longest_prompt}:
                    ops += unit_ops(spec, unit, precision, "a8", size * length, size, Context.of_prompts(length))
                for keys in (workload.prompt_len + workload.output_len / 2, workload.max_length):
                    ops += unit_ops(spec, unit, precision, "a8", size, size, Context.of(keys))
    return ops


@given(
    st.builds(
        lambda batch, prompt, more, output: Workload(batch, prompt, output, prompt + more),
        st.integers(1, 40),
        st.integers(1, 300),
        st.integers(0, 200),
        st.integers(1, 100),
    ),
    st.lists(st.one_of(st.none(), st.integers(1, 300)), min_size=1, max_size=SPEC.num_layers),
    st.sampled_from([1, gemm_path.ROW_TILE]),
    st.sampled_from([None, Experts(6, 2, 48, True), Experts(4, 3, 128, False, shared_size=32)]),
)
def test_all_that_a_planner_asks_is_measured(
    workload: Workload, windows: list[int | None], row_tile: int, experts: Experts | None
) -> None:
    kinds = [LayerKind(window, experts=experts if i else None) for i, window in enumerate(windows)]
    spec = replace(SPEC, layer_kinds=tuple(kinds))
    ranges = Ranges.of(workload)
    ops = [*plain_ops(spec, ranges, PRECISIONS, "a8"), *attention_ops(spec, ranges)]
    rows = tuple(CostRow(op, 1.0, "cpu", "float32", 0) for op in ops)
    table = CostTable("d", "k", 1, None, 0, rows, row_tile=row_tile)
    assert {table.seconds(op) for op in asked(spec, workload)} == {1.0}
    with pytest.raises(NotMeasuredError):
        table.seconds(Op("step", m=2))
    beyond = 2 * ranges.tokens
    with pytest.raises(NotMeasuredError):
        table.seconds(Op("layer_rest", beyond, SPEC.hidden_size, SPEC.intermediate_size))


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 400)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from([None, 20, 150]),
    st.data(),
)
def test_steps_of_reused_and_recomputed_prompts_are_measured(
    lengths: list[tuple[int, int]], batch: int, window: int | None, data: st.DataObject
) -> None:
    """Of some sequences any tokens up to the longest there may be; none has more new ones than a step has room for."""
    workload = Workload.of_lengths(batch, lengths)
    spec = replace(SPEC, layer_kinds=(LayerKind(window), LayerKind()))
    ranges = Ranges.of(workload)
    rows = tuple(CostRow(op, 1.0, "cpu", "float32", 0) for op in attention_ops(spec, ranges))
    table = CostTable("d", "k", 1, None, 0, rows)
    left, longest = workload.largest_prefill(batch), workload.max_length
    assert left >= longest or not workload.recomputes
    new = longest if workload.recomputes else workload.longest_prompt
    spans: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, batch))):
        tokens = data.draw(st.integers(1, min(left, new)))
        start = data.draw(st.integers(0, longest - tokens))
        spans.append((start + 1, start + tokens))
        left -= tokens
        if not left:
            break
    total = sum(end - start + 1 for start, end in spans)
    ops = unit_ops(spec, "layer.0", W16, "a8", total, len(spans), Context(tuple(spans)))
    assert [table.seconds(op) for op in ops if op.kind == "attention"] == [1.0]


def test_contexts_beyond_prompts_take_no_more_passes_than_there_are_widths_by_default() -> None:
    at = [op.m for op in attention_ops(SPEC, Ranges.of(Workload(8, 40, 64)))]
    assert max(map(at.count, at)) <= 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shared", [0, 32])
def test_layers_of_experts_are_timed_beside_others(shared: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", backend)
    kinds = LayerKind(experts=Experts(4, 2, 48, True, shared)), LayerKind()
    spec, ranges, device = replace(model(2), layer_kinds=kinds), Ranges(2, 4, 8, 8), torch.device("cpu")
    with torch.inference_mode():
        cases = Cases(spec, ranges, device, Clock(device), kv_bits=EITHER).all(PRECISIONS, "a16")
        timed = {op: seconds for case in cases for op, seconds in zip(case.ops, case.timed(0), strict=True)}
    assert timed.keys() == {*plain_ops(spec, ranges, PRECISIONS, "a16"), *attention_ops(spec, ranges, EITHER)}
    assert {op.kv_bits for op in timed if op.kind == "attention"} == {16, 8}
    assert all(seconds > 0 for seconds in timed.values())


def test_attention_is_timed_over_the_cache_it_is_named_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    attention, seen = kernels.attention, set[torch.dtype]()

    def noted(q: torch.Tensor, cache: kernels.CacheLayer, *more: Any, **options: Any) -> torch.Tensor:
        seen.add(cache.keys.dtype)
        return attention(q, cache, *more, **options)

    monkeypatch.setattr(kernels, "attention", noted)
    with torch.inference_mode():
        for case in Cases(SPEC, Ranges(2, 4, 8, 8), CPU, Clock(CPU), kv_bits=EITHER).all(PRECISIONS, "a16"):
            if bits := {op.kv_bits for op in case.ops if op.kind == "attention"}:
                seen.clear()
                case.timed(0)
                assert seen == {torch.int8 if bits == {8} else torch.float16}


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 100))
def test_attention_is_timed_over_the_contexts_it_is_named_by(batch: int, prompt: int, output: int) -> None:
    ranges = Ranges.of(Workload(batch, prompt, output))
    for op, (query_lens, context_lens) in attention_ops(SPEC, ranges).items():
        seen = [c - q + 1 + i for q, c in zip(query_lens, context_lens, strict=True) for i in range(q)]
        assert len(seen) == op.m
        assert op.context == pytest.approx(sum(seen) / op.m)
        assert min(seen) >= 1
        assert max(context_lens) <= ranges.positions


def test_a_gpu_reads_four_times_its_cache_before_it_reads_anything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=60 * 2**20))
    assert cold_bytes(torch.device("cuda", 0)) == rotated_bytes(60 * 2**20) == 240 * 2**20
    assert cold_bytes(torch.device("cpu")) == CPU_COLD_BYTES


def measure(spec: ModelSpec, cluster: Cluster = CLUSTER, notify: Notify = silent, **changes: Any) -> Profile:
    options = {"group_size": 32, "activations": "a8", "bits": (16, 4)} | changes
    return profile(spec, cluster, WORKLOAD, notify=notify, **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Profile, Path]:
    """A profile of a tiny model by real workers, and the cache it is in."""
    folder = tmp_path_factory.mktemp("profile")
    save_model(folder / "model", "llama-tied", num_hidden_layers=2)
    spec = load_spec(resolve(str(folder / "model")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPQ_CACHE", str(folder / "cache"))
        told: dict[str, list[float]] = {}

        def notify(text: str, share: float | None = None, /) -> None:
            assert share is not None
            told.setdefault(text, []).append(share)

        result = measure(spec, notify=notify)
    starting, operations, links = told.values()
    assert starting == [0.0, 0.5, 1.0]
    assert operations == sorted(operations) and operations[0] == 0.0 and operations[-1] == 1.0
    assert links == [0.0, 0.5]  # before each of both ways
    return spec, result, folder / "cache"


def test_workers_measure_every_device_and_both_ways_of_each_link(measured: tuple[ModelSpec, Profile, Path]) -> None:
    spec, result, _ = measured
    assert set(result.tables) == {"slow", "fast"}
    assert result.table("slow").isa == "portable"
    for table in result.tables.values():
        assert all(table.seconds(op) >= 0 for op in asked(spec, WORKLOAD))
        assert all(row.seconds > 0 for row in table.rows)
        assert len({row.op for row in table.rows}) == len(table.rows)
        assert 0 <= table.overhead_bytes < 2**28
        assert table.threads == 1
    assert {(link.source, link.target) for link in result.links} == {("slow", "fast"), ("fast", "slow")}
    assert all(link.seconds(0) >= 0 and link.bytes_per_s > 0 for link in result.links)


def test_a_profile_is_the_same_after_writing_and_reading(
    measured: tuple[ModelSpec, Profile, Path], tmp_path: Path
) -> None:
    measured[1].save(tmp_path / "costs.json")
    assert Profile.load(tmp_path / "costs.json") == measured[1]


def test_a_second_time_nothing_is_measured(
    measured: tuple[ModelSpec, Profile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, result, cache = measured
    monkeypatch.setenv("LLMPQ_CACHE", str(cache))

    def refuse(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(module, "WorkerGroup", refuse)
    assert measure(spec, notify=refuse) == result
    # Costs depend neither on names, caps and weights nor on the exact sizes within the same powers of two.
    renamed = Cluster(
        (replace(CLUSTER.devices[0], name="a", memory_bytes=2**30), replace(CLUSTER.devices[1], name="b"))
    )
    alike = profile(
        replace(spec, name="other", content_hash="0"),
        renamed,
        replace(WORKLOAD, prompt_len=6, output_len=5),
        group_size=32,
        activations="a8",
        bits=(4, 16),
    )
    assert alike.table("a") == result.table("slow")
    assert [(link.source, link.target) for link in alike.links] == [("a", "b"), ("b", "a")]
    for change in ({"threads": 2}, {"isa": "avx2"}, {"slowdown": 2.0}):
        other = Cluster((CLUSTER.devices[0], replace(CLUSTER.devices[1], **change)))
        with pytest.raises(AssertionError, match="worker was started"):
            measure(spec, other)
    assert measure(spec, kv_bits=(16,)) == result
    for more in ({"activations": "a8x2"}, {"kv_bits": EITHER}, {"kv_bits": (8,)}):
        with pytest.raises(AssertionError, match="worker was started"):
            measure(spec, **more)


def test_a_slowed_device_is_measured_as_slow_as_it_is_emulated(
    measured: tuple[ModelSpec, Profile, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _, _ = measured
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path))
    cluster = Cluster((Device("slowed", "cpu", slowdown=20.0), Device("real", "cpu")))
    result = measure(spec, replace(cluster, links=(Link("slowed", "real", 1, 1), Link("real", "slowed", 1, 1))))
    totals = [sum(row.seconds for row in result.table(device.name).rows) for device in cluster.devices]
    assert totals[0] > 5 * totals[1]


def test_links_that_the_cluster_gives_are_not_measured(
    measured: tuple[ModelSpec, Profile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _, cache = measured
    monkeypatch.setenv("LLMPQ_CACHE", str(cache))
    given_link = Link("slow", "fast", 0.5, 1e3)
    result = measure(spec, replace(CLUSTER, links=(given_link,)))
    assert result.link("slow", "fast") == given_link
    assert result.link("fast", "slow") != given_link


def test_devices_of_another_host_are_refused() -> None:
    with pytest.raises(UsageError, match="far is on elsewhere"):
        profile(SPEC, Cluster((Device("far", "cpu", host="elsewhere"),)), WORKLOAD, group_size=32)


@given(st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-8))
def test_a_line_is_fitted_exactly(latency: float, per_byte: float) -> None:
    fitted = fit_line([(x, latency + per_byte * x) for x in (4.0, 1e3, 1e5, 1e6)])
    assert fitted == pytest.approx((latency, per_byte), rel=1e-3, abs=1e-15)


def test_a_fitted_line_has_the_least_relative_error_and_no_negative_part() -> None:
    points = [(1.0, 2.0), (2.0, 5.0), (4.0, 6.0), (9.0, 21.0)]
    x, y = np.array(points).T
    best, *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(4), rcond=None)
    assert fit_line(points) == pytest.approx(tuple(best))
    assert fit_line([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)])[1] == 0.0
    assert fit_line([(10.0, 1.0), (20.0, 4.0)])[0] == 0.0


def test_both_ways_and_both_ends_add_up_to_a_message_and_its_answer() -> None:
    ends, whole = (Device("a", "cpu"), Device("b", "cpu")), [(x, 900e-6 + x * 1e-9) for x in (32.0, 1e3, 1e5, 1e6)]
    found = connection(ends, whole, 300e-6, 200e-6)
    assert (found.source_s, found.target_s) == (300e-6, 200e-6)
    for size, seconds in whole:
        ways = found.link.seconds(size) + found.link.seconds(0)
        assert ways + found.source_s + found.target_s == pytest.approx(seconds)
    assert connection(ends, whole, 700e-6, 300e-6).link.latency_s == 0.0  # ends that are at work at the same time
