"""The CUDA backend: llmpq._cuda multiplies quantized weights, torch the plain ones.

The weight is held in the stored format (llmpq/quant/packing.py). A row's result does not depend on the other rows;
csrc/cuda/gemv.cuh states the order of its sums. That does not hold for plain 16-bit weights, whose products are
cuBLAS's: it picks another order of sums for another m.
"""

from __future__ import annotations

import torch

from llmpq.kernels.reference import allocate, embedding, fill
from llmpq.kernels.weight import PreparedWeight

__all__ = ["ACTIVATIONS", "ACTIVATION_DTYPES", "allocate", "embedding", "fill", "gemm", "is_available"]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of Dtype in csrc/gemm.h
ACTIVATIONS = ("a16",)


def is_available() -> str | None:
    """None if there is a CUDA device and the extension for it, else the reason."""
    try:
        import llmpq._cuda  # noqa: F401
    except ImportError:
        return "llmpq was built without CUDA; install it again with nvcc on PATH"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def multiply_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x @ weight.T + bias by torch's own product; x, bias and out are of one dtype."""
    columns = weight.to(x.dtype).T
    if bias is None:
        torch.mm(x, columns, out=out)
    else:
        torch.addmm(bias, x, columns, out=out)  # rounds once


def gemm(x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, activations: str) -> None:
    """out = x @ w.T + bias with x [m, k], out [m, n] and bias [n] of one dtype, on the current stream.

    Sums are float32. Raises RuntimeError if the kernel cannot be started.
    """
    if not w.precision.quantized:
        return multiply_plain(x, w.data[0], bias, out)
    from llmpq import _cuda

    qweight, scales = w.data[:2]
    with torch.cuda.device(x.device):
        _cuda.gemm(
            x=x.data_ptr(),
            qweight=qweight.data_ptr(),
            scales=scales.data_ptr(),
            zeros=0 if w.precision.symmetric else w.data[2].data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=out.data_ptr(),
            m=x.shape[0],
            n=w.n,
            k=w.k,
            x_stride=x.stride(0),
            y_stride=out.stride(0),
            group_size=w.precision.group_size or w.k,
            bits=w.precision.bits,
            x_dtype=ACTIVATION_DTYPES.index(x.dtype),
            scale_dtype=ACTIVATION_DTYPES.index(scales.dtype),
            device=x.device.index,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
    return None
