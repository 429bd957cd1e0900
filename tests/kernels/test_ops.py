"""Attention and norms against float64, and what must hold exactly. Embedding is in test_gemm.py: it reads weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from llmpq.kernels import attention, available_backends, layer_norm, rms_norm
from tests.support.reference import attention_float64, clean, finite, layer_norm_float64, rms_norm_float64

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp of results of size 1
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)


@pytest.fixture(params=["reference", "cpu"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention and norms of both backends that have them."""
    if reason := available_backends()[request.param]:
        pytest.skip(f"backend {request.param} is not available: {reason}")
    monkeypatch.setenv("LLMPQ_BACKEND", request.param)
    return str(request.param)


@dataclass(frozen=True)
class Batch:
    """Packed sequences and their cache, all positions of which that must not be read hold NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]

    @classmethod
    def random(
        cls,
        lens: list[tuple[int, int, int]],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """`lens`: slot, query_len and context_len of each sequence."""
        slots, query_lens, context_lens = (list(column) for column in zip(*lens, strict=True))
        shape = (max(slots) + 2, kv_heads, max(context_lens) + 3, head_dim)
        k_cache, v_cache = (torch.full(shape, float("nan")) for _ in range(2))
        for slot, context in zip(slots, context_lens, strict=True):
            for cache in (k_cache, v_cache):
                cache[slot, :, :context] = torch.randn(kv_heads, context, head_dim)
        q = torch.randn(sum(query_lens), heads, head_dim)
        return cls(q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), slots, query_lens, context_lens)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def sequence(self, s: int, first: int, count: int) -> torch.Tensor:
        """The attention of `count` queries of one sequence from its query `first` on, alone."""
        start = sum(self.query_lens[:s]) + first
        context = self.context_lens[s] - self.query_lens[s] + first + count
        lens = (torch.tensor([v], dtype=torch.int32) for v in (self.slots[s], count, context))
        return attention(self.q[start : start + count], self.k_cache, self.v_cache, *lens, self.scale)

    def run(self) -> torch.Tensor:
        lens = (torch.tensor(v, dtype=torch.int32) for v in (self.slots, self.query_lens, self.context_lens))
        return attention(self.q, self.k_cache, self.v_cache, *lens, self.scale)

    def float64(self) -> torch.Tensor:
        return attention_float64(
            self.q, self.k_cache, self.v_cache, self.slots, self.query_lens, self.context_lens, self.scale
        )


BATCHES = {
    "one-token": [(0, 1, 1)],
    "prefill": [(1, 7, 7)],
    "decode": [(3, 1, 40), (0, 1, 17), (1, 1, 1)],
    "continued-prefill": [(2, 5, 33), (0, 16, 20)],
    "mixed": [(4, 1, 70), (1, 19, 19), (0, 3, 65), (2, 1, 2)],
}
batches = pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES.keys())


@batches
@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (9, 3, 64), (6, 1, 20), (2, 2, 80), (3, 1, 1)])
def test_attention_matches_float64(
    operations: str, lens: list[tuple[int, int, int]], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    batch = Batch.random(lens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    found = batch.run()
    assert found.shape == batch.q.shape and found.dtype == dtype
    error = (found.double() - batch.float64()).abs().max()
    assert error <= 4 * DTYPES[dtype]


def test_attention_to_a_long_context_matches_float64(operations: str) -> None:
    batch = Batch.random([(0, 2, 1500), (1, 1, 1025)], heads=4, kv_heads=2, head_dim=32)
    assert (batch.run().double() - batch.float64()).abs().max() <= 8e-6


def test_attention_survives_scores_of_any_size(operations: str) -> None:
    batch = Batch.random(BATCHES["mixed"])
    batch.q.mul_(200)  # exp of the scores themselves overflows
    batch.q[0] = -batch.q[0]
    found = batch.run()
    assert found.isfinite().all()
    assert (found.double() - batch.float64()).abs().max() <= 2e-4


@batches
def test_a_sequence_s_attention_has_the_same_bits_alone(operations: str, lens: list[tuple[int, int, int]]) -> None:
    batch = Batch.random(lens)
    whole = batch.run()
    start = 0
    for s, queries in enumerate(batch.query_lens):
        assert torch.equal(batch.sequence(s, 0, queries), whole[start : start + queries])
        start += queries


@batches
def test_a_query_s_attention_has_the_same_bits_in_any_chunk(operations: str, lens: list[tuple[int, int, int]]) -> None:
    if operations == "reference":
        pytest.skip("its matrix products take all queries of a sequence at once")
    batch = Batch.random(lens)
    whole = batch.run()
    start = 0
    for s, queries in enumerate(batch.query_lens):
        for first in range(queries):
            assert torch.equal(batch.sequence(s, first, 1)[0], whole[start + first])
        start += queries


def test_attention_bits_do_not_depend_on_the_number_of_threads(operations: str, threads: None) -> None:
    batch = Batch.random([(0, 1, 300), (1, 40, 90), (2, 1, 7)], heads=9, kv_heads=3, head_dim=64)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(batch.run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_attention_takes_q_and_cache_as_strided_views(operations: str) -> None:
    batch = Batch.random(BATCHES["mixed"], heads=6, kv_heads=2, head_dim=16)
    t = len(batch.q)
    fused = torch.full((t, 200), float("nan"))
    fused[:, 40 : 40 + 96] = batch.q.view(t, 96)
    both = torch.stack([batch.k_cache, batch.v_cache], dim=1)
    views = Batch(
        fused[:, 40 : 40 + 96].unflatten(1, (6, 16)),
        both[:, 0],
        both[:, 1],
        batch.slots,
        batch.query_lens,
        batch.context_lens,
    )
    assert torch.equal(views.run(), batch.run())


def test_attention_of_no_sequences_is_empty(operations: str) -> None:
    none = torch.empty(0, dtype=torch.int32)
    cache = torch.zeros(1, 2, 4, 8)
    assert attention(torch.empty(0, 4, 8), cache, cache, none, none, none, 1.0).shape == (0, 4, 8)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 32)}, r"q is .* expected floating-point \[t, heads, d\]"),
        ({"q": torch.zeros(3, 4, 8, dtype=torch.int32)}, "q is torch.int32"),
        ({"q": torch.zeros(3, 5, 8)}, "q has 5 heads, which 2 kv_heads do not divide"),
        ({"q": torch.zeros(4, 4, 8)}, "q has 4 tokens, but query_lens say 3"),
        ({"k_cache": torch.zeros(2, 2, 6, 9)}, r"k_cache has shape .* expected \[slots, kv_heads, max_len, 8\]"),
        ({"v_cache": torch.zeros(2, 2, 5, 8)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(2, 2, 6, 8, dtype=torch.float16)}, "v_cache is torch.float16"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots is torch.int64"),
        ({"query_lens": ints(3)}, r"query_lens is .* expected int32 \[2\]"),
        ({"context_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "context_lens is .* on meta"),
        ({"slots": ints(0, 2)}, "slots names 2, but the cache has 2"),
        ({"slots": ints(0, -1)}, "slots names -1"),
        ({"query_lens": ints(2, 0)}, "say 0 and 1, expected 0 < query_len <= context_len <= 6"),
        ({"context_lens": ints(1, 1)}, "say 2 and 1, expected"),
        ({"context_lens": ints(2, 7)}, "say 1 and 7, expected"),
    ],
)
def test_attention_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "q": torch.zeros(3, 4, 8),
        "k_cache": torch.zeros(2, 2, 6, 8),
        "v_cache": torch.zeros(2, 2, 6, 8),
        "slots": ints(0, 1),
        "query_lens": ints(2, 1),
        "context_lens": ints(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        attention(**{**good, **change}, scale=1.0)


SIZES = [1, 8, 33, 576, 4096]


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_matches_float64(operations: str, dtype: torch.dtype, size: int, eps: float) -> None:
    x = (torch.randn(7, size) * torch.logspace(-3, 2, 7)[:, None]).to(dtype)
    weight = torch.randn(size)
    found, exact = rms_norm(x, weight, eps), rms_norm_float64(x, weight, eps)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 1.01 * DTYPES[dtype] * exact.abs() + 1e-7).all()


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_matches_float64(operations: str, dtype: torch.dtype, size: int, eps: float) -> None:
    x = (torch.randn(7, size) * torch.logspace(-3, 2, 7)[:, None] + 3).to(dtype)
    weight, bias = torch.randn(size), torch.randn(size)
    found, exact = layer_norm(x, weight, bias, eps), layer_norm_float64(x, weight, bias, eps)
    # The native error is part of the limit: x less its mean loses digits that float32 does not have.
    native = finite(F.layer_norm(clean(x.float()), (size,), weight, bias, eps)).double()
    assert found.dtype == dtype
    limit = 1.01 * DTYPES[dtype] * exact.abs() + 2 * (native - exact).abs().max() + 1e-6
    assert ((found.double() - exact).abs() <= limit).all()


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_a_normed_row_has_the_same_bits_whatever_its_neighbours_and_the_threads(
    operations: str, threads: None, dtype: torch.dtype, size: int
) -> None:
    x = torch.randn(130, size).to(dtype)
    weight, bias = torch.randn(size), torch.randn(size)
    for norm in (lambda x: rms_norm(x, weight, 1e-5), lambda x: layer_norm(x, weight, bias, 1e-5)):
        torch.set_num_threads(1)
        whole = norm(x)
        torch.set_num_threads(2)
        assert torch.equal(norm(x), whole)
        for start, stop in ((0, 1), (5, 6), (3, 10), (64, 129), (129, 130)):
            assert torch.equal(norm(x[start:stop]), whole[start:stop])
        assert torch.equal(norm(x.view(2, 65, size)), whole.view(2, 65, size))
        assert torch.equal(norm(x[::2]), whole[::2])
        assert torch.equal(norm(x[7]), whole[7])


def test_norms_of_no_rows_are_empty(operations: str) -> None:
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert rms_norm(x, weight, 1e-5).shape == layer_norm(x, weight, weight, 1e-5).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(9), r"weight is .* \[9\] on cpu, expected floating-point \[8\] on cpu"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.int32), "weight is torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), "weight is .* on meta"),
        (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8), "x is torch.int64"),
        (torch.zeros(()), torch.zeros(8), "x is"),
    ],
)
def test_norms_refuse(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, torch.zeros(x.shape[-1:]), 1e-5)
