"""The Triton backend's products: one kernel for all widths, on the panels that the CUDA backend reads, too.

This is the backend's module; its other operations come from triton_attention.py, triton_kv_cache.py, triton_rows.py
and triton_experts.py beside it.

It runs where triton does, and on CPU tensors under triton's interpreter (TRITON_INTERPRET=1 before triton is first
imported), which is how it is tested without a GPU. How work is cut is looked up in triton_configs.json or estimated,
never tried out at run time; the first call for a (precision, dtype, k) compiles.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpq.kernels import gemm_path
from llmpq.kernels.backends import plain_experts
from llmpq.kernels.backends.dense import SCRATCH_BYTES, multiply_unfused
from llmpq.kernels.backends.gpu_layout import PANEL, allocate, fill
from llmpq.kernels.backends.triton_attention import attention
from llmpq.kernels.backends.triton_device import describe as _device
from llmpq.kernels.backends.triton_device import dtype_of
from llmpq.kernels.backends.triton_device import is_interpreted as _interpreted
from llmpq.kernels.backends.triton_draw import draw_
from llmpq.kernels.backends.triton_embedding import embedding
from llmpq.kernels.backends.triton_experts import combine, route
from llmpq.kernels.backends.triton_kv_cache import allocate_zeros, cache_shapes, rotate_and_store
from llmpq.kernels.backends.triton_rows import (
    activate_,
    add_positions_,
    argmax,
    head_norm_,
    last_rows,
    layer_norm,
    rms_norm,
    scale_,
)
from llmpq.kernels.weight import ExpertWeights, PreparedWeight
from llmpq.spec import Precision

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_DTYPES",
    "Config",
    "activate_",
    "add_positions_",
    "allocate",
    "allocate_zeros",
    "argmax",
    "attention",
    "cache_shapes",
    "combine",
    "config",
    "dequantize",
    "draw_",
    "embedding",
    "fill",
    "gemm",
    "grouped_gemm",
    "head_norm_",
    "is_available",
    "last_rows",
    "layer_norm",
    "rms_norm",
    "rotate_and_store",
    "route",
    "scale_",
]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("a16",)
STEP = 128  # codes along k that the kernel takes at a time
TILE = 64  # rows of the weight that splits are computed for, whatever the tile is
PROGRAMS = 6  # a multiprocessor, at least: enough of them wait for memory while others compute
GROUPED_PAIRS = 256  # of a token and an expert, at most, that programs find their own among
GROUPED_ROWS = 16  # of an expert that a program takes
MIN_STEPS = 4  # in a split: fewer would be over before the pipeline has filled


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut into programs. Only `splits` bears on a row's bits, and it does not depend on m."""

    tensor_cores: bool
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int  # of k, each summed by a program of its own


def config(
    capability: tuple[int, int], sms: int, precision: Precision, dtype: torch.dtype, m: int, n: int, k: int
) -> Config:
    """The configuration for a device of `capability` with `sms` multiprocessors; (0, 0) and 1 for the interpreter.

    Two warps, so that Triton takes the same tensor-core instruction (mma, never wgmma) for every block_m: another one
    might add up 16 products in another order.
    """
    splits = _listed("splits", capability, precision, dtype, n, k).get("splits") or _splits(sms, n, k)
    if capability < (8, 0) or dtype == torch.float32:
        return Config(False, block_m=16, block_n=64, num_warps=4, num_stages=2, splits=splits)
    largest = 32 if precision.zero == "offset" else 64  # sums of x take registers, too
    block_m = next((size for size in (8, 16, 32) if m <= size), largest)
    tile = {"block_n": 64, "num_warps": 2, "num_stages": 3}
    listed = _listed("tiles", capability, precision, dtype, n, k, block_m)
    return Config(True, block_m, **(tile | listed), splits=splits)


def _splits(sms: int, n: int, k: int) -> int:
    """Of the numbers that make enough programs, the one with which the busiest multiprocessor has least to do.

    Filling and emptying a program's pipeline counts as two more steps.
    """
    tiles, steps = -(-n // TILE), -(-k // STEP)
    enough, most = -(-PROGRAMS * sms // tiles), max(1, steps // MIN_STEPS)
    candidates = range(min(enough, most), min(2 * enough, most) + 1)
    return min(candidates, key=lambda splits: -(-tiles * splits // sms) * (-(-steps // splits) + 2))


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("triton_configs.json").read_text())
    return table


def _listed(
    kind: str,
    capability: tuple[int, int],
    precision: Precision,
    dtype: torch.dtype,
    n: int,
    k: int,
    block_m: int | None = None,
) -> dict[str, int]:
    """What the first entry that fits sets. An entry fits what it does not name; n and k are [least, most]."""
    facts = {
        "capability": list(capability),
        "bits": precision.bits,
        "dtype": str(dtype).removeprefix("torch."),
        "block_m": block_m,
    }
    sizes = {"n": n, "k": k}
    for entry in _table()[kind]:
        if all(entry.get(name, fact) == fact for name, fact in facts.items()) and all(
            entry[name][0] <= size <= entry[name][1] for name, size in sizes.items() if name in entry
        ):
            return {name: value for name, value in entry.items() if name not in facts and name not in sizes}
    return {}


def is_available() -> str | None:
    """None if triton can run here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if torch.cuda.is_available() or _interpreted():
        return None
    return "there is no CUDA device, and triton is not interpreting (TRITON_INTERPRET=1)"


@functools.lru_cache(maxsize=4096)
def _config(device: torch.device, precision: Precision, dtype: torch.dtype, m: int, n: int, k: int) -> Config:
    return config(*_device(device), precision, dtype, m, n, k)


def gemm(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
    residual: torch.Tensor | None = None,
) -> None:
    """out = x @ w.T + bias + residual with x [m, k], out and residual [m, n] and bias [n] of one dtype.

    On the current stream. Sums are float32, and rounded before the residual is added. In the fused kernel a row's
    result does not depend on the other rows; torch's own products, which other routes take, do not promise that.
    """
    m = len(x)
    if not w.precision.quantized or not gemm_path.is_fused(x.device, "triton", w.precision, m, w.n, w.k, x.dtype):
        multiply_unfused(x, w, bias, residual, out, dequantize)
        return
    cut = _config(x.device, w.precision, x.dtype, m, w.n, w.k)
    if cut.splits == 1:
        _launch(x, w, bias, residual, out, cut)
        return
    rows = min(m, max(1, SCRATCH_BYTES // (4 * cut.splits * w.n * cut.block_m)) * cut.block_m)
    for start in range(0, m, rows):
        here = slice(start, min(start + rows, m))
        parts = torch.empty(cut.splits, len(x[here]), w.n, dtype=torch.float32, device=x.device)
        _launch(x[here], w, None, None, parts, cut)
        _reduce(parts, bias, None if residual is None else residual[here], out[here])


def _launch(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    cut: Config,
) -> None:
    """out [m, n] = x @ w.T + bias + residual, or the parts of x @ w.T, out [splits, m, n]."""
    import triton

    from llmpq.kernels.backends.triton_kernel import gemm_kernel

    m = len(x)
    with torch.cuda.device_of(x):
        gemm_kernel[(triton.cdiv(m, cut.block_m), triton.cdiv(w.n, cut.block_n), cut.splits)](
            x,
            *_operands(w),
            x if bias is None else bias,
            x if residual is None else residual,
            out,
            m,
            w.n,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(-2),
            int(w.precision.zero == "asym"),
            K=w.k,
            BITS=w.precision.bits,
            HAS_OFFSETS=w.precision.zero == "offset",
            GROUP_SIZE=w.precision.group_size or w.k,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            SPLITS=cut.splits,
            dtype=_multiplied(x.dtype, cut.tensor_cores),
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            enable_fp_fusion=True,
        )


def _reduce(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    experts: torch.Tensor | None = None,
) -> None:
    """out [m, n] = the sum of parts [splits, m, n] + bias + residual; `bias` may be of the rows' `experts`."""
    import triton

    from llmpq.kernels.backends.triton_kernel import reduce_kernel

    splits, m, n = parts.shape
    with torch.cuda.device_of(out):
        reduce_kernel[(m, triton.cdiv(n, 512))](
            parts,
            out if bias is None else bias,
            out if residual is None else residual,
            out if experts is None else experts,
            out,
            m,
            n,
            0 if residual is None else residual.stride(0),
            out.stride(0),
            OF_EXPERTS=experts is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            SPLITS=splits,
            BLOCK_N=512,
            num_warps=4,
            enable_fp_fusion=True,
        )


def grouped_gemm(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
) -> None:
    """As `llmpq.kernels.grouped_gemm` says."""
    w, pairs = weights[0], experts.numel()
    if not w.precision.quantized or pairs > GROUPED_PAIRS:
        plain_experts.grouped_gemm(x, weights, experts, biases, out, activations)
        return
    # No expert is chosen twice by a token, so none has more rows than there are tokens.
    cut = _config(x.device, w.precision, x.dtype, min(len(experts), GROUPED_ROWS), w.n, w.k)
    if cut.splits == 1:
        _launch_grouped(x, weights, experts, biases, out, cut)
        return
    parts = torch.empty(cut.splits, pairs, w.n, dtype=torch.float32, device=x.device)
    _launch_grouped(x, weights, experts, None, parts, cut)
    _reduce(parts, biases, None, out, experts)


def _launch_grouped(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    cut: Config,
) -> None:
    """out [pairs, n] = the products + biases, or the parts of these, out [splits, pairs, n]."""
    import triton

    from llmpq.kernels.backends.triton_kernel import grouped_kernel

    w, pairs, distances = weights[0], experts.numel(), weights.distances
    with torch.cuda.device_of(x):
        grouped_kernel[(pairs, triton.cdiv(w.n, cut.block_n), cut.splits)](
            x,
            distances,
            *_operands(w),
            experts,
            x if biases is None else biases,
            out,
            pairs,
            w.n,
            x.stride(0),
            int(w.precision.zero == "asym"),
            ROWS_OF=pairs // len(x),
            TENSORS=distances.shape[1],
            K=w.k,
            BITS=w.precision.bits,
            HAS_OFFSETS=w.precision.zero == "offset",
            GROUP_SIZE=w.precision.group_size or w.k,
            HAS_BIASES=biases is not None,
            SPLITS=cut.splits,
            dtype=_multiplied(x.dtype, cut.tensor_cores),
            BLOCK_P=triton.next_power_of_2(pairs),
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            enable_fp_fusion=True,
        )


def dequantize(w: PreparedWeight, panel_start: int, out: torch.Tensor) -> None:
    """Write the rows of a quantized weight from 16 * panel_start on to out [rows, k], contiguous, each rounded once."""
    import triton

    from llmpq.kernels.backends.triton_kernel import dequantize_kernel

    rows = len(out)
    with torch.cuda.device_of(out):
        dequantize_kernel[(triton.cdiv(rows, 2 * PANEL), triton.cdiv(w.k, STEP))](
            *(operand[panel_start:] for operand in _operands(w)),
            out,
            rows,
            int(w.precision.zero == "asym"),
            K=w.k,
            BITS=w.precision.bits,
            HAS_OFFSETS=w.precision.zero == "offset",
            GROUP_SIZE=w.precision.group_size or w.k,
            dtype=_multiplied(out.dtype, _device(out.device)[0] >= (8, 0)),
            BLOCK_N=2 * PANEL,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _operands(w: PreparedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales and zeros or offsets; where there are none, something to point at."""
    qweight, scales = w.data[:2]
    return qweight, scales, scales if w.precision.zero == "sym" else w.data[2]


def _multiplied(dtype: torch.dtype, tensor_cores: bool) -> Any:
    """The type that the kernel turns codes into, to go with x or an output of `dtype`."""
    return dtype_of(dtype if tensor_cores else torch.float32)
