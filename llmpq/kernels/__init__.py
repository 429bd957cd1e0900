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
from llmpq.kernels.dispatch import BACKENDS, select
from llmpq.kernels.program import Program
from llmpq.kernels.registry import available_backends, check_activations, load, version
from llmpq.kernels.sequences import CacheLayer, Sequences
from llmpq.kernels.weight import FLOAT_DTYPES, PreparedWeight, WeightBuilder, prepare

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CacheLayer",
    "PreparedWeight",
    "Program",
    "Sequences",
    "WeightBuilder",
    "activate_",
    "add_positions_",
    "allocate_cache",
    "argmax",
    "attention",
    "available_backends",
    "cache_backend",
    "embedding",
    "gemm",
    "last_rows",
    "layer_norm",
    "prepare",
    "rms_norm",
    "rotate_and_store",
    "select",
    "version",
]

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


def gemm(
    x: torch.Tensor,
    w: PreparedWeight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    activations: str = "a16",
) -> torch.Tensor:
    """y [..., n] = x [..., k] @ w.T + bias [n] + residual [..., n], in x's dtype: float32, bfloat16 or float16.

    x may be strided; `out` [..., n], if given, is written and returned; it must not share memory with x or residual.
    Bias and residual are added in this order, each with one rounding. `activations` is how x is multiplied: "a16"
    exactly, "a8x2" and "a8" after rounding it to int8 (llmpq/quant/activations.py), which only quantized weights and
    some backends have. Raises ValueError.
    """
    if is_compiling():
        y = torch_operator.gemm(x, w, bias, activations)
        y = y if residual is None else y.add_(residual)
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
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (y_shape, dtype, x.device):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)} on {residual.device}, expected {dtype} "
            f"{list(y_shape)} on {x.device}"
        )
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
        if residual is None:
            backend.gemm(x, w, bias, out, activations)
        elif w.backend == "cpu" and dtype == torch.float32 and residual.stride() == out.stride():
            backend.gemm(x, w, bias, out, activations, residual)
        else:
            backend.gemm(x, w, bias, out, activations)
            out.add_(residual)
        return out
    rows = x.reshape(-1, w.k).to(native)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    direct = native == dtype and out.is_contiguous()
    result = out.view(-1, w.n) if direct else torch.empty(len(rows), w.n, dtype=native, device=x.device)
    backend.gemm(rows, w, bias, result, activations)
    out = out if direct else out.copy_(result.view(y_shape))
    return out if residual is None else out.add_(residual)


def embedding(
    ids: torch.Tensor, w: PreparedWeight, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ids (int64 [t]) of a weight [n, k], dequantized to `dtype` [t, k], or `out`: a tied table is a head, too.

    Raises ValueError.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [t]")
    if ids.device != w.device:
        raise ValueError(f"ids is on {ids.device}, but the weight is on {w.device}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOAT_DTYPES}")
    wanted = (len(ids), w.k)
    if out is None:
        out = torch.empty(wanted, dtype=dtype, device=ids.device)
    elif (out.shape, out.dtype, out.device) != (wanted, dtype, ids.device) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, expected contiguous {dtype} {list(wanted)} on "
            f"{ids.device}"
        )
    # On a GPU this look would wait for all work before it.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.n:
        raise ValueError(f"ids reach from {int(ids.min())} to {int(ids.max())}, but the table has {w.n} rows")
    w.module.embedding(ids, w, out)
    return out


def _check_out(out: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raise ValueError unless `out` is None or contiguous and of this shape, dtype and device."""
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (like.shape, like.dtype, like.device) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, expected contiguous {like.dtype} "
            f"{list(like.shape)} on {like.device}"
        )


def cache_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend whose attention and norms are used where a stage computes in `dtype` on a device."""
    if device.type == "cpu" and dtype == torch.float32 and os.environ.get("LLMPQ_BACKEND", "cpu") == "cpu":
        return "reference" if isinstance(load("cpu"), str) else "cpu"
    return "reference"


def _operations(x: torch.Tensor) -> Any:
    """The module whose operations besides products suit x."""
    return load(cache_backend(x.device, x.dtype))


def allocate_cache(
    backend: str,
    layers: int,
    slots: int,
    kv_heads: int,
    max_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[CacheLayer]:
    """Caches of so many layers, full of zeros, with all keys in one tensor of `dtype` and all values in another."""
    module = load(backend)
    shapes = module.cache_shapes(slots, kv_heads, max_len, head_dim)
    keys, values = (module.allocate_zeros((layers, *shape), dtype, device) for shape in shapes)
    return [CacheLayer(backend, keys[i], values[i], max_len, head_dim) for i in range(layers)]


def _check_cache(cache: CacheLayer, sequences: Sequences, x: torch.Tensor, name: str) -> None:
    """Raise ValueError unless x [t, _, d] has tokens of these sequences, and the cache room for them."""
    if x.dim() != 3 or x.dtype not in FLOAT_DTYPES or x.shape[2] != cache.head_dim:
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}, expected floating-point [t, heads, d] with d = {cache.head_dim}"
        )
    if cache.backend == "cpu" and x.dtype != torch.float32:
        raise ValueError(
            f"{name} is {x.dtype}, but the cache is that of backend 'cpu', which computes in torch.float32"
        )
    if x.device != cache.keys.device:
        raise ValueError(f"{name} is on {x.device}, but the cache is on {cache.keys.device}")
    if sequences.num_slots > cache.slots:
        raise ValueError(f"slots names {sequences.num_slots - 1}, but the cache has {cache.slots}")
    if sequences.longest > cache.max_len:
        raise ValueError(
            f"context_lens says {sequences.longest}, but a slot of the cache has {cache.max_len} positions"
        )
    if sequences.tokens != len(x):
        raise ValueError(f"{name} has {len(x)} tokens, but query_lens say {sequences.tokens}")


def rotate_and_store(
    qkv: torch.Tensor, cache: CacheLayer, sequences: Sequences, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """Rotate new queries and keys in place, and write keys and values to the cache.

    qkv is [t, heads + 2 * kv_heads, d]: queries, keys and values of the sequences' new tokens; any distance between
    tokens. `rotary` has tables [>= context_len, d] of the cosines and sines by which dimensions j and j + d / 2 are
    rotated at each position, in qkv's dtype, the first half of the sines with a minus sign; None: nothing is rotated.
    Numbers that a cache of float16 cannot hold become its largest, 65504. Raises ValueError.
    """
    _check_cache(cache, sequences, qkv, "qkv")
    if qkv.shape[1] < 2 * cache.kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} heads, expected those of {cache.kv_heads} keys and values at least")
    if len(qkv) and (qkv.stride(2) != 1 or qkv.stride(1) != qkv.shape[2]):
        raise ValueError("qkv has gaps within a token, which are not supported")
    for table in rotary or ():
        if table.dim() != 2 or table.shape[0] < sequences.longest or table.shape[1] != cache.head_dim:
            raise ValueError(
                f"a table of rotary has shape {list(table.shape)}, expected [>= {sequences.longest}, {cache.head_dim}]"
            )
        if table.dtype != qkv.dtype or table.device != qkv.device or not table.is_contiguous():
            raise ValueError(
                f"a table of rotary is {table.dtype} on {table.device}, expected contiguous {qkv.dtype} on {qkv.device}"
            )
    if rotary is not None and cache.head_dim % 2:
        raise ValueError(f"heads of {cache.head_dim} dimensions, which are no pairs, cannot be rotated")
    if len(qkv):
        load(cache.backend).rotate_and_store(qkv, cache, sequences, rotary)


def attention(
    q: torch.Tensor, cache: CacheLayer, sequences: Sequences, scale: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of the new tokens of several sequences to all of theirs: [t, heads, d], or `out`.

    q is [t, heads, d]; the cache holds the new tokens' keys and values already. A token sees those up to its own
    position. Query head h reads kv head h // (heads / kv_heads). Raises ValueError.
    """
    _check_out(out, q)
    _check_cache(cache, sequences, q, "q")
    if q.shape[1] % cache.kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, which {cache.kv_heads} kv_heads do not divide")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        load(cache.backend).attention(q, cache, sequences, scale, out)
    return out


def activate_(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """The activation of x [t, n], in place; `gated`: of x's first half, times its second half; [t, n / 2] then.

    One of ACTIVATIONS; gelu_tanh is gelu with the approximation by a tanh. On a CPU a row's result depends on nothing
    but the row. Raises ValueError.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.stride(1) != 1 or (gated and x.shape[1] % 2):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [t, n] with rows in one piece")
    y = x[:, : x.shape[1] // 2] if gated else x
    if len(x):
        _operations(x).activate_(x, activation, gated)
    return y


def add_positions_(x: torch.Tensor, table: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """x [t, n] += the rows of a table [>= context_len, n] for the positions of tokens; in place. Raises ValueError."""
    if len(table) < sequences.longest:
        raise ValueError(f"the table has {len(table)} positions, but context_lens says {sequences.longest}")
    if (x.shape, x.dtype) != ((sequences.tokens, *table.shape[1:]), table.dtype) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, expected contiguous {table.dtype} [{sequences.tokens}, {table.shape[1]}]"
        )
    _operations(x).add_positions_(x, table, sequences)
    return x


def last_rows(x: torch.Tensor, sequences: Sequences, out: torch.Tensor) -> torch.Tensor:
    """The row of x [t, n] of each sequence's last token, in `out` [s, n]. Raises ValueError."""
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or len(x) != sequences.tokens or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected contiguous floating-point [{sequences.tokens}, n]")
    _check_out(out, x[: len(sequences.slots)])
    _operations(x).last_rows(x, sequences, out)
    return out


def argmax(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The column of the largest number in each row of x [rows, size], in `out` (int64 [rows]); of equal ones the first.

    Raises ValueError.
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.shape[1] == 0:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point [rows, size]")
    if (out.shape, out.dtype, out.device) != ((len(x),), torch.int64, x.device) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)} on {out.device}, expected int64 [{len(x)}]")
    if len(x):
        _operations(x).argmax(x, out)
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
