"""Compiles what the Triton backend launches besides products, as it is launched, for GPUs that need not be there.

A program of its own, since in the tests' process Triton interprets:
    python triton_launches.py '[{"operation": "attention", "capability": 90, ...}, ...]'
prints for each case a list with one JSON object for each launch: kernel, grid, registers' spills and shared memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmpq.kernels import CacheLayer, ExpertWeights, PreparedWeight, Sequences
from llmpq.kernels.backends import (
    gpu_layout,
    triton_attention,
    triton_device,
    triton_draw,
    triton_embedding,
    triton_experts,
    triton_gemm,
    triton_kv_cache,
    triton_rows,
)
from llmpq.kernels.rows import ACTIVATIONS
from llmpq.spec import W16, Precision
from llmpq.spec.layers import KV_BLOCK, blocks_for
from tests.support.triton_compilation import count, instructions

MULTIPROCESSORS = 132


class Driver:
    """Of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are kept for each

    def get_current_stream(self, device: int) -> int:
        return 0


def sequences(case: dict[str, Any]) -> Sequences:
    lens = case.get("query_lens", [1])
    columns = (range(len(lens)), lens, [length + case.get("context", 0) for length in lens])
    of = Sequences(*(torch.tensor([*column], dtype=torch.int32) for column in columns))
    if not case.get("tables"):
        return of
    return replace(of, tables=torch.zeros(len(lens), blocks_for(of.longest), dtype=torch.int32))


def tensors(case: dict[str, Any]) -> tuple[torch.Tensor, CacheLayer]:
    """New queries, keys and values, and a cache."""
    of, dtype = sequences(case), getattr(torch, case["dtype"])
    heads, kv_heads, head_dim, max_len = (case[name] for name in ("heads", "kv_heads", "head_dim", "max_len"))
    cached, capacity = getattr(torch, case.get("cache_dtype", case["dtype"])), case.get("capacity", max_len)
    blocks = blocks_for(min(capacity, max_len))
    keys, values = torch.empty(2, kv_heads, len(of.slots) * blocks, KV_BLOCK, head_dim, dtype=cached).unbind()
    scales = torch.empty(2, kv_heads, len(of.slots) * blocks, KV_BLOCK).unbind() if cached == torch.int8 else ()
    qkv = torch.empty(of.tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return qkv, CacheLayer("triton", keys, values, max_len, head_dim, blocks, *scales)


def attention(case: dict[str, Any]) -> None:
    qkv, cache = tensors(case)
    q = qkv[:, : case["heads"]]
    of_heads = {name: torch.empty(case["heads"]) for name in case.get("of_heads", ())}
    options = {name: case.get(name) for name in ("window", "cap")}
    out = torch.empty(q.shape, dtype=q.dtype)
    triton_attention.attention(q, cache, sequences(case), 0.125, out, **options, **of_heads)


def rotate_and_store(case: dict[str, Any]) -> None:
    qkv, cache = tensors(case)
    table = torch.empty(cache.max_len, case["rotated"], dtype=qkv.dtype)
    rotary = (table, table.clone()) if case["rotated"] else None
    triton_kv_cache.rotate_and_store(qkv, cache, sequences(case), rotary)


def rows(case: dict[str, Any]) -> None:
    """All that is done to rows of n numbers."""
    n, dtype, of = case["n"], getattr(torch, case["dtype"]), sequences(case)
    x, row = torch.empty(of.tokens, n, dtype=dtype), torch.empty(n, dtype=dtype)
    triton_rows.rms_norm(x, row, 1e-5, None, x)
    triton_rows.layer_norm(x, row, row, 1e-5, None)
    for activation in ACTIVATIONS:
        triton_rows.activate_(x, activation, True)
        triton_rows.activate_(x, activation, False)
    triton_rows.scale_(x, 0.5, 30.0)
    triton_rows.head_norm_(x.view(of.tokens, -1, 64), row[:64], 1e-5)
    triton_rows.add_positions_(x, torch.empty(99, n, dtype=dtype), of)
    triton_rows.last_rows(x, of, torch.empty(len(of.slots), n, dtype=dtype))
    triton_rows.argmax(x, torch.empty(len(x), dtype=torch.int64))
    numbers = torch.empty(5, len(x), dtype=torch.float64)
    ids = torch.empty(len(x), dtype=torch.int64)
    triton_draw.draw_(ids, x, numbers[:4], numbers[4])
    for precision in (Precision(3, 64), Precision(4, None, "asym"), Precision(8, 32, "offset"), W16):
        data = gpu_layout.allocate(32, n, precision, dtype, x.device)
        triton_embedding.embedding(ids, PreparedWeight("triton", 32, n, precision, dtype, x.device, data), x)


def experts(case: dict[str, Any]) -> None:
    """Which ones tokens go to, their products in each width, and the sum of what they give."""
    n, dtype, tokens, (count, choices) = (
        case["n"],
        getattr(torch, case["dtype"]),
        case.get("tokens", 3),
        case["experts"],
    )
    chosen, weights = torch.empty(tokens, choices, dtype=torch.int32), torch.empty(tokens, choices)
    triton_experts.route(torch.empty(tokens, count, dtype=dtype), True, case["sigmoid"], chosen, weights)
    x = torch.empty(tokens, n, dtype=dtype)
    for precision in (Precision(3, 64), Precision(4, None, "asym"), Precision(8, 32, "offset")):
        data = gpu_layout.allocate(64, n, precision, torch.float16, x.device)
        w = PreparedWeight("triton", 64, n, precision, torch.float16, x.device, data)
        out, biases = torch.empty(tokens * choices, 64, dtype=dtype), torch.empty(count, 64, dtype=dtype)
        triton_gemm.grouped_gemm(x, ExpertWeights([w] * count), chosen, biases, out, "a16")
    triton_experts.combine(x.repeat_interleave(choices, 0), weights, x, x)


OPERATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "attention": attention,
    "rotate_and_store": rotate_and_store,
    "rows": rows,
    "experts": experts,
}


def launches_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What the operation of a case launches."""
    found: list[dict[str, Any]] = []
    major, minor = divmod(case["capability"], 10)
    driver.set_active(Driver(case["capability"]))
    triton_gemm._device = triton_device.describe = lambda device: ((major, minor), MULTIPROCESSORS)
    triton_gemm._config.cache_clear()

    def launched(kernel: JITFunction[Any], grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **named: Any) -> None:
            compiled = kernel.warmup(*arguments, grid=grid, **named)
            every, loop = instructions(compiled.asm["cubin"])
            found.append(
                {
                    "kernel": compiled.name,
                    "grid": list(grid),
                    "shared_bytes": compiled.metadata.shared,
                    "instructions": len(every),
                    "loop": len(loop),
                    "tensor_cores": count(every, "HMMA|HGMMA"),
                    "local_memory": count(every, "LDL|STL"),
                }
            )

        return compile_it

    JITFunction.__getitem__ = launched
    OPERATIONS[case["operation"]](case)
    return found


if __name__ == "__main__":
    print(json.dumps([launches_of(case) for case in json.loads(sys.argv[1])]))
