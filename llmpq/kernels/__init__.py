"""L2: products with quantized weights, and the other operations of a decoder, on one of several backends.

This file, kv_attention.py, rows.py and experts.py check arguments, once for all backends, and call the one that the
weight or the cache was made for. A backend is a module with the functions of `llmpq.kernels.registry.Backend`; it is
imported when first asked for, and one that is missing disturbs none.

On the CPU backends a row's result has the same bits whatever m, the row's neighbours and the number of threads, of
which they use `torch.get_num_threads()`. On the GPU backends that holds for quantized weights with
LLMPQ_BATCH_INVARIANT=1; else products of many rows go to cuBLAS where that is faster (llmpq/kernels/gemm_path.py),
which sums in another order for another m. Two runs of the same product have the same bits on all of them. What is
no product is Triton's on a GPU that it runs on. There, too, a row's result depends on the row alone, and attention on
whether its sequence has one new token or several, which go through different kernels.

The environment variable LLMPQ_BACKEND forces one backend on all quantized and 16-bit weights.

GPU products run on the current stream of x's device and wait for nothing, so they can be captured in a CUDA graph. A
weight must not be multiplied on two streams at the same time. Under torch.compile `gemm` is the operator `llmpq::gemm`
(llmpq/kernels/torch_operator.py): `torch.compile(model, fullgraph=True)` takes a model of QuantLinears, for any m.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from llmpq.kernels import torch_operator
from llmpq.kernels.dispatch import BACKENDS, select
from llmpq.kernels.experts import combine, grouped_gemm, route
from llmpq.kernels.kv_attention import allocate_cache, attention, rotate_and_store
from llmpq.kernels.program import Program
from llmpq.kernels.registry import available_backends, cache_backend, check_activations, grouped_pairs, version
from llmpq.kernels.rows import (
    ACTIVATIONS,
    activate_,
    add_positions_,
    argmax,
    draw_,
    draws,
    head_norm_,
    last_rows,
    layer_norm,
    rms_norm,
    scale_,
)
from llmpq.kernels.sequences import CacheLayer, DeviceSequences, Sequences
from llmpq.kernels.weight import FLOAT_DTYPES, ExpertWeights, PreparedWeight, WeightBuilder, prepare

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CacheLayer",
    "DeviceSequences",
    "ExpertWeights",
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
    "check_ids",
    "combine",
    "draw_",
    "draws",
    "embedding",
    "gemm",
    "grouped_gemm",
    "grouped_pairs",
    "head_norm_",
    "last_rows",
    "layer_norm",
    "prepare",
    "rms_norm",
    "rotate_and_store",
    "route",
    "scale_",
    "select",
    "version",
]


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
        elif (w.backend in ("cuda", "triton") and residual.stride()[1] == 1) or (
            w.backend == "cpu" and dtype == torch.float32 and residual.stride() == out.stride()
        ):
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

    Raises ValueError, for ids that are no rows on a CPU only; see `check_ids`.
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
    if ids.device.type == "cpu":
        check_ids(ids, w)
    w.module.embedding(ids, w, out)
    return out


def check_ids(ids: torch.Tensor, w: PreparedWeight) -> None:
    """Raise ValueError for ids on the CPU that are no rows of a weight.

    On a GPU `embedding` does not look, as it would have to wait for all work before it, and a wrong id ends the use of
    the device: there, ids are looked at before they are copied.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.n:
        raise ValueError(f"ids reach from {int(ids.min())} to {int(ids.max())}, but the table has {w.n} rows")
