"""The CUDA backend: llmpq._cuda multiplies quantized weights, torch the plain ones.

The weight is held in the layout of llmpq/kernels/backends/gpu_layout.py, with a counter for every 128 rows, which the
kernel leaves at zero: so one weight is multiplied on one stream at a time, or products of it may stay unwritten. Tensor
cores multiply x in float16 and, from Ampere on, bfloat16 (csrc/cuda/mma.cuh); anything else is multiplied by plain
fused multiply-adds (csrc/cuda/fma.cuh). In both a row's result does not depend on the other rows. That does not hold
beyond 16 rows on Hopper, whose tensor cores have kernels of their own: for more rows (csrc/cuda/wgmma.cuh), and for up
to 16 of bfloat16 (biased_kernel in mma.cuh); nor where cuBLAS makes the product, of plain weights or of dequantized
ones (llmpq/kernels/gemm_path.py): it picks another order of sums for another m. LLMPQ_BATCH_INVARIANT=1 has none of
these take part. LLMPQ_NO_WGMMA=1, for measuring, has Hopper go without its own kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from llmpq.kernels import gemm_path
from llmpq.kernels.backends import gpu_layout, plain_experts, triton_embedding, triton_gemm
from llmpq.kernels.backends.dense import multiply_unfused
from llmpq.kernels.backends.gpu_layout import fill
from llmpq.kernels.registry import cache_backend, grouped_pairs
from llmpq.kernels.weight import ExpertWeights, PreparedWeight
from llmpq.spec import Precision

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_DTYPES",
    "allocate",
    "dequantize",
    "embedding",
    "fill",
    "gemm",
    "grouped_gemm",
    "is_available",
]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of Dtype in csrc/gemm.h
ACTIVATIONS = ("a16",)
_TILE_ROWS = 128  # as in csrc/cuda/gemm.cuh
_KERNEL_ROWS = 128  # of x that one kernel takes at most, as in csrc/cuda/wgmma.cuh
_ALIGNMENT = 16  # bytes, of x and its rows, for tensor cores
_NOTHING = nullcontext()


def is_available() -> str | None:
    """None if there is a CUDA device and the extension for it, else the reason."""
    try:
        import llmpq._cuda  # noqa: F401
    except ImportError:
        return "llmpq was built without CUDA; install it again with nvcc on PATH"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def allocate(
    n: int, k: int, precision: Precision, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """What llmpq/kernels/backends/gpu_layout.py holds, and int32 counters [ceil(n / 128)] of zeros behind it."""
    data = gpu_layout.allocate(n, k, precision, dtype, device)
    if not precision.quantized:
        return data
    return (*data, torch.zeros(-(-n // _TILE_ROWS), dtype=torch.int32, device=device))


@dataclass(frozen=True, slots=True)
class Handle:
    """What a product needs to know of a quantized weight, looked up once."""

    weight: Any  # the extension's
    device: int
    workspace_bytes: tuple[int, ...]  # for m rows of x; the last for more, too


def handle(w: PreparedWeight) -> Handle:
    """Look up a quantized weight. Raises RuntimeError if it is too large for the kernels."""
    from llmpq import _cuda

    qweight, scales, *zeros, counters = w.data
    weight = _cuda.Weight(
        qweight=qweight.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros[0].data_ptr() if w.precision.zero == "asym" else 0,
        offsets=zeros[0].data_ptr() if w.precision.zero == "offset" else 0,
        counters=counters.data_ptr(),
        n=w.n,
        k=w.k,
        group_size=w.precision.group_size or w.k,
        bits=w.precision.bits,
        scale_dtype=ACTIVATION_DTYPES.index(scales.dtype),
        device=w.device.index or 0,
    )
    return Handle(weight, w.device.index or 0, tuple(map(weight.workspace_bytes, range(_KERNEL_ROWS + 1))))


def _on(device: int) -> AbstractContextManager[object]:
    """Leaves torch's current device what it was; the kernels' launches change it."""
    return _NOTHING if torch.cuda.current_device() == device else torch.cuda.device(device)


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)  # as torch.cuda.current_stream, which takes a microsecond


def gemm(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
    residual: torch.Tensor | None = None,
) -> None:
    """out = x @ w.T + bias + residual with x [m, k], out and residual [m, n] and bias [n] of one dtype.

    It is queued on the current stream. Rows of x, out and residual have unit stride. Sums are float32 and rounded
    before the residual is added. Raises RuntimeError if the kernel cannot be started.
    """
    m = x.shape[0]
    if not w.precision.quantized or not gemm_path.is_fused(w.device, "cuda", w.precision, m, w.n, w.k, x.dtype):
        multiply_unfused(x, w, bias, residual, out, dequantize)
        return
    handle = w.handle
    scratch = 0
    if x.dtype != torch.float32:
        x = aligned(x)
        workspace = torch.empty(handle.workspace_bytes[min(m, _KERNEL_ROWS)], dtype=torch.uint8, device=w.device)
        scratch = workspace.data_ptr()
    with _on(handle.device):
        handle.weight.gemm(
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            scratch,
            m,
            x.stride(0) if m > 1 else 0,  # which for one row may be anything
            0 if residual is None else residual.stride(0),
            out.stride(0),
            ACTIVATION_DTYPES.index(x.dtype),
            gemm_path.is_batch_invariant(),
            _stream(handle.device),
        )


def aligned(x: torch.Tensor) -> torch.Tensor:
    """16-bit x [m, k] itself if its rows can be read in pieces of 16 bytes, else a copy filled up with zeros."""
    elements = _ALIGNMENT // x.element_size()
    short = -x.shape[1] % elements
    if not short and x.data_ptr() % _ALIGNMENT == 0 and (len(x) == 1 or x.stride(0) % elements == 0):
        return x
    return pad(x, (0, short))


def embedding(ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
    """Rows ids (int64 [t]) of the weight, dequantized, in `out` [t, k]: by Triton's kernel where that runs."""
    with_triton = cache_backend(out.device, out.dtype) == "triton"
    (triton_embedding if with_triton else gpu_layout).embedding(ids, w, out)


def grouped_gemm(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
) -> None:
    """As `llmpq.kernels.grouped_gemm` says: where Triton runs, of few pairs by its kernel, which reads these panels."""
    few = experts.numel() <= grouped_pairs(x.device, weights[0].precision)
    (triton_gemm if few else plain_experts).grouped_gemm(x, weights, experts, biases, out, activations)


def dequantize(w: PreparedWeight, panel_start: int, out: torch.Tensor) -> None:
    """Rows 16 * panel_start ... of a quantized weight to out [rows, k], contiguous; each value is rounded once."""
    dtype, first_row = ACTIVATION_DTYPES.index(out.dtype), panel_start * gpu_layout.PANEL
    with _on(w.handle.device):
        w.handle.weight.dequantize(first_row, len(out), out.data_ptr(), dtype, _stream(w.handle.device))
