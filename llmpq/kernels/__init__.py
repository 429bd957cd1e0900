"""L2: products with quantized weights, and the other operations of a decoder, on one of several backends.

This file checks arguments, once for all backends, and calls the one that the weight was prepared for. A backend is a
module with the functions of `llmpq.kernels.registry.Backend`; it is imported when first asked for, and one that is
missing disturbs none.

On the CPU backends a row's result has the same bits whatever m, the row's neighbours and the number of threads, of
which they use `torch.get_num_threads()`. On the GPU backends that holds for quantized weights with
LLMPQ_BATCH_INVARIANT=1; else products of many rows go to cuBLAS where that is faster (llmpq/kernels/gemm_path.py),
which sums in another order for another m. Two runs of the same product have the same bits on all of them.

The environment variable LLMPQ_BACKEND forces one backend on all quantized and 16-bit weights.

GPU products run on the current stream of x's device and wait for nothing, so they can be captured in a CUDA graph. A
weight must not be multiplied on two streams at the same time. Under torch.compile `gemm` is the operator `llmpq::gemm`
(llmpq/kernels/torch_operator.py): `torch.compile(model, fullgraph=True)` takes a model of QuantLinears, for any m.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.compiler import is_compiling

from llmpq.kernels import torch_operator
from llmpq.kernels.backends import reference
from llmpq.kernels.dispatch import BACKENDS, select
from llmpq.kernels.registry import available_backends, check_activations, load, version
from llmpq.kernels.weight import FLOAT_DTYPES, PreparedWeight, WeightBuilder, prepare

__all__ = [
    "BACKENDS",
    "PreparedWeight",
    "WeightBuilder",
    "attention",
    "available_backends",
    "embedding",
    "gemm",
    "layer_norm",
    "prepare",
    "rms_norm",
    "select",
    "version",
]


def gemm(
    x: torch.Tensor,
    w: PreparedWeight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    activations: str = "a16",
) -> torch.Tensor:
    """y [..., n] = x [..., k] @ w.T + bias [n], in x's dtype: float32, bfloat16 or float16.

    x may be strided; `out` [..., n], if given, is written and returned; it must not share memory with x. `activations`
    is how x is multiplied: "a16" exactly, "a8x2" and "a8" after rounding it to int8 (llmpq/quant/activations.py), which
    only quantized weights and some backends have. Raises ValueError.
    """
    if is_compiling():
        y = torch_operator.gemm(x, w, bias, activations)
        return y if out is None else out.copy_(y)
    shape, dtype = x.shape, x.dtype
    if activations not in w.activations:
        check_activations(w.backend, activations, w.precision)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"x has dtype {dtype}, expected one of {FLOAT_DTYPES}")
    if not shape or shape[-1] != w.k:
        raise ValueError(f"x has shape {list(shape)}, expected [..., {w.k}]")
    if x.device != w.device:
        raise ValueError(f"x is on {x.device}, but the weight is on {w.device}")
    if bias is not None:
        if bias.shape != (w.n,) or bias.dtype not in FLOAT_DTYPES:
            raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, expected floating-point [{w.n}]")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device}, but x is on {x.device}")
    y_shape = (*shape[:-1], w.n)
    if out is None:
        out = x.new_empty(y_shape)
    elif out.shape != y_shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected {dtype} {list(y_shape)}")
    elif out.device != x.device:
        raise ValueError(f"out is on {out.device}, but x is on {x.device}")
    if out.numel() == 0:
        return out

    backend = w.module
    native = dtype if dtype in backend.ACTIVATION_DTYPES else backend.ACTIVATION_DTYPES[0]
    if bias is not None and (bias.dtype != native or not bias.is_contiguous()):
        bias = bias.to(native).contiguous()
    # A decoder makes hundreds of small calls a token, each of which lasts as long as a few tensor operations.
    if native == dtype and len(shape) == 2 and x.stride()[1] == 1 and out.stride()[1] == 1:
        backend.gemm(x, w, bias, out, activations)
        return out
    rows = x.reshape(-1, w.k).to(native)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    direct = native == dtype and out.is_contiguous()
    result = out.view(-1, w.n) if direct else torch.empty(len(rows), w.n, dtype=native, device=x.device)
    backend.gemm(rows, w, bias, result, activations)
    return out if direct else out.copy_(result.view(y_shape))


def embedding(ids: torch.Tensor, w: PreparedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Rows ids (int64 [t]) of a weight [n, k], dequantized to `dtype` [t, k]: a tied table serves as LM head, too."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [t]")
    if ids.device != w.device:
        raise ValueError(f"ids is on {ids.device}, but the weight is on {w.device}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOAT_DTYPES}")
    # On a GPU this look would wait for all work before it.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.n:
        raise ValueError(f"ids reach from {int(ids.min())} to {int(ids.max())}, but the table has {w.n} rows")
    rows: torch.Tensor = load(w.backend).embedding(ids, w, dtype)
    return rows


def _check_out(out: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raise ValueError unless `out` is None or contiguous and of this shape, dtype and device."""
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (like.shape, like.dtype, like.device) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, expected contiguous {like.dtype} "
            f"{list(like.shape)} on {like.device}"
        )


def _operations(x: torch.Tensor) -> Any:
    """The module whose attention and norms suit x."""
    if x.device.type == "cpu" and os.environ.get("LLMPQ_BACKEND", "cpu") == "cpu":
        cpu = load("cpu")
        if not isinstance(cpu, str) and x.dtype == torch.float32:
            return cpu
    return reference


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the new tokens of several sequences, packed one after the other: [t, heads, d], or `out`.

    q is [t, heads, d] with t = sum(query_lens); k_cache and v_cache are [slots, kv_heads, max_len, d] of q's dtype and
    hold the new tokens' keys and values already. Sequence s has its cache in slots[s], query_lens[s] new tokens and
    context_lens[s] tokens in all; its query i is at position context_lens[s] - query_lens[s] + i and sees the keys up
    to there. These three are int32 on the CPU. Query head h reads kv head h // (heads / kv_heads). Raises ValueError.
    """
    _check_out(out, q)
    if q.dim() != 3 or q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q is {q.dtype} {list(q.shape)}, expected floating-point [t, heads, d]")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape != k_cache.shape or cache.shape[3] != q.shape[2]:
            raise ValueError(f"{name} has shape {list(cache.shape)}, expected [slots, kv_heads, max_len, {q.shape[2]}]")
        if cache.dtype != q.dtype or cache.device != q.device:
            raise ValueError(f"{name} is {cache.dtype} on {cache.device}, but q is {q.dtype} on {q.device}")
    num_slots, kv_heads, max_len, _ = k_cache.shape
    if q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, which {kv_heads} kv_heads do not divide")
    for name, lens in (("slots", slots), ("query_lens", query_lens), ("context_lens", context_lens)):
        if lens.dtype != torch.int32 or lens.shape != (len(slots),) or lens.device.type != "cpu":
            raise ValueError(
                f"{name} is {lens.dtype} {list(lens.shape)} on {lens.device}, expected int32 [{len(slots)}] on the CPU"
            )
    sequences = list(zip(slots.tolist(), query_lens.tolist(), context_lens.tolist()))
    for slot, queries, context in sequences:
        if not 0 <= slot < num_slots:
            raise ValueError(f"slots names {slot}, but the cache has {num_slots}")
        if not 0 < queries <= context <= max_len:
            raise ValueError(
                f"query_lens and context_lens say {queries} and {context}, expected 0 < query_len <= context_len <= "
                f"{max_len}"
            )
    if sum(queries for _, queries, _ in sequences) != len(q):
        raise ValueError(f"q has {len(q)} tokens, but query_lens say {sum(queries for _, queries, _ in sequences)}")
    if len(q) == 0:
        return torch.empty_like(q) if out is None else out
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _operations(q).attention(q, k_cache, v_cache, slots, query_lens, context_lens, scale, out)
    return out


def _check_norm(x: torch.Tensor, out: torch.Tensor | None, **parameters: torch.Tensor) -> None:
    _check_out(out, x)
    if x.dim() < 1 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [..., size]")
    for name, parameter in parameters.items():
        if parameter.shape != x.shape[-1:] or parameter.dtype not in FLOAT_DTYPES or parameter.device != x.device:
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)} on {parameter.device}, expected floating-point "
                f"[{x.shape[-1]}] on {x.device}"
            )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight [size] over the last dim of x [..., size], or `out`. Raises ValueError."""
    _check_norm(x, out, weight=weight)
    y: torch.Tensor = _operations(x).rms_norm(x, weight, eps, out)
    return y


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim of x [..., size]. Raises ValueError."""
    _check_norm(x, out, weight=weight, bias=bias)
    y: torch.Tensor = _operations(x).layer_norm(x, weight, bias, eps, out)
    return y
