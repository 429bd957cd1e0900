"""Which path a GPU's product takes: a pure function of measurements, and of a default threshold without them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq import cache
from llmpq.kernels import gemm_path
from llmpq.kernels.gemm_path import LEAST_M, GemmPath, GemmPathTable, default_threshold, dequantize_min_rows, is_fused
from llmpq.kernels.registry import load
from llmpq.measure import gemm_paths as measuring
from llmpq.measure.gemm_paths import crossing, missing
from llmpq.spec import W16, Precision, UsageError
from tests.support.planner_instances import model

SM80, SM75 = (8, 0), (7, 5)
W3, W4 = Precision(3, 128), Precision(4, 128)
ROWS = (
    GemmPath("cuda", 4, 128, 4096, 4096, 256),
    GemmPath("cuda", 4, 128, 16384, 4096, None),
    GemmPath("cuda", 3, 128, 4096, 4096, 1024),
    GemmPath("triton", 4, 128, 4096, 4096, 64),
)
TABLE = GemmPathTable("a GPU", SM80, "kernels", "torch", "2026-11-25", ROWS)
GPU = torch.device("cuda", 0)


def found(
    table: GemmPathTable | None, key: tuple[str, Precision, int, int], dtype: torch.dtype = torch.float16
) -> float:
    return dequantize_min_rows(table, SM80, dtype, *key)


def test_a_measured_shape_has_its_own_answer() -> None:
    assert found(TABLE, ("cuda", W4, 4096, 4096)) == 256
    assert found(TABLE, ("cuda", W4, 16384, 4096)) == math.inf
    assert found(TABLE, ("cuda", W3, 4096, 4096)) == 1024
    assert found(TABLE, ("triton", W4, 4096, 4096)) == 64


@pytest.mark.parametrize(
    ("n", "k", "answer"),
    [
        (5000, 5000, 256),
        (1, 1, 256),
        (8000, 4096, 256),  # just below the geometric mean of 4096 and 16384, which is halfway
        (8400, 4096, math.inf),
        (16384, 1024, math.inf),  # a quarter in k; the other is a quarter in both
        (8192, 4096, 256),  # halfway: the smaller
    ],
)
def test_another_shape_has_the_answer_of_the_nearest_by_ratio(n: int, k: int, answer: float) -> None:
    assert found(TABLE, ("cuda", W4, n, k)) == answer
    reordered = GemmPathTable(*(getattr(TABLE, f) for f in TABLE.__dataclass_fields__ if f != "rows"), rows=ROWS[::-1])
    assert found(reordered, ("cuda", W4, n, k)) == answer


def test_shapes_that_were_not_measured_have_the_default_threshold() -> None:
    for table, key in (
        (None, ("cuda", W4, 4096, 4096)),
        (TABLE, ("cuda", Precision(4, 32), 4096, 4096)),
        (TABLE, ("cuda", Precision(8, 128), 4096, 4096)),
    ):
        assert found(table, key) == default_threshold(SM80, torch.float16)
    # What is measured is 16-bit x on tensor cores.
    assert found(TABLE, ("cuda", W4, 4096, 4096), torch.float32) == default_threshold(SM80, torch.float32)
    assert dequantize_min_rows(TABLE, SM75, torch.bfloat16, "cuda", W4, 4096, 4096) == default_threshold(
        SM75, torch.bfloat16
    )


def test_the_default_threshold_is_lower_without_tensor_cores() -> None:
    assert (
        default_threshold(SM80, torch.float16)
        == default_threshold(SM80, torch.bfloat16)
        == default_threshold(SM75, torch.float16)
    )
    for slow in (default_threshold(SM75, torch.bfloat16), default_threshold(SM80, torch.float32)):
        assert LEAST_M <= slow < default_threshold(SM80, torch.float16)


def test_a_table_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    assert GemmPathTable.load(tmp_path / "table.json") == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "llmpq.routes/2"}, "schema: is 'llmpq.routes/2'; this version of llmpq reads 'llmpq.routes/1'"),
        ({"rows": [{"backend": "cuda"}]}, r"rows\[0\].bits: is missing"),
        (
            {"rows": [{**ROWS[0].to_dict(), "dequantize_min_rows": 8}]},
            "dequantize_min_rows: is 8, expected at least 16",
        ),
        ({"rows": [{**ROWS[0].to_dict(), "n": 0}]}, "n: is 0, expected 1 to"),
    ],
)
def test_a_broken_table_is_one_clear_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**TABLE.to_dict(), **change}))
    with pytest.raises(UsageError, match=message) as error:
        GemmPathTable.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as routes can tell, there is a GPU; its cache is empty."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA a/b 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: SM80)
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMPQ_BATCH_INVARIANT", raising=False)
    gemm_path.forget()
    yield
    gemm_path.forget()


def test_a_product_takes_the_path_that_was_measured_as_faster(gpu: None) -> None:
    cache.keep_record(gemm_path.KIND, gemm_path.table_key(GPU), TABLE)
    fused = {m: is_fused(GPU, "cuda", W4, m, 4096, 4096, torch.float16) for m in (1, 64, 255, 256, 4096)}
    assert fused == {1: True, 64: True, 255: True, 256: False, 4096: False}
    assert is_fused(GPU, "cuda", W4, 10**6, 16384, 4096, torch.float16)
    assert not is_fused(GPU, "cuda", W3, 1024, 4096, 4096, torch.float16)
    assert not is_fused(GPU, "cuda", W4, LEAST_M, 4096, 4096, torch.float32)


def test_without_a_measurement_the_default_threshold_decides(gpu: None) -> None:
    m = default_threshold(SM80, torch.bfloat16)
    assert is_fused(GPU, "cuda", W4, m - 1, 64, 64, torch.bfloat16)
    assert not is_fused(GPU, "cuda", W4, m, 64, 64, torch.bfloat16)


def test_other_kernels_and_another_torch_do_not_see_the_table(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {gemm_path.table_key(GPU)}
    monkeypatch.setattr(gemm_path, "version", lambda: "0123456789ab")
    keys.add(gemm_path.table_key(GPU))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(gemm_path.table_key(GPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    keys.add(gemm_path.table_key(GPU))
    assert len(keys) == 4


def test_batch_invariance_takes_the_fused_kernel_at_every_m(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_fused(GPU, "cuda", W4, 10**6, 64, 64, torch.float16)
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "1")
    assert is_fused(GPU, "cuda", W4, 10**6, 64, 64, torch.float16)
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "0")
    assert not is_fused(GPU, "cuda", W4, 10**6, 64, 64, torch.float16)


def test_what_is_measured_is_the_fused_kernel_that_would_be_taken(gpu: None) -> None:
    with gemm_path.always_fused():
        assert is_fused(GPU, "cuda", W4, 10**6, 64, 64, torch.float16)
        assert not gemm_path.is_batch_invariant()
    assert not is_fused(GPU, "cuda", W4, 10**6, 64, 64, torch.float16)


def test_decoding_reads_no_table_and_a_damaged_one_is_none(gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    cache.keep(gemm_path.KIND, gemm_path.table_key(GPU), lambda folder: (folder / "record.json").write_text("{"))
    assert is_fused(GPU, "cuda", W4, LEAST_M - 1, 64, 64, torch.float16)
    assert not caplog.messages
    m = default_threshold(SM80, torch.float16)
    assert is_fused(GPU, "cuda", W4, m - 1, 64, 64, torch.float16)
    assert not is_fused(GPU, "cuda", W4, m, 64, 64, torch.float16)
    assert len(caplog.messages) == 1


def test_triton_s_interpreter_never_dequantizes() -> None:
    assert is_fused(torch.device("cpu"), "triton", W4, 10**6, 64, 64, torch.float16)


@pytest.mark.parametrize(
    ("fused", "dequantized", "least"),
    [
        ((1, 2, 4, 8), (3, 3, 3, 4), 64),
        ((1, 2, 4, 8), (3, 3, 5, 4), 128),
        ((1, 2, 4, 8), (0.5, 3, 5, 9), None),  # a lucky moment at a small m does not count
        ((1, 2, 4, 8), (0.5, 1, 2, 4), 16),
        ((1, 2, 4, 8), (1, 2, 4, 8), None),  # as fast is not faster
    ],
)
def test_gemm_paths_cross_where_one_stays_faster(
    fused: tuple[float, ...], dequantized: tuple[float, ...], least: int | None
) -> None:
    ms = (16, 32, 64, 128)
    assert crossing(dict(zip(ms, fused, strict=True)), dict(zip(ms, dequantized, strict=True))) == least


@given(st.dictionaries(st.sampled_from(measuring.ROWS), st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1))
def test_the_crossing_is_the_least_m_with_all_above_it_faster(times: dict[int, tuple[int, int]]) -> None:
    fused, dequantized = {m: t[0] for m, t in times.items()}, {m: t[1] for m, t in times.items()}
    candidates = [m for m in times if all(dequantized[other] < fused[other] for other in times if other >= m)]
    assert crossing(fused, dequantized) == min(candidates, default=None)


def test_only_unknown_shapes_with_two_gemm_paths_are_measured() -> None:
    if isinstance(reason := load("triton"), str):
        pytest.skip(reason)
    spec = model()
    shapes = {(shape.n, shape.k) for shape in spec.linears("layer.0").values()}
    precisions = (W3, W4, W16)
    empty = GemmPathTable("a GPU", SM80, "kernels", "torch", "2026-11-25", ())
    wanted = missing(empty, spec, precisions, lambda precision: "triton")
    assert [p for p, _ in wanted] == [W3] * len(shapes) + [W4] * len(shapes)
    assert {(s.n, s.k) for _, s in wanted} == shapes
    assert missing(empty, spec, precisions, lambda precision: "reference") == []
    first = wanted[0][1]
    known = GemmPathTable(
        "a GPU", SM80, "kernels", "torch", "2026-11-25", (GemmPath("triton", 3, 128, first.n, first.k, None),)
    )
    assert missing(known, spec, precisions, lambda precision: "triton") == wanted[1:]
