"""The CUDA backend: llmpq._cuda multiplies quantized weights, torch the plain ones.

The weight is held in the layout of llmpq/kernels/backends/gpu_layout.py, with a counter for every 128 rows, which the
kernel leaves at zero: so one weight is multiplied on one stream at a time, or products of it may stay unwritten. Tensor
cores multiply x in float16 and, from Ampere on, bfloat16 (csrc/cuda/mma.cuh); anything else is multiplied by plain
fused multiply-adds (csrc/cuda/fma.cuh). In both a row's result does not depend on the other rows. That does not hold
where cuBLAS makes the product, of plain weights or of dequantized ones (llmpq/kernels/gemm_path.py): it picks another
order of sums for another m.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from llmpq.kernels import gemm_path
from llmpq.kernels.backends import gpu_layout
from llmpq.kernels.backends.dense import multiply_dequantized, multiply_plain
from llmpq.kernels.backends.gpu_layout import embedding, fill
from llmpq.kernels.weight import PreparedWeight
from llmpq.spec import Precision

__all__ = ["ACTIVATIONS", "ACTIVATION_DTYPES", "allocate", "dequantize", "embedding", "fill", "gemm", "is_available"]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of Dtype in csrc/gemm.h
ACTIVATIONS = ("a16",)
_TILE_ROWS = 128  # as in csrc/cuda/gemm.cuh
_ALIGNMENT = 16  # bytes, of x and its rows, for tensor cores


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


def handle(w: PreparedWeight) -> Any:
    """What the extension module needs to know of a quantized weight, looked up once."""
    from llmpq import _cuda

    qweight, scales, *zeros, counters = w.data
    return _cuda.Weight(
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


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def gemm(x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, activations: str) -> None:
    """out = x @ w.T + bias with x [m, k], out [m, n] and bias [n] of one dtype, on the current stream.

    Sums are float32. Raises RuntimeError if the kernel cannot be started.
    """
    m = x.shape[0]
    if not w.precision.quantized:
        return multiply_plain(x, w.data[0], bias, out)
    if not gemm_path.is_fused(w.device, "cuda", w.precision, m, w.n, w.k, x.dtype):
        return multiply_dequantized(x, w, bias, out, dequantize)
    with torch.cuda.device(w.device):
        if x.dtype == torch.float32:
            workspace = None
        else:
            x = aligned(x)
            workspace = torch.empty(w.handle.workspace_bytes(m), dtype=torch.uint8, device=w.device)
        w.handle.gemm(
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            m,
            x.stride(0) if m > 1 else 0,  # which for one row may be anything
            out.stride(0),
            ACTIVATION_DTYPES.index(x.dtype),
            _stream(w.device),
        )
    return None


def aligned(x: torch.Tensor) -> torch.Tensor:
    """16-bit x [m, k] itself if its rows can be read in pieces of 16 bytes, else a copy filled up with zeros."""
    elements = _ALIGNMENT // x.element_size()
    short = -x.shape[1] % elements
    if not short and x.data_ptr() % _ALIGNMENT == 0 and (len(x) == 1 or x.stride(0) % elements == 0):
        return x
    return pad(x, (0, short))


def dequantize(w: PreparedWeight, panel_start: int, out: torch.Tensor) -> None:
    """Rows 16 * panel_start ... of a quantized weight to out [rows, k], contiguous; each value is rounded once."""
    dtype, first_row = ACTIVATION_DTYPES.index(out.dtype), panel_start * gpu_layout.PANEL
    with torch.cuda.device(w.device):
        w.handle.dequantize(first_row, len(out), out.data_ptr(), dtype, _stream(w.device))
