"""What a stage on a GPU needs beside weights and cache: the terms are there, grow as they should, and hold."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq import hardware
from llmpq.kernels import CacheLayer, Sequences
from llmpq.kernels.backends import dense, reference
from llmpq.quant import CHUNK, quantize
from llmpq.quant.tensor import GPU_CHUNK
from llmpq.spec import Cluster, Device, Precision
from llmpq.spec.layers import KV_BLOCK, blocks_for
from planner import memory
from planner.memory import CacheSize, StageBuffers
from tests.support.live_bytes import LiveBytes
from tests.support.planner_instances import model

SPEC = model(num_layers=4)
GPU, CPU = Device("cuda0", "cuda"), Device("cpu0", "cpu")
CACHE = CacheSize(4, 600, 300, 40)


def size(
    tokens: int = 8,
    rows: int = 4,
    neighbours: int = 0,
    cache: CacheSize = CACHE,
    *,
    device: Device = GPU,
    backend: str | None = "triton",
) -> int:
    return StageBuffers(tokens, rows, "bfloat16", neighbours, False, cache).size(SPEC, device, backend)


def test_a_gpu_has_terms_of_its_own() -> None:
    hidden = SPEC.hidden_size
    assert size() > size(tokens=8, rows=0) > memory.MODULE_BYTES + memory.PRODUCT_SCRATCH
    link = size(neighbours=1) - size()
    assert link == memory.NCCL_BYTES + memory.WIRE_BUFFERS * 8 * hidden * 2
    assert size(neighbours=2) - size() == 2 * link
    assert max(size(device=CPU), size(backend="by hand"), size(backend=None)) < 2**20  # nothing of the kind
    short, longer, longest = (size(cache=CacheSize(4, length, 64, 4)) for length in (128, 1024, 10**6))
    assert short < longer < longest == size(cache=CacheSize(4, 128 * 32, 64, 4))  # so many parts, and no more
    # Sums and two numbers for each sequence, head and part: of an eager step, and of those in graphs.
    assert longer - short == 2 * 4 * SPEC.num_heads * 7 * (SPEC.head_dim + 2) * 4
    assert memory.PRODUCT_SCRATCH == dense.SCRATCH_BYTES


@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([CPU, GPU, replace(GPU, members=2)]),
    st.sampled_from([None, "triton", "reference"]),
)
def test_buffers_are_linear_in_tokens_and_rows_and_never_shrink(
    tokens: int, rows: int, neighbours: int, head: bool, device: Device, backend: str | None
) -> None:
    buffers = StageBuffers(0, 0, "float32", neighbours, head, CACHE)
    none, token, row, all_of_them = (
        replace(buffers, tokens=t, rows=r).size(SPEC, device, backend)
        for t, r in ((0, 0), (1, 0), (0, 1), (tokens, rows))
    )
    assert all_of_them == none + tokens * (token - none) + rows * (row - none)
    assert token > none and row >= none


@pytest.mark.parametrize(
    ("queries", "context", "step"), [(300, 300, 300), (1, 600, 1), (64, 64, 64), (1, 64, 1), (600, 600, 300)]
)
def test_the_reference_backend_s_attention_fits_its_scratch(queries: int, context: int, step: int) -> None:
    """Of the most tokens that a prompt has; of those of a slot, where blocks may run out."""
    heads, kv_heads, head_dim = SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim
    cache = CacheSize(4, max(context, 64), step, 39 if queries > step else 40)
    blocks = blocks_for(cache.length)
    kept = torch.zeros(kv_heads, 4 * blocks, KV_BLOCK, head_dim, dtype=torch.bfloat16)
    lens = [torch.tensor([n], dtype=torch.int32) for n in (2, queries, context)]
    q = torch.randn(queries, heads, head_dim).bfloat16()
    layer = CacheLayer("reference", kept, kept.clone(), cache.length, head_dim, blocks)
    with LiveBytes() as live:
        reference.attention(q, layer, Sequences(*lens), 0.5, torch.empty_like(q))
    planned = memory.reference_scratch(SPEC, cache)
    assert 0.5 * planned < live.peak <= planned
    longer = CacheSize(4, 5000, 900, 4 * blocks_for(5000))
    more = memory.reference_scratch(SPEC, longer) - planned
    assert size(cache=longer, backend="reference") - size(cache=cache, backend="reference") == more > 0


@pytest.mark.parametrize(
    "precision", [Precision(3, 128, "asym"), Precision(4, 32), Precision(8, 128, "offset")], ids=str
)
def test_loading_takes_no_more_than_the_scratch_of_products(precision: Precision) -> None:
    weight, ratio = torch.randn(CHUNK // 1024, 1024).bfloat16(), GPU_CHUNK // CHUNK
    with LiveBytes() as live:
        quantize(weight, precision)
    read = 3 * weight.nbytes  # the portion, and the next one in parts and put together
    assert 2**26 < ratio * (live.peak + read) <= memory.PRODUCT_SCRATCH


def test_devices_on_one_gpu_share_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 2, mem_get_info=lambda i: free[i]))
    )
    free = {0: (80 * 2**30, 0), 1: (40 * 2**30, 0)}
    gpus = Cluster((GPU, Device("b", "cuda"), Device("c", "cuda", memory_bytes=2**33), Device("d", "cuda", index=1)))
    a, b, c, d = (device.memory_bytes or 0 for device in hardware.with_memory(gpus).devices)
    assert a == b and c == 2**33
    assert 0.85 * 80 * 2**30 < a + b + c < 0.9 * 80 * 2**30 - 3 * 2**28
    assert 0.85 * 40 * 2**30 < d < 0.9 * 40 * 2**30
